"""Every option of a run, declared once: its type, its range, and what it means.

A section of the configuration is handed as it is to the functions that read it; it is hashable, so
that it can be a static argument of `jax.jit`. The default values stand in configs/grpo.py,
`config_checks` reads them. Of the package it imports only errors, texts and names of scores:
everything may import it.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from alphagrpo_jax import score_specs
from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.runtime.request_fields import extra_fields

# No conversions but int to float; a text below a field is its description in the manual.
SECTION = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
    hide_input_in_errors=True,  # an input may be a key that was given in the wrong place
)

Section = TypeVar("Section")
AnswerScore = Literal["confidence", "binary"]
ScoreName = Annotated[str, AfterValidator(score_specs.check)]
Aggregate = Literal["geometric", "mean", "pooled"]
InitialChoice = Literal["worst", "softmax"]
Rectification = Literal["released", "paper", "none"]


class ConfigError(UsageError):
    """A configuration that cannot be run; the message names the key and the fix."""


def check_key_name(name: str) -> str:
    """Refuses a text that cannot be the name of an environment variable.

    It may be the key itself, given in the wrong place, so no message shows it.

    Returns:
      `name`.
    Raises:
      ConfigError: `name` is neither "" nor capital letters, digits and underscores.
    """
    if name and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name, re.ASCII):
        raise ConfigError(
            "got no name of an environment variable as api_key_env (it is not shown, for it may be "
            "a key), expected capital letters, digits and underscores, e.g. MY_KEY; export the key "
            "under that name"
        )
    return name


def _check_extra_body(text: str) -> str:
    """Refuses what `extra_fields` does."""
    try:
        extra_fields(text)
    except UsageError as error:
        raise ConfigError(str(error)) from error
    return text


def _check_instruction(text: str) -> str:
    """Refuses an instruction of blanks alone."""
    if text and not text.strip():
        raise ValueError(f"got {text!r}, expected a text, or an empty one for none")
    return text


def _check_pattern(pattern: str) -> str:
    """Refuses what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"got {pattern!r}, expected a regular expression ({error})") from error
    return pattern


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """Refuses an interval that is empty."""
    low, high = interval
    if not low < high:
        raise ValueError(f"got {interval}, expected two noise levels (lo, hi), lo < hi")
    return interval


