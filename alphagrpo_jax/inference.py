"""Loads a policy: the config's pretrained model or a run's latest checkpoint; and samples from it.

Generates images of a prompt, edits images, answers questions about them, and refines its own.
"""

import dataclasses
import pathlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alphagrpo_jax import policy, tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.config_checks import change_options
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.prompts import image_block, start_position
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rollout import decode_steps
from alphagrpo_jax.runtime import distributed, sharding
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.errors import InputError, UserError
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.runtime.texts import is_writable
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.sampling.trajectory import RolloutSpec, sample_trajectories
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import setup
from alphagrpo_jax.training import verifiers as verifiers_lib
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.run_folder import newest_arrays, payload, run_config
from alphagrpo_jax.types import ImageBlock, Rollout, TextBlock

KEEP_MODES = ("last", "best", "gated")
BATCH_ROWS = 100  # of `run_task`
REFINEMENT = dataclasses.replace(tasks.TASKS["srr"], texts=(tasks.GENERATE_REFLECTION_REQUEST,))

_sample_trajectories = jax.jit(sample_trajectories, static_argnames=("model", "spec"))


class Policy(NamedTuple):
    """A model with its parameters, and the configuration that it samples with."""

    config: Config
    loaded: LoadedModel
    params: policy.PolicyParams
    step: int  # updates done; 0 without a checkpoint


def from_config(config: Config) -> Policy:
    """Loads the pretrained policy of a configuration, on one device."""
    loaded = setup.load_policy(config, _one_device())
    return Policy(config, loaded, policy.PolicyParams(loaded.base), 0)


def from_run(folder: str | pathlib.Path, *, model_path: str | None = None) -> Policy:
    """Loads the policy of a run's newest checkpoint, on one device.

    Args:
      folder: of the run.
      model_path: of the pretrained model, if it has moved since the run; None: as in the run.
    Raises:
      MissingFileError: the folder is not a run's, or has no checkpoint yet.
      CheckpointError: the checkpoint cannot be read.
    """
    config = run_config(folder)
    if model_path is not None:
        config = change_options(config, {"model.path": model_path})
    mesh = _one_device()
    loaded = setup.load_policy(config, mesh)
    state = setup.initial_state(config, loaded.base, make_optimizer(config.optimizer), mesh)
    arrays, step = newest_arrays(folder, config, payload(state, start_position(config)))
    params = gradient_lib.policy_params(
        loaded.base, arrays["trainable"], lora_scale=options_lib.lora_scale(config)
    )
    return Policy(config, loaded, params, step)


def _one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, 1, jax.devices()[:1])


class TaskOutput(NamedTuple):
    """Images and texts that a task's steps generate for N inputs."""

    images: np.ndarray | None  # uint8[N, H, W, 3], of the last image step if there is one
    texts: list[list[str]]  # of each text step


class GeneratedImages(NamedTuple):
    """N images of one prompt."""

    images: np.ndarray  # uint8[N, H, W, 3]
    texts: list[str]  # think texts; empty without thinking


class Round(NamedTuple):
    """One image of a refinement, and the text before it."""

    image: np.ndarray  # uint8[H, W, 3]
    text: str  # reflection; of round 0 the think text, if any
    reward: float | None = None  # DVReward; None without a verifier or without its answer
    is_kept: bool = False  # the best of the rounds so far, by the mode of keeping


def generate_images(
    policy: Policy, prompt: str, *, think: bool, count: int, seed: int
) -> GeneratedImages:
    """Generates `count` images of a prompt.

    Args:
      policy: samples as its configuration's `eval` section says.
      prompt: of any length that the model takes.
      think: samples a think text before each image.
      count: N.
      seed: the same seed gives the same images, and the first of many is the only one of one.
    """
    task = tasks.TASKS["rt2i" if think else "t2i"]
    return _sample_prompt(policy, task, prompt, None, count=count, seed=seed)


def edit_image(
    policy: Policy, image: Image.Image, wish: str, *, count: int, seed: int
) -> GeneratedImages:
    """Edits an image `count` times, each after a think text; see `generate_images`.

    The result has the size that the VAE's transform gives the image.
    """
    return _sample_prompt(policy, tasks.TASKS["ti2i"], wish, image, count=count, seed=seed)


def answer_question(
    policy: Policy, image: Image.Image, question: str, *, seed: int
) -> tuple[str, str]:
    """Returns the think text and the answer to a question about an image."""
    texts = _sample_texts(policy, tasks.TASKS["ti2t"], question, image, seed=seed)
    return texts[0][0], texts[1][0]


