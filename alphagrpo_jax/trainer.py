"""What the first four calls of `train.main` do: prompts, rollout, reward, advantage."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from alphagrpo_jax import prompts, tasks
from alphagrpo_jax.advantage import Advantages, group_advantage
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.refinement import Queue, choose_initial, rectify
from alphagrpo_jax.rewards import formats, scoring
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.checks import TrainingError, check_validity
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.types import ImageBlock, Rollout, TextBlock, TextSample, TrainState

TASK_STREAM, CHOICE_STREAM = 1, 2  # host-side random numbers, beside the data order's


@dataclasses.dataclass
class Place:
    """How far a run has come in its data; part of a checkpoint."""

    positions: dict[str, int]  # prompts taken so far, by task
    queue: Queue | None  # initial images that task srr has yet to repair


class Batch(NamedTuple):
    """P prompts of one task, and what is given beside them."""

    number: int  # in the update
    task: tasks.Task
    rows: np.ndarray  # int64[P], into the task's training prompts
    images: np.ndarray | None  # uint8[P, Hpx, Wpx, 3]
    initial: Queue | None  # rewards of the images to be repaired


class Drawn(NamedTuple):
    """The trajectories of one batch, their images under way to the verifiers."""

    batch: Batch
    trajectories: Rollout
    records: list[Record]  # one per trajectory
    ids: list[tuple[int, int, int]]  # of the samples in the pool
    texts: list[list[str]]  # what each text step wrote
    text_metrics: dict[str, float]

    @property
    def thinks(self) -> list[list[str]]:
        """What each think step wrote."""
        return think_texts(self.batch.task, self.texts)


def think_texts(task: tasks.Task, texts: Sequence[list[str]]) -> list[list[str]]:
    """Of what each text step wrote, the think steps'."""
    return [own for own, kind in zip(texts, task.text_kinds, strict=True) if kind == tasks.THINK]


class Scored(NamedTuple):
    """Advantages of one batch."""

    text: Advantages
    image: np.ndarray  # float32[P, G]
    metrics: dict[str, float]
    left_out: bool = False  # nothing improved: the batch is no part of the update


# ------------------------------------------------------------------------------ 1 prompts


def start_place(config: Config) -> Place:
    """The place before the first step."""
    queue = None
    if any(tasks.TASKS[name].refines for name in config.tasks):
        capacity = config.srr.queue_prompts + config.train.prompts_per_step
        queue = Queue.empty(capacity, config.model.height, config.model.width)
    return Place(dict.fromkeys(config.tasks, 0), queue)


def tasks_at(config: Config, step: int) -> list[tasks.Task]:
    """The tasks of the batches of an update, drawn by weight."""
    if config.task != "mixed":
        return [tasks.TASKS[config.task]]
    weights = np.array(config.mixed.weights)
    rng = np.random.default_rng([config.seed, TASK_STREAM, step])
    drawn = rng.choice(len(weights), config.mixed.batches, p=weights / weights.sum())
    return [tasks.TASKS[config.mixed.tasks[index]] for index in drawn]


def take_batches(run: Run, state: TrainState, step: int, place: Place) -> list[Batch]:
    """Stage 1: the prompts of an update; moves `place` on.

    Task srr takes them from the queue of initial images, which is filled when it runs short.

    Raises:
      TrainingError: the verifiers failed too often on initial images.
    """
    config, batches = run.config, []
    count = config.train.prompts_per_step
    for number, task in enumerate(tasks_at(config, step)):
        if task.refines:
            while place.queue.count < count:
                fill_queue(run, state, step, place, task.name)
            initial = place.queue.take(count)
            batches.append(Batch(number, task, initial.row, initial.image, initial))
            continue
        data, position = run.data[task.name].train, place.positions[task.name]
        rows = prompts.order(position, count, size=len(data.records), seed=config.seed)
        images = data.images(rows, run.size) if task.image == "record" else None
        batches.append(Batch(number, task, rows, images, None))
        place.positions[task.name] += count
    return batches