@dataclass(config=SECTION, frozen=True, kw_only=True)
class ModelOptions:
    """The pretrained model, and the size of the images that it makes."""

    path: str
    """Folder of the pretrained model, or package:NAME for one that is shipped."""
    dtype: Literal["float32", "bfloat16"]
    """Number format of the frozen weights and of the forward pass."""
    remat: Literal["none", "dots", "full"]
    """Values that a layer's backward pass computes again instead of storing them: none, all but the
    matrix products, or everything."""
    unroll: int = Field(ge=1, le=1000)
    """Layers per iteration of the loops over layers; with more of them a function takes longer to
    compile, and slices of stacked weights and caches need not be copied in every iteration."""
    attention: Literal["plain", "fused"]
    """Attention of passes over 128 tokens or more: with all scores in memory, or by a kernel that
    keeps none (cuDNN's on GPUs, in bfloat16 only; JAX's splash kernel on TPUs). CPUs have no such
    kernel: there both are the plain form."""
    height: int = Field(ge=16, le=4096)
    """Height of a generated image, in pixels."""
    width: int = Field(ge=16, le=4096)
    """Width of a generated image, in pixels."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters, the trained part where `train.trainable` is "lora"."""

    rank: int = Field(ge=1, le=4096)
    """Rank of every adapter."""
    alpha: float = Field(ge=1e-6, le=1e6)
    """Adapters are scaled by alpha / rank."""
    targets: Annotated[str, AfterValidator(_check_pattern)]
    """Regular expression over layer paths: the layers that get an adapter."""
    init_from: str
    """Adapter in PEFT's files that the run starts from, a folder or ORG/NAME of the Hugging Face
    hub; "" for a fresh one, which changes nothing at first."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class PoolOptions:
    """Deadlines, retries and threads of a pool of verifier processes."""

    threads: int = Field(ge=1, le=1024)
    """Compute threads of each process; fixed, so that answers are the same whatever the load."""
    attempt_seconds: float = Field(ge=1e-3, le=1e6)
    """Longest time for one attempt, in seconds: of a process at an image, from the moment it has
    it; of the client of chat servers at one question, from the moment it is sent, with all its
    requests and the pauses between them."""
    total_seconds: float = Field(ge=1e-3, le=1e6)
    """Longest time in which no verifier answers anything, in seconds; after it the images that wait
    have no reward. A queue that moves, however slowly, costs none."""
    start_seconds: float = Field(ge=1e-3, le=1e6)
    """Longest time for starting a process and building its verifier, in seconds."""
    max_attempts: int = Field(ge=1, le=1000)
    """Most attempts at an image; after that it has no reward."""
    cache_size: int = Field(ge=0, le=1 << 40)
    """Number of answers that are remembered by image and question; 0 remembers none."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class VerifierOptions(PoolOptions):
    """The verifier that answers the questions about an image, and where it runs."""

    kind: Literal["hf", "openai", "callable", "self"]
    """"hf": a Hugging Face model in local processes; "openai": chat servers only; "callable": a
    Python function; "self": the policy judges its own images."""
    path: str
    """Model folder, ORG/NAME of the Hugging Face hub or package:NAME; for "callable" it is
    MODULE:FUNCTION."""
    endpoints: tuple[str, ...]
    """Base URLs of chat servers, http://HOST:PORT/v1; empty for none."""
    model: str
    """Name that the chat servers serve; it must be the model of the local processes."""
    api_key_env: Annotated[str, AfterValidator(check_key_name)]
    """Environment variable that holds the key of the chat servers; "" sends none."""
    extra_body: Annotated[str, AfterValidator(_check_extra_body)]
    """Further fields of every request to a chat server, a JSON object as text, sent as they are;
    "" for none."""
    concurrency: int = Field(ge=1, le=4096)
    """Most requests in flight, over all images and chat servers."""
    question_seconds: float = Field(ge=1e-3, le=1e6)
    """Longest time for one request to a chat server, in seconds, from the moment it is sent."""
    top_logprobs: int = Field(ge=1, le=1 << 20)
    """Number of candidates of the token that is read, which a chat server is asked for."""
    workers: int = Field(ge=1, le=1024)
    """Number of local processes; without meaning for kind "openai", which has none."""
    device: str
    """Device of a Hugging Face verifier, cpu or cuda."""
    dtype: str
    """Number format of a Hugging Face verifier's weights, or auto for that of its folder."""
    top_k: int = Field(ge=0, le=1 << 20)
    """Number of candidates of the first token that count for P(yes); 0 counts all."""
    instruction: Annotated[str, AfterValidator(_check_instruction)]
    """System turn of every yes/no question, "" for none; answers under different instructions are
    not comparable."""
    min_mass: float = Field(ge=1e-6, le=1.0)
    """P(yes) + P(no) of the token that is read, below which the question has no answer."""
    read: Literal["first", "after_thinking"]
    """Token that is read: the first of the reply, or the first behind the last end of its thinking.
    A reply without any thinking is then read at its first token; over endpoints, which do not show
    whether a template opened the thinking, only if the judge itself ended the reply."""
    max_tokens: int = Field(ge=1, le=1 << 20)
    """Most tokens of a reply whose thinking comes first; without meaning for read="first"."""
    text_fallback: bool
    """Count a text that is exactly yes or no as 1 or 0 where no candidate is."""
    second: str
    """Another verifier that rates held-out images beside the first: its path, or
    openai:URL[,URL...] for chat servers that serve `model`; "" for none."""
    audit: str
    """JSONL file that gets a line for every attempt at an image; "" for none."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class RewardOptions:
    """The reward, from answers about an image and the form of the texts before it."""

    aggregate: Aggregate
    """Combination of the semantic and the quality mean: "geometric" and "mean" of the two, or
    "pooled", the mean over all questions."""
    score: ScoreName
    """Value of an answer: "confidence" is P(yes), "binary" 1 where P(yes) > 1/2, and "holistic"
    replaces the questions by ratings from 0 to 10. Or a scorer, as in `extra_scores`."""
    extra_scores: tuple[ScoreName, ...]
    """Further scores that are averaged with `score`, or scorers: hf_clip:PATH,
    callable:MODULE:FUNCTION, likelihood, exact, each with options behind a question mark."""
    extra_weights: tuple[Annotated[float, Field(gt=0.0, lt=1e6)], ...]
    """Weights of `extra_scores`, one each; that of `score` is 1."""
    rate_semantic: tuple[str, ...]
    """Questions that the holistic score rates for semantic consistency; {prompt} is filled in."""
    rate_quality: tuple[str, ...]
    """Questions that the holistic score rates for perceptual quality."""
    dependencies: bool
    """Count a question only if the questions that it depends on hold."""
    format_weight: float = Field(ge=0.0, le=100.0)
    """Weight of the format reward (0 or 1) that is added for the form of the think text, in tasks
    that say so: all that think but srr."""
    isolate: bool
    """Count the texts' form for the text steps alone, whatever the task: their reward is the
    image's plus half the mean of the format terms, the think text's and a judged reflection's."""
    max_invalid_fraction: float = Field(ge=0.0, le=1.0)
    """Largest share of an update's samples without a reward; above it the run stops."""

    @property
    def scores(self) -> tuple[str, ...]:
        """All scores that the reward is made of, as they are configured."""
        return (self.score, *self.extra_scores)

    @property
    def judged(self) -> tuple[str, ...]:
        """Those of `scores` that are made of the verifier's answers and ratings."""
        return tuple(text for text in self.scores if score_specs.parse(text) is None)

    @property
    def scorers(self) -> tuple[score_specs.ScorerSpec, ...]:
        """Those of `scores` that scorers make."""
        return tuple(spec for spec in map(score_specs.parse, self.scores) if spec is not None)