def refine(
    policy: Policy,
    prompt: str,
    *,
    rounds: int,
    keep: str,
    think: bool,
    record: Record | None,
    image: Image.Image | None,
    seed: int,
) -> Generator[Round, None, None]:
    """Generates an image, then `rounds` times reflects on it and generates it anew.

    Yields every round as soon as it is done; round 0 is the first image. The last round that is
    marked as kept is the result.

    Args:
      policy: generates the images and reflects on them.
      prompt: of the image.
      rounds: of reflection.
      keep: "last": every round refines the one before, the last one is kept; "best": the same, but
        the one that the verifier rates highest is kept (the first of equals); "gated": a round
        refines the best so far, and replaces it only if it is rated higher.
      think: samples a think text before the first image.
      record: questions about the prompt; needed unless `keep` is "last".
      image: the first image; None: it is generated.
      seed: of the noise.
    Raises:
      ValueError: unknown `keep`, or no record where one is needed.
      InputError: the verifier gave no answer; the round in question is yielded first, without a
        reward.
      PoolError: the same, where no verifier is left.
    """
    if keep not in KEEP_MODES:
        raise ValueError(f"got keep={keep!r}, expected one of {KEEP_MODES}")
    if keep != "last" and record is None:
        raise ValueError(f"keep={keep!r} needs a verifier and a record with questions for it")
    rater = None if keep == "last" or record is None else _ImageRater(policy, record)
    try:
        current = best = None
        for number in range(rounds + 1):
            if current is None:
                new = _first_round(policy, prompt, image, think=think, seed=seed)
            else:
                previous = Image.fromarray(current.image)
                refined = _sample_prompt(
                    policy, REFINEMENT, prompt, previous, count=1, seed=seed + number
                )
                new = Round(refined.images[0], refined.texts[0])
            if rater:
                try:
                    new = new._replace(reward=rater(new.image))
                except UserError:
                    yield new  # its image is finished and costs nothing more
                    raise
            # With a rater every round has a reward.
            is_best = rater is None or best is None or new.reward > best.reward  # pyright: ignore[reportOperatorIssue]
            new = new._replace(is_kept=is_best)
            best = new if is_best else best
            current = best if keep == "gated" else new
            yield new
    finally:
        if rater:
            rater.close()


def _first_round(
    policy: Policy, prompt: str, image: Image.Image | None, *, think: bool, seed: int
) -> Round:
    if image is not None:
        pixels, _ = _encoder_images(policy.loaded, image)
        return Round(pixels, "(given)")
    generated = generate_images(policy, prompt, think=think, count=1, seed=seed)
    return Round(generated.images[0], generated.texts[0] if think else "")


def run_task(
    policy: Policy,
    task: tasks.Task,
    text_inputs: Sequence[str],
    images: np.ndarray | None = None,
    *,
    seed: int,
    temperature: float,
    batch: int = BATCH_ROWS,
) -> TaskOutput:
    """Runs a task once for each of N inputs, in batches; for measurements.

    Args:
      policy: samples images as its configuration's `eval` section says.
      task: has one text input, and one image input or none.
      text_inputs: N texts for the task's text template.
      images: uint8[N, H, W, 3], of the configuration's size.
      seed: a row's output depends on it, the row's number and its input alone.
      temperature: of texts; 0 is greedy.
      batch: rows per call; a smaller last batch is filled up, so that one program serves all.
    """
    config, loaded = policy.config, policy.loaded
    spec = one_shard(options_lib.eval_spec(config, loaded, task))
    for text in text_inputs:
        check_text(text, loaded.tokenizer)
    rows = [loaded.tokenizer.wrap(task.texts[0].format(prompt=text)) for text in text_inputs]
    tokens, mask = loaded.tokenizer.batch(rows, max(map(len, rows)))
    image_batches, texts = [], [[] for _ in spec.plan.text_steps]
    size = min(batch, len(rows))
    for first in range(0, len(rows), size):
        batch_rows = np.arange(first, first + size) % len(rows)
        text = TextBlock.from_host(tokens[batch_rows], mask[batch_rows])
        image = None if images is None else image_block(loaded, images[batch_rows])
        # `task.inputs` names an image only where `images` were passed.
        inputs: Any = tuple(text if kind == tasks.TEXT else image for kind in task.inputs)
        trajectories, generated = _sample(
            policy, spec, inputs, seed=seed, first=first, temperature=temperature
        )
        count = min(size, len(rows) - first)
        if generated is not None:
            image_batches.append(distributed.to_host(generated)[:count])
        new_texts = decode_steps(loaded.tokenizer, trajectories)
        for step_texts, new_step_texts in zip(texts, new_texts, strict=True):
            step_texts += new_step_texts[:count]
    return TaskOutput(np.concatenate(image_batches) if image_batches else None, texts)


def one_shard(spec: RolloutSpec) -> RolloutSpec:
    """Returns the spec for one device, whatever mesh the run has that it comes from."""
    return dataclasses.replace(spec, shards=1)