def fill_queue(run: Run, state: TrainState, step: int, place: Place, name: str) -> None:
    """Stage 1 of a refining task: draws (or reads) initial images, scores and queues one of each.

    Prompts whose images all stay without a reward are left out.
    """
    config, srr, data = run.config, run.config.srr, run.data[name].train
    run.weights(state)  # the policy may be its own judge
    position = place.positions[name]
    rows = prompts.order(position, srr.queue_prompts, size=len(data.records), seed=config.seed)
    records = [data.records[row] for row in rows]
    if srr.source == "record":
        images = data.images(rows, run.size)[:, None]
    else:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0), position)
        images = draw_initial(run, state, records, key)
    prompts_, each = images.shape[:2]
    ids = [("initial", position, number) for number in range(prompts_ * each)]
    repeated = [record for record in records for _ in range(each)]
    options = options_lib.scoring_options(config, tasks.TASKS["t2i"])
    flat = images.reshape(-1, *images.shape[2:])
    scoring.submit(run.pool, ids, flat, repeated, options, first=0)
    scores = scoring.gather(run.pool, ids, repeated, (), options)
    check_validity(config, scores, f"step {step}, initial images")
    reward, valid = (x.reshape(prompts_, each) for x in (scores.reward, scores.valid))
    rng = np.random.default_rng([config.seed, CHOICE_STREAM, position])
    chosen, usable = choose_initial(reward, valid, choice=srr.choice, rng=rng)
    lowest = np.where(valid, reward, np.inf).min(axis=1)
    at = np.flatnonzero(usable)
    if not at.size:
        raise TrainingError(
            f"step {step}: none of the {len(ids)} initial images of task {name} has a reward; mend "
            "the verifier, then run the same command again"
        )
    place.queue.add(rows[at], images[at, chosen[at]], reward[at, chosen[at]], lowest[at])
    place.positions[name] += srr.queue_prompts


def draw_initial(
    run: Run, state: TrainState, records: Sequence[Record], key: jax.Array
) -> np.ndarray:
    """`srr.initial_images` images of each prompt, without thinking: uint8[P, K, Hpx, Wpx, 3]."""
    config = run.config
    each = config.srr.initial_images
    count = config.rollout.micro_batch // each
    weights = run.weights(state)
    tokens, mask = prompts.tokenise(
        [record.prompt for record in records],
        run.loaded.tokenizer,
        bucket=config.rollout.prompt_tokens,
    )
    no_window, greedy = jnp.int32(config.srr.num_points), jnp.float32(0.0)
    launched = []
    for first in range(0, len(records), count):
        block = TextBlock(tokens[first : first + count], mask[first : first + count])
        given = run.steps.initial.prefill(weights, (block,))
        number = jnp.int32(first * each)
        _, images = run.steps.initial.generate(weights, given, key, number, no_window, greedy)
        launched.append(images)
    drawn = np.concatenate([distributed.to_host(images) for images in launched])
    return drawn.reshape(len(records), each, *drawn.shape[1:])


# ------------------------------------------------------------------------------ 2 rollout


