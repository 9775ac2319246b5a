"""What a policy can be used for: drawing, editing, answering, and refining its own images."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alphagrpo_jax import policy, tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.config_checks import change_options
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.prompts import image_block, start_position
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.workers.pool import PoolError
from alphagrpo_jax.rollout import decode_steps
from alphagrpo_jax.runtime import checkpoint, distributed, sharding
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.errors import InputError, MissingFileError
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.sampling.trajectory import RolloutSpec, sample_trajectories
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import setup
from alphagrpo_jax.training import verifiers as verifiers_lib
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.run_folder import payload, run_config
from alphagrpo_jax.types import ImageBlock, Rollout, TextBlock

KEEP_MODES = ("last", "best", "gated")
BATCH_ROWS = 100  # rows of `run_task` at a time

_rollout = jax.jit(sample_trajectories, static_argnames=("model", "spec"))


class Policy(NamedTuple):
    """A policy, and what it came from."""

    config: Config
    loaded: Loaded
    params: policy.PolicyParams
    step: int  # updates done; 0 without a checkpoint


def from_config(config: Config) -> Policy:
    """The pretrained policy of a configuration, on one device."""
    loaded = setup.load_policy(config, _one_device())
    return Policy(config, loaded, policy.PolicyParams(loaded.base), 0)


def from_run(folder: str | pathlib.Path, *, model_path: str | None = None) -> Policy:
    """The policy of a run's newest checkpoint, on one device.

    Args:
      folder: the run's.
      model_path: where the pretrained model lies now; None: where the run found it.
    Raises:
      FileNotFoundError: the folder is not a run's, or has no checkpoint yet.
      CheckpointError: the checkpoint cannot be read.
    """
    config = run_config(folder)
    if model_path is not None:
        config = change_options(config, {"model.path": model_path})
    mesh = _one_device()
    loaded = setup.load_policy(config, mesh)
    state = setup.initial_state(config, loaded.base, make_optimizer(config.optimizer), mesh)
    saves = checkpoint.Checkpoints(folder, keep=config.checkpoint.keep)
    step = saves.latest()
    if step is None:
        raise MissingFileError(f"the run in {folder} has no complete checkpoint yet")
    trainable = saves.state(step, payload(state, start_position(config)))["trainable"]
    saves.close()
    params = gradient_lib.policy_params(
        loaded.base, trainable, lora_scale=options_lib.lora_scale(config)
    )
    return Policy(config, loaded, params, step)


def _one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, 1, jax.devices()[:1])


class TaskOutput(NamedTuple):
    """What a task's steps made of N inputs."""

    images: np.ndarray | None  # uint8[N, H, W, 3], of the last image step if there is one
    texts: list[list[str]]  # of each text step


class GeneratedImages(NamedTuple):
    """N images of one prompt."""

    images: np.ndarray  # uint8[N, H, W, 3]
    texts: list[str]  # think texts; empty without thinking


class Round(NamedTuple):
    """An image of a refinement, and the text before it."""

    image: np.ndarray  # uint8[H, W, 3]
    text: str  # reflection; of round 0 the think text, if any
    reward: float | None = None  # DVReward; None where no verifier was asked, or none answered
    kept: bool = False  # whether it is the one to keep, of the rounds so far


def generate_images(
    policy: Policy, prompt: str, *, think: bool, count: int, seed: int
) -> GeneratedImages:
    """Draws `count` images of a prompt.

    Args:
      policy: who draws; sampling is that of its configuration's `eval` section.
      prompt: of any length that the model takes.
      think: whether a think text comes before each image.
      count: N.
      seed: the same seed draws the same images, and the first of many as the only one.
    """
    return _sample_one_prompt(
        policy, "rt2i" if think else "t2i", prompt, None, count=count, seed=seed
    )


def edit_image(
    policy: Policy, image: Image.Image, wish: str, *, count: int, seed: int
) -> GeneratedImages:
    """Changes an image `count` times, each after a think text; see `generate_images`.

    The result has the size that the VAE's transform gives the image.
    """
    return _sample_one_prompt(policy, "ti2i", wish, image, count=count, seed=seed)


