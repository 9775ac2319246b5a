"""Stage 2: samples the trajectories of a batch and hands their images on as they come."""

import collections
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.prompts import image_block
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.training.sampling import run_steps
from alphagrpo_jax.types import PromptBatch, Rollout, RolloutBatch, TextSample

# (batch, ids, images uint8[N, Hpx, Wpx, 3], records, row numbers int64[N]) of one micro-batch.
OnImages = Callable[
    [PromptBatch, Sequence[tuple[int, int, int]], np.ndarray, Sequence[Record], np.ndarray], None
]


def sample(
    run: Run,
    params: PolicyParams,
    key: jax.Array,
    step: int,
    batch: PromptBatch,
    *,
    on_images: OnImages | None = None,
    on_texts: Callable[[RolloutBatch], None] | None = None,
) -> RolloutBatch:
    """Samples `train.group_size` trajectories for each prompt of a batch, by micro-batches.

    Args:
      run: the run.
      params: the weights to sample with.
      key: typed key[], the run's root key.
      step: number of the update.
      batch: P prompts of one task.
      on_images: called with the images of each micro-batch, while the device samples the next.
      on_texts: called with the whole batch, its texts decoded.
    Returns:
      P * G trajectories, the members of a group in a row.
    Raises:
      StoppedError: a stop is overdue.
    """
    config, group = run.config, run.config.train.group_size
    context = run.tasks[batch.task.name]
    fns, data = context.fns.train, context.data.train
    batch_key = jax.random.fold_in(jax.random.fold_in(key, step), batch.number)
    sample_key, window_key = jax.random.split(batch_key)
    low, high = config.rollout.window_range
    start = jax.random.randint(window_key, (), low, high - config.rollout.window + 1)
    records = [data.records[row] for row in np.repeat(batch.rows, group)]
    sample_ids = [(step, batch.number, number) for number in range(len(records))]

    def hand_on(rows: np.ndarray, images: np.ndarray) -> None:
        if on_images is not None:
            row_ids, row_records = (
                [values[row] for row in rows] for values in (sample_ids, records)
            )
            on_images(batch, row_ids, images, row_records, rows)

    images = None if batch.images is None else image_block(run.loaded, batch.images)
    trajectories = run_steps(
        fns,
        params,
        data.inputs(batch.rows, images),
        sample_key,
        start=start,
        temperature=config.rollout.temperature,
        stop=run.stop,
        buckets=config.rollout.length_buckets,
        on_images=hand_on,
    )
    samples = distributed.to_host(trajectories.texts)
    texts = [
        decode_texts(run.loaded.tokenizer, sample.tokens, sample.mask)[: len(records)]
        for sample in samples
    ]
    metrics = _text_metrics(_first_rows(samples, len(records)), texts, group)
    for image_sample in trajectories.images[-1:]:
        spread = _group_spread(image_sample.latents, len(records), group)
        metrics["image/group_spread"] = float(distributed.to_host(spread))
    rollout = RolloutBatch(batch, trajectories, records, sample_ids, texts, metrics)
    if on_texts is not None:
        on_texts(rollout)
    return rollout


def release(rollouts: Sequence[RolloutBatch]) -> None:
    """Frees the arrays of trajectories on the devices, which nothing reads behind the update.

    They would else lie beside those of the evaluation and of the next rollout.
    """
    for batch in rollouts:
        for array in jax.tree.leaves(batch.trajectories):
            array.delete()


def _first_rows(samples: Sequence[TextSample], count: int) -> list[TextSample]:
    """Drops the rows that fill up the mesh."""
    return [jax.tree.map(lambda x: x[:count], sample) for sample in samples]


def decode_steps(tokenizer: Tokenizer, trajectories: Rollout) -> list[list[str]]:
    """Decodes the texts of each text step: [text steps][B]."""
    samples = distributed.to_host(trajectories.texts)
    return [decode_texts(tokenizer, sample.tokens, sample.mask) for sample in samples]


def decode_texts(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Decodes int32[B, T] tokens under their bool[B, T] mask, without the two delimiters."""
    return [tokenizer.decode(row[valid][1:-1]) for row, valid in zip(tokens, mask, strict=True)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _group_spread(latents: jax.Array, count: int, group: int) -> jax.Array:
    """Computes the spread of a prompt's images relative to that of all, float32[] in [0, 1].

    The root of the ratio of two variances: of latents around their group's mean, and around the
    mean of all; 0 where all images of each prompt are alike.

    Args:
      latents: float32[B, M, C].
      count: rows that are no filling.
      group: rows per prompt.
    """
    rows = latents[:count].reshape(-1, group, *latents.shape[1:])
    within = jnp.mean(jnp.var(rows, axis=1))
    return jnp.sqrt(within / jnp.maximum(jnp.mean(jnp.var(rows, axis=(0, 1))), 1e-12))


def _text_metrics(
    samples: Sequence[TextSample], texts: Sequence[list[str]], group: int
) -> dict[str, float]:
    """Averages over the texts of all text steps; samples are numpy.

    A text is repeated if another one of its group equals it.
    """
    if not samples:
        return {}
    lengths = np.concatenate([sample.scored.sum(axis=1) for sample in samples])
    truncated = np.concatenate([sample.truncated for sample in samples])
    repeated = [
        count
        for step_texts in texts
        for first in range(0, len(step_texts), group)
        for count in collections.Counter(step_texts[first : first + group]).values()
        if count > 1
    ]
    return {
        "text/repeated_fraction": sum(repeated) / sum(map(len, texts)),
        "text/length": float(lengths.mean()),
        "text/truncated_fraction": float(truncated.mean()),
    }