def draw_batch(run: Run, state: TrainState, step: int, batch: Batch) -> Drawn:
    """Stage 2 and the start of stage 3: draws a batch's trajectories, micro-batch by micro-batch.

    The images of one micro-batch go to the verifiers while the device draws the next.
    """
    config, group = run.config, run.config.train.group_size
    steps, data = run.steps.tasks[batch.task.name], run.data[batch.task.name].train
    own = jax.random.fold_in(jax.random.fold_in(state.key, step), batch.number)
    key, window_key = jax.random.split(own)
    lo, hi = config.rollout.window_range
    start = jax.random.randint(window_key, (), lo, hi - config.rollout.window + 1)
    count = config.rollout.micro_batch // group  # prompts
    temperature = jnp.float32(config.rollout.temperature)
    weights = run.weights(state)
    launched = []
    for first in range(0, len(batch.rows), count):
        part = slice(first, first + count)
        images = None if batch.images is None else image_block(run.loaded, batch.images[part])
        given = steps.train.prefill(weights, data.inputs(batch.rows[part], images))
        number = jnp.int32(first * group)
        launched.append(steps.train.generate(weights, given, key, number, start, temperature))
    records = [data.records[row] for row in np.repeat(batch.rows, group)]
    ids = [(step, batch.number, number) for number in range(len(records))]
    if batch.task.reward == "image":
        options = options_lib.scoring_options(config, batch.task)
        for number, (_, images) in enumerate(launched):
            first = number * count * group
            part = slice(first, first + count * group)
            shown = distributed.to_host(images)
            scoring.submit(run.pool, ids[part], shown, records[part], options, first=first)
    parts = [trajectories for trajectories, _ in launched]
    whole = parts[0] if len(parts) == 1 else steps.join(parts)
    samples = distributed.to_host(whole.texts)
    texts = [decode_texts(run.loaded.tokenizer, each.tokens, each.mask) for each in samples]
    drawn = Drawn(batch, whole, records, ids, texts, _text_metrics(samples))
    if batch.task.refines and config.srr.reflection_format == "verifier":
        _submit_reflections(run, drawn)
    return drawn


def image_block(loaded: Loaded, images: np.ndarray) -> ImageBlock:
    """Given images uint8[P, Hpx, Wpx, 3] as both encoders see them; the VAE's size is theirs."""
    height, width = images.shape[1:3]
    sizes = loaded.config.vit_transform
    seen = images
    if images_lib.fitted_size(width, height, sizes) != (width, height):
        resized = [images_lib.resize(Image.fromarray(image), sizes) for image in images]
        seen = np.stack([np.asarray(image) for image in resized])
    return ImageBlock(images, seen)


def decode_steps(tokenizer: Tokenizer, trajectories: Rollout) -> list[list[str]]:
    """The texts of each text step."""
    samples = distributed.to_host(trajectories.texts)
    return [decode_texts(tokenizer, sample.tokens, sample.mask) for sample in samples]