def answer_question(
    policy: Policy, image: Image.Image, question: str, *, seed: int
) -> tuple[str, str]:
    """The think text and the answer to a question about an image; see `generate_images`."""
    texts = _sample_texts(policy, "ti2t", question, image, seed=seed)
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
) -> Iterator[Round]:
    """Draws an image, then `rounds` times looks at it, says what is wrong and draws it anew.

    Gives every round as soon as it is done, the first image being round 0. The last one that is
    marked as kept is the result.

    Args:
      policy: who draws.
      prompt: what was asked for.
      rounds: how often.
      keep: "last": every round goes on from the one before, the last one is kept; "best": the
        same, but the one that the verifier rates highest is kept (the first of equals); "gated":
        a round goes on from the best so far, and replaces it only if it is rated higher.
      think: whether a think text comes before the first image.
      record: questions about the prompt; needed unless `keep` is "last".
      image: the first image; None: it is drawn.
      seed: of the noise.
    Raises:
      ValueError: unknown `keep`, no record where one is needed, or the verifier gave no answer;
        then the round that it was asked about comes first, without a reward.
      PoolError: the same, where there is no verifier left.
    """
    if keep not in KEEP_MODES:
        raise ValueError(f"got keep={keep!r}, expected one of {KEEP_MODES}")
    if keep != "last" and record is None:
        raise ValueError(f"keep={keep!r} needs a verifier and a record with questions for it")
    judge = None if keep == "last" else _RewardModel(policy, record)
    try:
        current = best = None
        for number in range(rounds + 1):
            if current is None:
                new = _first_round(policy, prompt, image, think=think, seed=seed)
            else:
                shown = Image.fromarray(current.image)
                drawn = _sample_one_prompt(
                    policy, "srr", prompt, shown, count=1, seed=seed + number
                )
                new = Round(drawn.images[0], drawn.texts[0])
            if judge:
                try:
                    new = new._replace(reward=judge(new.image))
                except (ValueError, PoolError):
                    yield new
                    raise
            new = new._replace(kept=judge is None or best is None or new.reward > best.reward)
            best = new if new.kept else best
            current = best if keep == "gated" else new
            yield new
    finally:
        if judge:
            judge.close()


def _first_round(
    policy: Policy, prompt: str, image: Image.Image | None, *, think: bool, seed: int
) -> Round:
    if image is not None:
        pixels, _ = _encoder_images(policy.loaded, image)
        return Round(pixels, "(given)")
    drawn = generate_images(policy, prompt, think=think, count=1, seed=seed)
    return Round(drawn.images[0], drawn.texts[0] if think else "")


def run_task(
    policy: Policy,
    task: tasks.Task,
    asked: Sequence[str],
    images: np.ndarray | None = None,
    *,
    seed: int,
    temperature: float,
    batch: int = BATCH_ROWS,
) -> TaskOutput:
    """Runs a task once for each of N inputs, in batches; for measurements.

    Args:
      policy: who does it; sampling of images is that of its configuration's `eval` section.
      task: one text input, and one image input or none.
      asked: what fills the task's text template, N.
      images: uint8[N, H, W, 3], of the configuration's size.
      seed: a row's result depends on it, the row's number and its input alone.
      temperature: of texts; 0 is greedy.
      batch: rows at a time; a smaller last batch is filled up.
    """
    config, loaded = policy.config, policy.loaded
    spec = options_lib.eval_spec(config, loaded, task)
    rows = [loaded.tokenizer.wrap(task.texts[0].format(prompt=text)) for text in asked]
    tokens, mask = loaded.tokenizer.batch(rows, max(map(len, rows)))
    drawn, texts = [], [[] for _ in spec.plan.text_steps]
    size = min(batch, len(rows))
    for first in range(0, len(rows), size):
        at = np.arange(first, first + size) % len(rows)
        block = TextBlock(tokens[at], mask[at])
        shown = None if images is None else image_block(loaded, images[at])
        inputs = tuple(block if kind == tasks.TEXT else shown for kind in task.inputs)
        trajectories, made = _sample(
            policy, spec, inputs, seed=seed, first=first, temperature=temperature
        )
        count = min(size, len(rows) - first)
        if made is not None:
            drawn.append(distributed.to_host(made)[:count])
        for mine, new in zip(texts, decode_steps(loaded.tokenizer, trajectories), strict=True):
            mine += new[:count]
    return TaskOutput(np.concatenate(drawn) if drawn else None, texts)