class _ImageRater:
    """Rates one image at a time by the configured verifier."""

    def __init__(self, policy: Policy, record: Record) -> None:
        config = change_options(policy.config, {"verifier.workers": 1})
        self.record, self.images_rated = record, 0
        self.options = options_lib.scoring_options(config, tasks.TASKS["t2i"])
        self.pool = verifiers_lib.make_pool(config)
        try:
            self.pool.wait_ready()
        except BaseException:
            self.pool.close()
            raise

    def __call__(self, image: np.ndarray) -> float:
        self.images_rated += 1
        ids, records = [("round", self.images_rated)], [self.record]
        scoring.submit(self.pool, ids, image[None], records, self.options)
        rewards = scoring.gather(self.pool, ids, records, (), self.options)
        if not rewards.valid[0]:
            raise InputError(f"the verifier gave no answer: {', '.join(rewards.failures)}")
        return float(rewards.reward[0])

    def close(self) -> None:
        self.pool.close()


def _sample_prompt(
    policy: Policy,
    task: tasks.Task,
    text: str,
    image: Image.Image | None,
    *,
    count: int,
    seed: int,
) -> GeneratedImages:
    spec, inputs = _prompt_inputs(policy, task, text, image, count=count)
    trajectories, images = _sample(
        policy, spec, inputs, seed=seed, temperature=policy.config.eval.temperature
    )
    texts = decode_steps(policy.loaded.tokenizer, trajectories)
    return GeneratedImages(np.asarray(images), texts[0] if texts else [])


def _sample_texts(
    policy: Policy, task: tasks.Task, text: str, image: Image.Image, *, seed: int
) -> list[list[str]]:
    spec, inputs = _prompt_inputs(policy, task, text, image, count=1)
    trajectories, _ = _sample(
        policy, spec, inputs, seed=seed, temperature=policy.config.eval.temperature
    )
    return decode_steps(policy.loaded.tokenizer, trajectories)


def check_text(text: str, tokenizer: Tokenizer) -> None:
    """Checks a prompt, a wish or a question to the policy.

    Raises:
      InputError: it is empty, UTF-8 cannot hold it, or it holds a special token of the policy.
    """
    if not text.strip():
        raise InputError(f"got the text {text!r}, expected one that is not empty")
    if not is_writable(text):
        raise InputError(
            f"got the text {text!r}, which holds bytes or half of a character that UTF-8 cannot "
            "hold; write the whole character"
        )
    if tokens := tokenizer.control_tokens(text):
        raise InputError(
            f"got the control tokens {tokens} in the text {text!r}, which the policy reads as ends "
            "of turns or images; expected plain text: take them out"
        )


def _prompt_inputs(
    policy: Policy, task: tasks.Task, text: str, image: Image.Image | None, *, count: int
) -> tuple[RolloutSpec, tuple[TextBlock | ImageBlock, ...]]:
    """Returns the spec of a rollout of `count` rows, and the inputs of one prompt."""
    loaded = policy.loaded
    check_text(text, loaded.tokenizer)
    spec = options_lib.eval_spec(policy.config, loaded, task)
    spec = dataclasses.replace(one_shard(spec), rows_per_prompt=count)
    row = loaded.tokenizer.wrap(task.texts[0].format(prompt=text))
    tokens, mask = loaded.tokenizer.batch([row], len(row))
    text_block = TextBlock(jnp.asarray(tokens), jnp.asarray(mask))
    if image is None:
        return spec, (text_block,)
    vae_pixels, vit_pixels = _encoder_images(loaded, image)
    grid = loaded.config.latent_grid(*vae_pixels.shape[:2])
    input_image = ImageBlock(jnp.asarray(vae_pixels[None]), jnp.asarray(vit_pixels[None]))
    inputs = tuple(text_block if kind == tasks.TEXT else input_image for kind in task.inputs)
    return dataclasses.replace(spec, grid=grid), inputs


def _encoder_images(loaded: LoadedModel, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image as the VAE and the ViT take it, each uint8[H, W, 3] of its own size."""
    return images_lib.both_sizes(image, loaded.config.vae_transform, loaded.config.vit_transform)


def _sample(
    policy: Policy,
    spec: RolloutSpec,
    inputs: tuple[TextBlock | ImageBlock, ...],
    *,
    seed: int,
    temperature: float,
    first: int = 0,
) -> tuple[Rollout, jax.Array | None]:
    trajectories, images = _sample_trajectories(
        policy.loaded.model,
        policy.params,
        inputs,
        jax.random.key(seed),
        jnp.int32(first),
        jnp.int32(spec.options.num_points),  # no stochastic step
        jnp.float32(temperature),
        spec=spec,
    )
    _check_finite(trajectories)
    return trajectories, images


def _check_finite(trajectories: Rollout) -> None:
    """Refuses samples that would show as black images or arbitrary texts.

    Raises:
      InputError: a latent or a log-prob is NaN or infinite.
    """
    arrays = {"the images": [sample.latents for sample in trajectories.images]}
    arrays["the texts' log-probs"] = [sample.log_prob for sample in trajectories.texts]
    for name, samples in arrays.items():
        if not all(bool(jnp.isfinite(sample).all()) for sample in samples):
            raise InputError(
                f"{name} are not finite (NaN or infinite), expected numbers; the weights are "
                "broken (model.path, --checkpoint), or a guidance scale or temperature is extreme: "
                "nothing is written"
            )