@dataclass(config=SECTION, frozen=True, kw_only=True)
class DataOptions:
    """The files of prompts, edits and questions."""

    train: str
    """JSONL file of training prompts, or package:NAME for one that is shipped."""
    heldout: str
    """JSONL file of held-out prompts."""
    edit_train: str
    """JSONL file of training edits (task ti2i); "" where the task is not trained."""
    edit_heldout: str
    """JSONL file of held-out edits."""
    answer_train: str
    """JSONL file of training questions about images (task ti2t); "" where it is not trained."""
    answer_heldout: str
    """JSONL file of held-out questions about images."""

    def pair(self, kind: str) -> tuple[str, str]:
        """Returns the training and the held-out file of a kind of data, see `tasks.Task.data`."""
        pairs = {
            "prompts": (self.train, self.heldout),
            "edits": (self.edit_train, self.edit_heldout),
            "answers": (self.answer_train, self.answer_heldout),
        }
        return pairs[kind]


@dataclass(config=SECTION, frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance: how the velocities of three contexts are combined.

    A branch whose scale is at most 1 is not evaluated; `text_scale <= 1` turns all guidance off.
    """

    text_scale: float
    """Scale of the guidance away from the context without the text; at most 1 is off."""
    image_scale: float
    """Scale of the guidance away from the context without the image; at most 1 is off."""
    interval: Annotated[tuple[float, float], AfterValidator(_check_interval)]
    """Noise levels (lo, hi] between which guidance is on."""
    renorm: Literal["global", "channel", "text_channel"]
    """Over what the guided velocity is scaled back to the length of the unguided one: the whole
    image, each latent token, or each latent token before image guidance is added."""
    renorm_min: float
    """Smallest factor of that scaling."""

    @property
    def uses_text(self) -> bool:
        """True where the text-dropped branch is evaluated at all."""
        return self.text_scale > 1.0

    @property
    def uses_image(self) -> bool:
        """True where the image-dropped branch is evaluated at all."""
        return self.uses_text and self.image_scale > 1.0


@dataclass(config=SECTION, frozen=True, kw_only=True)
class ImageOptions:
    """Sampling of an image."""

    num_points: int = Field(ge=2, le=1000)
    """Noise levels of the schedule, one more than velocity evaluations."""
    shift: float = Field(ge=1e-3, le=1e3)
    """Shift of the schedule; above 1 spends more steps at high noise."""
    window: int = Field(ge=1, le=999)
    """Number of stochastic sampling steps, which are the trained ones."""
    window_range: tuple[int, int]
    """Steps (lo, hi): the trained steps, or levels with sampler "ode", lie within lo .. hi - 1."""
    noise_level: float = Field(ge=1e-6, le=100.0)
    """Noise of a stochastic step, the factor a of Flow-SDE and Flow-CPS."""
    sampler: Literal["sde", "cps", "ode"]
    """Kind of the stochastic steps: Flow-SDE or Flow-CPS. With "ode" none is stochastic: the
    finished image is noised again at `window` levels of `window_range`, drawn for each image, which
    are the trained steps."""
    guidance: Guidance
    """Guidance of images that are made from a text alone."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class RolloutOptions(ImageOptions):
    """Sampling of trajectories in training."""

    prompt_tokens: int = Field(ge=3, le=1 << 20)
    """Tokens to which prompts are padded, the two delimiters included; longer ones are refused."""
    text_tokens: int = Field(ge=1, le=1 << 20)
    """Most new tokens of a think text, the closing delimiter included."""
    shared_noise: bool
    """Start the images of a group from the same noise."""
    temperature: float = Field(ge=1e-6, le=100.0)
    """Temperature of the texts' tokens."""
    top_p: float = Field(ge=1e-6, le=1.0)
    """Probability mass of the likeliest tokens that texts are sampled from."""
    micro_batch: int = Field(ge=1, le=1 << 20)
    """Most images of a micro-batch, over all devices; each device has at least one. Where a CPU is
    the only device, up to three micro-batches are computed at the same time."""
    length_buckets: int = Field(ge=1, le=64)
    """Number of lengths to one of which prompts and texts of a batch are cut; functions compile
    once per length."""
    merge_lora: bool
    """Fold the adapters into a copy of the weights while sampling."""
    edit_guidance: Guidance
    """Guidance of images that are made behind another: edits and refinements."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class SrrOptions:
    """Self-reflective refinement: where the images come from that the policy repairs."""

    source: Literal["drawn", "record"]
    """Source of initial images: sampled by the policy, or the records' own."""
    initial_images: int = Field(ge=1, le=1 << 20)
    """Initial images that are sampled per prompt."""
    queue_prompts: int = Field(ge=1, le=1 << 20)
    """Prompts whose initial images are sampled and scored together."""
    num_points: int = Field(ge=2, le=1000)
    """Noise levels of the schedule of initial images."""
    text_tokens: int = Field(ge=1, le=1 << 20)
    """Most new tokens of a reflection, the closing delimiter included."""
    choice: InitialChoice
    """Choice of the initial image to repair: that of the lowest reward, or one sampled by
    softmax(1 - reward)."""
    rectification: Rectification
    """Reward of a refinement that is no better than its initial image: that of the initial image
    ("released"), the group's lowest ("paper"), or its own ("none")."""
    reflection_format: Literal["none", "rule", "verifier"]
    """Judge of the form of a reflection: nobody, the rule of the shapes world, or the verifier. The
    form is part of the texts' reward with `reward.isolate`, else a metric."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class MixedOptions:
    """The tasks that a run of task "mixed" trains."""

    tasks: tuple[str, ...]
    """Names of the tasks."""
    weights: tuple[Annotated[float, Field(gt=0.0)], ...]
    """Relative frequency of each task's batches."""
    batches: int = Field(ge=1, le=1000)
    """Batches per update, each of one task."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class PassOptions:
    """Ways to compute the passes of an update: the same numbers but for their last bits."""

    text_chunk: int = Field(ge=0, le=1 << 20)
    """Slots of a text that an update computes at once; chunks behind the longest text of a
    micro-batch are left out. Each chunk but the first keeps its own copy of the weights and of the
    context for the backward pass. 0: all slots at once."""
    image_steps_at_once: bool
    """Compute all stochastic steps of an image in one pass of an update, which needs the memory of
    all; else one after the other."""
    merge_lora: bool
    """Add the adapters to the weights before the passes of an update, and take their gradient from
    that of the weights: fewer and larger products. Not where weights are bfloat16, which would
    round the adapters, or where the sums, and gradients of whole matrices, have no room."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class TrainOptions(PassOptions):
    """Size and number of the updates, and what they train."""

    steps: int = Field(ge=0, le=1 << 40)
    """Number of updates; 0 only evaluates."""
    prompts_per_step: int = Field(ge=1, le=1 << 20)
    """Prompts per batch."""
    group_size: int = Field(ge=2, le=1 << 20)
    """Trajectories per prompt, whose rewards are compared with each other."""
    micro_batch: int = Field(ge=1, le=1 << 20)
    """Trajectories per forward and backward pass; where a CPU is the only device, up to three
    passes run at the same time."""
    updates_per_batch: int = Field(ge=1, le=1000)
    """Optimizer steps per batch of trajectories."""
    trainable: Literal["lora", "full"]
    """Trained part: adapters, or the parameters that `full_targets` names."""
    full_targets: Annotated[str, AfterValidator(_check_pattern)]
    """Regular expression over parameter paths: what "full" trains."""
    old_logprob: Literal["recompute", "self"]
    """Log-probs that the ratio divides by: computed by a pass before the update, or the policy's
    own, exact for one optimizer step per batch."""
    keep_residuals: bool
    """Keep what the backward pass needs from the pass before the update: one forward pass less, and
    the memory of all micro-batches at once. Without effect with `old_logprob` "self"."""
    context_gradient: bool
    """Let the gradient flow through the contexts of the trained steps."""


# Values of `loss.image` that match velocities of finished images.
MATCHING = ("nft", "awm")


@dataclass(config=SECTION, frozen=True, kw_only=True)
class LossOptions:
    """The loss of the text and the image steps."""

    text: Literal["grpo", "remax", "none"]
    """Algorithm of the text steps: clipped ratios ("grpo"), or advantage times log-prob ("remax").
    """
    image: Literal["grpo", "nft", "awm", "remax", "none"]
    """Algorithm of the image steps: on the log-probs of stochastic steps ("grpo", "remax"), or on
    velocities of the finished image, noised again (DiffusionNFT "nft", advantage-weighted matching
    "awm"), which needs rollout.sampler "ode" and the average of optimizer.average_limit."""
    text_loss_weight: float = Field(ge=0.0, le=1e6)
    """Weight of a text step, relative to all stochastic steps of the images behind it together."""
    level: Literal["sequence", "token"]
    """One ratio per text (of its mean log-ratio), or one per token."""
    clip_low: float = Field(ge=0.0, le=1.0)
    """Distance below 1 at which a text's ratio is clipped."""
    clip_high: float = Field(ge=0.0, le=1e6)
    """Distance above 1 at which a text's ratio is clipped."""
    entropy_fraction: float = Field(ge=1e-6, le=1.0)
    """Share of the text tokens that are trained, those of the highest entropy."""
    entropy_mean: Literal["all", "kept"]
    """Tokens over which the text loss is averaged where `entropy_fraction` is below 1: all of them,
    the others with a loss of 0, as released, or those alone that are trained."""
    text_beta: float = Field(ge=0.0, le=1e6)
    """Weight of the texts' KL to the pretrained model."""
    image_clip: float = Field(ge=0.0, le=1.0)
    """Distance from 1 at which an image step's ratio is clipped."""
    advantage_clip: float = Field(ge=1e-6, le=1e6)
    """Largest magnitude of an advantage in the image losses and in "remax" of texts; "awm" divides
    by it."""
    image_beta: float = Field(ge=0.0, le=1e6)
    """Weight of the image steps' KL to the pretrained model; of "nft" and "awm", of the squared
    distance of velocities."""
    nft_beta: float = Field(gt=0.0, le=1e3)
    """Step from the average policy's velocity to the velocities that "nft" matches."""
    awm_clip: float = Field(ge=0.0, le=1e6)
    """Distance from 1 at which the ratio of "awm" is clipped."""
    awm_average_beta: float = Field(ge=0.0, le=1e6)
    """Weight of the squared distance to the average policy's velocities in "awm"."""
    report_kl: bool
    """Compute both KL terms as metrics even where their weight is 0; costs one more pass."""

    @property
    def matches(self) -> bool:
        """True where the image loss matches velocities of finished images."""
        return self.image in MATCHING


@dataclass(config=SECTION, frozen=True, kw_only=True)
class AdvantageOptions:
    """Advantages from rewards: A = (reward - baseline) / scale."""

    std: Literal["global_raw", "global_centered", "group", "none"]
    """Scale: standard deviation of the raw rewards of all samples, of group-centered rewards, or
    per group; "none" does not divide. Without meaning for baseline "anchor"."""
    baseline: Literal["group", "initial", "anchor"]
    """Baseline: mean of the group's rewards, reward of the initial image that the group refines, or
    the larger of the two ("anchor", whose scale is the root mean square of each group's rewards
    around it). With `reward.isolate` texts keep the group's mean."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW, its learning rate and its gradient clipping."""

    learning_rate: float = Field(ge=0.0, le=10.0)
    """Highest learning rate."""
    gen_scale: float = Field(ge=0.0, le=1e6)
    """Learning rate of the image expert, relative to `learning_rate`."""
    b1: float = Field(ge=0.0, le=0.999999)
    """Decay per step of the mean gradient."""
    b2: float = Field(ge=0.0, le=0.999999)
    """Decay per step of the mean squared gradient."""
    eps: float = Field(ge=0.0, le=1.0)
    """Added to the root of the mean squared gradient."""
    weight_decay: float = Field(ge=0.0, le=10.0)
    """Decoupled weight decay per step, times the learning rate."""
    clip_norm: float = Field(ge=1e-6, le=1e9)
    """Largest global norm of the gradient."""
    warmup_steps: int = Field(ge=0, le=1 << 40)
    """Optimizer steps over which the learning rate rises from 0."""
    decay_steps: int = Field(ge=0, le=1 << 40)
    """Optimizer steps after which the learning rate has fallen to 0 linearly; 0: it does not."""
    average_limit: float = Field(ge=0.0, lt=1.0)
    """Largest weight of the past in the moving average of the trained weights, which some image
    losses compare with; 0 keeps no average."""
    average_rate: float = Field(ge=0.0, le=1.0)
    """Weight of the past per optimizer step done, up to `average_limit`."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class EvalOptions:
    """Evaluation on held-out prompts."""

    every: int = Field(ge=0, le=1 << 40)
    """Updates between two evaluations; 0 evaluates at the start and the end only."""
    prompts: int = Field(ge=1, le=1 << 30)
    """Most held-out prompts of an evaluation."""
    micro_batch: int = Field(ge=1, le=1 << 20)
    """Prompts that are sampled at a time."""
    temperature: float = Field(ge=0.0, le=100.0)
    """Temperature of the texts' tokens; 0 takes the likeliest."""
    top_p: float = Field(ge=1e-6, le=1.0)
    """Probability mass of the likeliest tokens that texts are sampled from."""
    num_points: int = Field(ge=2, le=1000)
    """Noise levels of the schedule, one more than velocity evaluations."""
    text_guidance: float
    """Text scale of the guidance of images that are made from a text alone; at most 1 is off."""
    seed: int
    """Seed of the evaluation's noise."""
    checker: Literal["shapes", ""]
    """Exact checker of held-out images: that of the shapes world, whose records have facts, or
    "" for the verifier's reward only."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class CheckpointOptions:
    """Times at which the run's state is saved."""

    every: int = Field(ge=0, le=1 << 40)
    """Updates between two checkpoints; 0 saves at the end only."""
    keep: int = Field(ge=1, le=1 << 20)
    """Newest checkpoints that are kept."""
    stop_seconds: float = Field(ge=0, le=1e6)
    """Seconds from Ctrl-C or SIGTERM on in which the update under way may be finished; then it is
    dropped, the finished ones are saved and the run ends. An evaluation under way ends at once."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class LogOptions:
    """Sample grids, TensorBoard events, W&B and the progress line of a run."""

    samples: int = Field(ge=1, le=4096)
    """Held-out images in a sample grid."""
    tensorboard: bool
    """Write TensorBoard events."""
    wandb: str
    """Project of Weights & Biases that the rows are sent to, too; "" for none."""
    progress: bool
    """Show phases and a progress line on stderr."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class CacheOptions:
    """Compiled programs, which the next start of a run need not compile again."""

    dir: str
    """Folder of compiled programs, which several runs may share; "" for compiled/ in the run's
    folder, or none. The environment variable JAX_COMPILATION_CACHE_DIR wins."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class MeshOptions:
    """Axes of the device mesh; their product is the number of devices, one axis may be -1."""

    data: int
    """Devices over which rows are spread, each with whole weights."""
    fsdp: int
    """Devices over which rows and weights are spread."""
    tensor: int
    """Devices over which the matrices of a layer are spread."""


@dataclass(config=SECTION, frozen=True, kw_only=True)
class Config:
    """Everything a run is; see configs/grpo.py for values."""

    seed: int = Field(ge=0, le=(1 << 32) - 1)
    """Seed of everything random in a run."""
    task: str
    """Name of the task that is trained, or mixed for those of `mixed.tasks`."""
    model: ModelOptions
    lora: LoraOptions
    verifier: VerifierOptions
    reward: RewardOptions
    data: DataOptions
    rollout: RolloutOptions
    srr: SrrOptions
    mixed: MixedOptions
    train: TrainOptions
    loss: LossOptions
    advantage: AdvantageOptions
    optimizer: OptimizerOptions
    eval: EvalOptions
    checkpoint: CheckpointOptions
    log: LogOptions
    cache: CacheOptions
    mesh: MeshOptions

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are trained."""
        return self.mixed.tasks if self.task == "mixed" else (self.task,)

    @property
    def trajectories(self) -> int:
        """B, trajectories per batch."""
        return self.train.prompts_per_step * self.train.group_size


def part_of(options: Any, section: type[Section]) -> Section:
    """Returns the fields that a section inherits from another one, as that one."""
    names = [field.name for field in dataclasses.fields(cast(Any, section))]
    return section(**{name: getattr(options, name) for name in names})
