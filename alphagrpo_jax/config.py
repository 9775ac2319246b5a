"""Every field of a configuration, as frozen dataclasses; configs/grpo.py has values for all."""

import dataclasses
import re


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the fix."""


def check_key_name(name: str) -> None:
    """Refuses what cannot be the name of an environment variable that holds a key.

    It may be the key itself, given in the wrong place, so no message shows it.

    Raises:
      ConfigError: `name` is neither "" nor capital letters, digits and underscores.
    """
    if name and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name, re.ASCII):
        raise ConfigError(
            "api_key_env: got no name of an environment variable (it is not shown, for it may be a "
            "key), expected capital letters, digits and underscores, e.g. MY_KEY; export the key "
            "under that name"
        )


@dataclasses.dataclass(frozen=True)
class Model:
    path: str  # a folder, or "package:NAME" for a shipped asset
    dtype: str  # "float32" or "bfloat16"
    remat: str  # what a layer's backward pass recomputes: "none", "dots" or "full"
    height: int  # of a drawn image, pixels
    width: int


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int
    alpha: float  # adapters are scaled by alpha / rank
    targets: str  # regex over layer paths


@dataclasses.dataclass(frozen=True)
class Verifier:
    # "hf", "openai" (endpoints only), "callable": path is then "module:function", or "self": the
    # policy judges its own images
    kind: str
    path: str  # a model folder, ORG/NAME of the Hugging Face hub, or package:NAME
    endpoints: tuple[str, ...]  # of chat servers, "http://HOST:PORT/v1"; () for none
    model: str  # the name that the endpoints serve; it must be the local workers' own model
    api_key_env: str  # environment variable that holds the endpoints' key; "": none
    concurrency: int  # most questions of one image that go to endpoints at once
    question_seconds: float  # for one request to an endpoint
    top_logprobs: int  # candidates of the first token that an endpoint is asked for
    workers: int  # processes; beside them one per endpoint unless kind is "openai"
    threads: int  # per worker, fixed: the same answers whatever the load
    device: str  # of a Hugging Face verifier, "cpu" or "cuda"
    dtype: str  # of its weights, or "auto" for the folder's own
    top_k: int  # candidates of the first token that count; 0: all
    text_fallback: bool  # a text that is exactly yes or no counts as 1 or 0
    attempt_seconds: float  # for one attempt at one image
    total_seconds: float  # after its submission, no further attempt at an image starts
    start_seconds: float  # for starting a worker
    max_attempts: int
    cache_size: int  # answers that are remembered by image and question; 0: none
    # Another verifier, which rates held-out images beside it: its path, or "openai:URL[,URL...]"
    # for endpoints that serve `model`; "" for none.
    second: str
    audit: str  # a file that gets a line for every attempt at an image, "" for none


@dataclasses.dataclass(frozen=True)
class Reward:
    aggregate: str  # "geometric", "mean" or "pooled"
    score: str  # "confidence", "binary" or "holistic" (ratings from 0 to 10)
    extra_scores: tuple[str, ...]  # others of these, averaged with the first
    extra_weights: tuple[float, ...]  # their weights; that of `score` is 1
    rate_semantic: tuple[str, ...]  # what holistic rates; "{prompt}" stands for the prompt
    rate_quality: tuple[str, ...]
    dependencies: bool  # a question counts only if those that it depends on hold
    format_weight: float
    isolate: bool  # the think text's form counts for the text steps alone
    max_invalid_fraction: float  # of an update's samples; above it the run stops


@dataclasses.dataclass(frozen=True)
class Data:
    train: str  # a JSONL file of records, or "package:NAME"
    heldout: str
    edit_train: str  # of task ti2i, "" where it is not trained
    edit_heldout: str
    answer_train: str  # of task ti2t
    answer_heldout: str

    def pair(self, kind: str) -> tuple[str, str]:
        """Training and held-out file of a kind of data, see `tasks.Task.data`."""
        pairs = {
            "prompts": (self.train, self.heldout),
            "edits": (self.edit_train, self.edit_heldout),
            "answers": (self.answer_train, self.answer_heldout),
        }
        return pairs[kind]


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    text_scale: float
    image_scale: float
    interval: tuple[float, ...]  # (lo, hi]: guidance is on while lo < sigma <= hi
    renorm: str
    renorm_min: float


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    prompt_tokens: int  # bucket of a prompt with its two delimiters
    text_tokens: int  # most new tokens of a think text, <|im_end|> included
    num_points: int  # of the schedule: one more than velocity evaluations
    shift: float
    window: int  # stochastic (trained) steps
    window_range: tuple[int, ...]  # (lo, hi): the window lies within steps lo .. hi - 1
    noise_level: float
    sampler: str  # "sde" or "cps"
    shared_noise: bool  # one initial noise per group
    temperature: float
    top_p: float
    micro_batch: int  # trajectories drawn at a time
    merge_lora: bool  # fold the adapters into a copy of the weights while drawing
    guidance: GuidanceOptions
    edit_guidance: GuidanceOptions  # of images drawn behind another: edits and refinements


@dataclasses.dataclass(frozen=True)
class Srr:
    """Self-reflective refinement: where the images come from that the policy repairs."""

    source: str  # "drawn" by the policy, or "record": the records' own images
    initial_images: int  # drawn per prompt
    queue_prompts: int  # prompts whose initial images are drawn and scored at a time
    num_points: int  # of their schedule
    text_tokens: int  # most new tokens of a reflection, <|im_end|> included
    choice: str  # "worst", or "softmax": drawn by softmax(1 - reward)
    rectification: str  # of rewards without improvement: "released", "paper" or "none"
    reflection_format: str  # "none", "rule" (of the shapes world) or "verifier"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Which tasks a run of task "mixed" trains."""

    tasks: tuple[str, ...]
    weights: tuple[float, ...]  # relative; how often a batch is of each task
    batches: int  # per update, each of one task


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int
    prompts_per_step: int
    group_size: int
    micro_batch: int  # trajectories per forward and backward pass
    updates_per_batch: int
    trainable: str  # "lora" or "full"
    full_targets: str  # regex over parameter paths, for "full"
    old_logprob: str  # "recompute" or "self"
    context_gradient: bool