def decode_texts(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Texts of int32[B, T] tokens without their two delimiters."""
    return [tokenizer.decode(row[held][1:-1]) for row, held in zip(tokens, mask, strict=True)]


def _text_metrics(samples: Sequence[TextSample]) -> dict[str, float]:
    """Means over the texts of all text steps; samples are numpy."""
    if not samples:
        return {}
    lengths = np.concatenate([sample.scored.sum(axis=1) for sample in samples])
    truncated = np.concatenate([sample.truncated for sample in samples])
    return {
        "text/length": float(lengths.mean()),
        "text/truncated_fraction": float(truncated.mean()),
    }


def _submit_reflections(run: Run, drawn: Drawn) -> None:
    """Asks the verifiers about the reflections, beside the images that they speak of."""
    group = run.config.train.group_size
    for index in distributed.own_rows(len(drawn.ids)):
        asked = formats.reflection_questions(drawn.records[index].prompt, drawn.texts[0][index])
        image = drawn.batch.images[index // group]
        run.pool.submit((*drawn.ids[index], "reflection"), image, asked)


# ------------------------------------------------------------------------------- 3 reward


def score_batch(run: Run, drawn: Drawn, reflection: np.ndarray | None, step: int) -> scoring.Scores:
    """Stage 3: the rewards of a batch.

    Args:
      run: the run.
      drawn: the batch.
      reflection: from `score_reflections`; a sample without a verdict is invalid.
      step: number of the update.
    Raises:
      TrainingError: the verifiers failed too often.
    """
    task = drawn.batch.task
    if task.reward == "answer":
        return scoring.answer_scores(drawn.records, drawn.texts[-1], drawn.thinks)
    options = options_lib.scoring_options(run.config, task)
    scores = scoring.gather(run.pool, drawn.ids, drawn.records, drawn.thinks, options)
    if reflection is not None:
        scores = scoring.without(scores, np.isnan(reflection), "no verdict on the reflection")
    check_validity(run.config, scores, f"step {step}")
    return scores


def score_reflections(run: Run, drawn: Drawn) -> np.ndarray | None:
    """1 where a reflection has the form that is asked for, else 0; None where none is asked for.

    float64[B]; NaN where the verifier gave no answer.
    """
    mode = run.config.srr.reflection_format
    if not drawn.batch.task.refines or mode == "none":
        return None
    if mode == "rule":
        return np.array([formats.reflection_rule(text) for text in drawn.texts[0]])
    own = distributed.own_rows(len(drawn.ids))
    outcomes = run.pool.gather((*drawn.ids[index], "reflection") for index in own)
    judged = [
        float(min(outcome.p_yes) > 0.5) if outcome.valid else np.nan
        for outcome in outcomes.values()
    ]
    return distributed.merge_rows(np.array(judged), len(drawn.ids))


# ---------------------------------------------------------------------------- 4 advantage


def advantage_of(
    config: Config, drawn: Drawn, scores: scoring.Scores, reflection: np.ndarray | None = None
) -> Scored:
    """Stage 4: advantages within each prompt's group.

    Args:
      config: the run's.
      drawn: a batch.
      scores: its rewards.
      reflection: from `score_reflections`; known for every valid sample.
    """
    shape = (config.train.prompts_per_step, config.train.group_size)
    task, initial = drawn.batch.task, drawn.batch.initial
    valid, reward = scores.valid, scores.reward
    metrics: dict[str, float] = {}
    moves = True
    if reflection is not None:
        metrics["reward/reflection"] = float(np.mean(reflection[valid])) if valid.any() else 0.0
    if initial is not None:
        mode = config.srr.rectification
        groups = (reward.reshape(shape), valid.reshape(shape))
        rectified = rectify(*groups, initial.reward, initial.lowest, mode=mode)
        reward = rectified.reward.ravel()
        moves = mode == "none" or bool(rectified.improved.any())
        metrics |= _refinement_metrics(scores, valid, rectified.improved, initial, shape)
    options = options_lib.scoring_options(config, task)
    text, image = scoring.totals(scores, options, reward=reward, reflection=reflection)
    metrics["reward/total"] = float(np.mean(text[valid])) if valid.any() else float("nan")
    if not moves:
        text = image = np.zeros_like(text)

    def advantages(total: np.ndarray) -> Advantages:
        baseline, compared = "group", None
        if initial is not None and moves and config.advantage.baseline != "group":
            baseline = config.advantage.baseline
            # The initial image has no text: it is given what its group's texts add on average.
            added = np.where(valid, total - reward, 0.0).reshape(shape).sum(axis=1)
            compared = initial.reward + added / np.maximum(valid.reshape(shape).sum(axis=1), 1)
        return group_advantage(
            total.reshape(shape),
            valid.reshape(shape),
            std=config.advantage.std,
            baseline=baseline,
            initial=compared,
        )

    own = advantages(text)
    other = own.advantage if image is text else advantages(image).advantage
    return Scored(own, other, metrics | own.metrics, left_out=not moves)


def _refinement_metrics(
    scores: scoring.Scores,
    valid: np.ndarray,
    improved: np.ndarray,
    initial: Queue,
    shape: tuple[int, int],
) -> dict[str, float]:
    gain = scores.reward.reshape(shape) - initial.reward[:, None]
    counted = valid.reshape(shape)
    return {
        "srr/initial_reward": float(initial.reward.mean()),
        "srr/gain": float(gain[counted].mean()) if counted.any() else float("nan"),
        "srr/improved_fraction": float(improved[counted].mean()) if counted.any() else 0.0,
    }