class _RewardModel:
    """The configured verifier, asked about one image at a time."""

    def __init__(self, policy: Policy, record: Record) -> None:
        config = change_options(policy.config, {"verifier.workers": 1})
        self.record, self.asked = record, 0
        self.options = options_lib.scoring_options(config, tasks.TASKS["t2i"])
        self.pool = verifiers_lib.make_pool(config)
        try:
            self.pool.wait_ready()
        except BaseException:
            self.pool.close()
            raise

    def __call__(self, image: np.ndarray) -> float:
        self.asked += 1
        ids, records = [("round", self.asked)], [self.record]
        scoring.submit(self.pool, ids, image[None], records, self.options, first=0)
        scores = scoring.gather(self.pool, ids, records, (), self.options)
        if not scores.valid[0]:
            raise InputError(f"the verifier gave no answer: {', '.join(scores.failures)}")
        return float(scores.reward[0])

    def close(self) -> None:
        self.pool.close()


def _sample_one_prompt(
    policy: Policy, name: str, text: str, image: Image.Image | None, *, count: int, seed: int
) -> GeneratedImages:
    spec, inputs = _prompt_inputs(policy, name, text, image, count=count)
    trajectories, images = _sample(
        policy, spec, inputs, seed=seed, temperature=policy.config.eval.temperature
    )
    texts = decode_steps(policy.loaded.tokenizer, trajectories)
    return GeneratedImages(np.asarray(images), texts[0] if texts else [])


def _sample_texts(
    policy: Policy, name: str, text: str, image: Image.Image, *, seed: int
) -> list[list[str]]:
    spec, inputs = _prompt_inputs(policy, name, text, image, count=1)
    trajectories, _ = _sample(
        policy, spec, inputs, seed=seed, temperature=policy.config.eval.temperature
    )
    return decode_steps(policy.loaded.tokenizer, trajectories)


def _prompt_inputs(
    policy: Policy, name: str, text: str, image: Image.Image | None, *, count: int
) -> tuple[RolloutSpec, tuple[TextBlock | ImageBlock, ...]]:
    """What to compile, and the inputs of one prompt."""
    loaded, task = policy.loaded, tasks.TASKS[name]
    spec = options_lib.eval_spec(policy.config, loaded, task)
    spec = dataclasses.replace(spec, rows_per_prompt=count)
    row = loaded.tokenizer.wrap(task.texts[0].format(prompt=text))
    tokens, mask = loaded.tokenizer.batch([row], len(row))
    block = TextBlock(jnp.asarray(tokens), jnp.asarray(mask))
    if image is None:
        return spec, (block,)
    pixels, seen = _encoder_images(loaded, image)
    grid = loaded.config.latent_grid(*pixels.shape[:2])
    shown = ImageBlock(jnp.asarray(pixels[None]), jnp.asarray(seen[None]))
    blocks = tuple(block if kind == tasks.TEXT else shown for kind in task.inputs)
    return dataclasses.replace(spec, grid=grid), blocks


def _encoder_images(loaded: Loaded, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
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
    return _rollout(
        policy.loaded.model,
        policy.params,
        inputs,
        jax.random.key(seed),
        jnp.int32(first),
        jnp.int32(spec.options.num_points),  # no stochastic step
        jnp.float32(temperature),
        spec=spec,
    )
