"""Initial images for self-reflective refinement: samples, scores and queues what is repaired.

A refining task takes its images from a queue. When the queue runs short, it is filled: several
images of each prompt are sampled without thinking (or read from the records), the verifiers score
them, and one per prompt is chosen (AlphaGRPO, arXiv 2605.12495, SRR stage 1).
"""

from collections.abc import Sequence

import jax
import numpy as np

from alphagrpo_jax import prompts
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.refinement import choose_initial
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.runtime import host_random
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.training.checks import TrainingError, check_validity
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.training.sampling import collect_images, run_steps
from alphagrpo_jax.types import DataPosition, InitialImageQueue, TextBlock


def take(
    run: Run, params: PolicyParams, key: jax.Array, step: int, position: DataPosition
) -> list[InitialImageQueue]:
    """Takes each refining batch's initial images from the queue, and fills it when it runs short.

    Args:
      run: the run.
      params: the weights to sample with.
      key: typed key[], the run's root key.
      step: number of the update.
      position: moves on.
    Returns:
      One entry per batch of the update whose task refines images, in order.
    Raises:
      TrainingError: the verifiers failed too often.
    """
    count = run.config.train.prompts_per_step
    batches = []
    for task in prompts.tasks_at(run.config, step):
        if task.refines:
            queue = position.queue
            assert queue is not None  # made at the start of a run with a refining task
            while queue.count < count:
                _fill(run, params, key, step, position, task.name)
            batches.append(queue.take(count))
    return batches


def _fill(
    run: Run, params: PolicyParams, key: jax.Array, step: int, position: DataPosition, name: str
) -> None:
    """Queues one initial image for each of the next `srr.queue_prompts` prompts.

    Prompts whose images all stay without a reward are left out.
    """
    config, srr, data = run.config, run.config.srr, run.tasks[name].data.train
    start = position.positions[name]
    rows = prompts.next_rows(config, data, start, srr.queue_prompts)
    records = [data.records[row] for row in rows]
    if srr.source == "record":
        images = data.images(rows, run.image_size)[:, None]
    else:
        # Step 0 of the root key, which no update uses; the position makes each filling's own.
        fill_key = jax.random.fold_in(jax.random.fold_in(key, 0), start)
        images = sample_initial_images(run, params, records, fill_key)
    reward, valid = _score(run, records, images, start, step)
    stream = host_random.Stream.INITIAL_IMAGE
    rng = host_random.generator(stream, seed=config.seed, number=start)
    chosen, usable = choose_initial(reward, valid, choice=srr.choice, rng=rng)
    at = np.flatnonzero(usable)
    if not at.size:
        raise TrainingError(
            f"step {step}: none of the {valid.size} initial images of task {name} has a reward; "
            "mend the verifier, then run the same command again"
        )
    assert position.queue is not None
    position.queue.add(rows[at], images[at, chosen[at]], reward[at, chosen[at]])
    position.positions[name] += srr.queue_prompts


def _score(
    run: Run, records: Sequence[Record], images: np.ndarray, start: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Asks the verifiers about uint8[P, K, Hpx, Wpx, 3]: rewards float64[P, K], valid bool[P, K].

    `start` is the position of the first prompt in the data, which makes the sample ids unique.
    """
    shape = images.shape[:2]
    sample_ids = [("initial", start, number) for number in range(shape[0] * shape[1])]
    repeated = [record for record in records for _ in range(shape[1])]
    scoring_options = run.initial.scoring
    flat = images.reshape(-1, *images.shape[2:])
    scoring.submit(run.verifier, sample_ids, flat, repeated, scoring_options)
    rewards = scoring.gather(run.verifier, sample_ids, repeated, (), scoring_options)
    check_validity(run.config, rewards, repeated, f"step {step}, initial images")
    return rewards.reward.reshape(shape), rewards.valid.reshape(shape)


def sample_initial_images(
    run: Run, params: PolicyParams, records: Sequence[Record], key: jax.Array
) -> np.ndarray:
    """Samples `srr.initial_images` images of each prompt, without thinking.

    Args:
      run: the run.
      params: the weights to sample with.
      records: P prompts.
      key: typed key[].
    Returns:
      uint8[P, K, Hpx, Wpx, 3].
    Raises:
      StoppedError: a stop is overdue.
    """
    config, fns = run.config, run.initial.fns
    assert fns is not None  # made at the start of a run with a refining task
    tokens, mask = prompts.tokenize(
        [record.prompt for record in records],
        run.loaded.tokenizer,
        bucket=config.rollout.prompt_tokens,
    )
    images: list[tuple[np.ndarray, np.ndarray]] = []
    run_steps(
        fns,
        params,
        (TextBlock.from_host(tokens, mask),),
        key,
        start=config.srr.num_points,
        temperature=0.0,
        stop=run.stop,
        buckets=config.rollout.length_buckets,
        on_images=lambda rows, pixels: images.append((rows, pixels)),
    )
    pixels = collect_images(images)
    return pixels.reshape(len(records), config.srr.initial_images, *pixels.shape[1:])
