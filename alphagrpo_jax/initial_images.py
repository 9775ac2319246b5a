"""Fills the queue of initial images that task srr repairs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import prompts, tasks
from alphagrpo_jax.refinement import choose_initial
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.checks import TrainingError, check_validity
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.types import DataPosition, TextBlock, TrainState

CHOICE_STREAM = 2  # host-side random numbers, beside the data order's


def fill(run: Run, state: TrainState, step: int, place: DataPosition) -> None:
    """Fills the queue until it holds what the update's refining batches take.

    Raises:
      TrainingError: the verifiers failed too often on initial images.
    """
    needed = 0
    for task in prompts.tasks_at(run.config, step):
        if task.refines:
            needed += run.config.train.prompts_per_step
            while place.queue.count < needed:
                _fill_once(run, state, step, place, task.name)


def _fill_once(run: Run, state: TrainState, step: int, place: DataPosition, name: str) -> None:
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
        images = sample_initial_images(run, state, records, key)
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


def sample_initial_images(
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