@dataclasses.dataclass(frozen=True)
class Loss:
    text: str  # "grpo" or "none"
    image: str  # "grpo" or "none"
    text_loss_weight: float
    level: str  # "sequence" or "token"
    clip_low: float
    clip_high: float
    entropy_fraction: float  # share of the tokens, by entropy, that are trained
    text_beta: float
    image_clip: float
    advantage_clip: float
    image_beta: float
    report_kl: bool  # KL to the reference in the metrics, at the price of a pass of its own


@dataclasses.dataclass(frozen=True)
class AdvantageOptions:
    std: str  # "global_raw", "global_centered", "group" or "none"
    baseline: str


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float
    gen_scale: float  # the image expert's learning rate, relative
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup_steps: int
    decay_steps: int  # linear decay to zero ends here; 0: constant


@dataclasses.dataclass(frozen=True)
class Eval:
    every: int  # steps; 0: only at the start and the end
    prompts: int
    micro_batch: int
    temperature: float
    top_p: float
    num_points: int
    text_guidance: float
    seed: int
    checker: str  # "shapes" (records with facts) or "" (verifier's reward only)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class Log:
    samples: int  # held-out images in a sample grid
    tensorboard: bool
    progress: bool


@dataclasses.dataclass(frozen=True)
class MeshShape:
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is; see configs/grpo.py for values."""

    seed: int
    task: str
    model: Model
    lora: Lora
    verifier: Verifier
    reward: Reward
    data: Data
    rollout: RolloutOptions
    srr: Srr
    mixed: Mixed
    train: Train
    loss: Loss
    advantage: AdvantageOptions
    optimizer: Optimizer
    eval: Eval
    checkpoint: Checkpoint
    log: Log
    mesh: MeshShape

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that are trained."""
        return self.mixed.tasks if self.task == "mixed" else (self.task,)

    @property
    def trajectories(self) -> int:
        """B, trajectories per batch."""
        return self.train.prompts_per_step * self.train.group_size
