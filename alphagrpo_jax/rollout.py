"""Stage 2: samples the trajectories of a batch and hands their images on as they come."""

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
from alphagrpo_jax.training.pacing import AHEAD, MicroBatches
from alphagrpo_jax.types import PromptBatch, Rollout, RolloutBatch, TextSample

# (batch, ids, images uint8[N, Hpx, Wpx, 3], records, number of the first) of one micro-batch.
OnImages = Callable[
    [PromptBatch, Sequence[tuple[int, int, int]], np.ndarray, Sequence[Record], int], None
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
    fns, data = context.fns, context.data.train
    batch_key = jax.random.fold_in(jax.random.fold_in(key, step), batch.number)
    sample_key, window_key = jax.random.split(batch_key)
    low, high = config.rollout.window_range
    start = jax.random.randint(window_key, (), low, high - config.rollout.window + 1)
    temperature = jnp.float32(config.rollout.temperature)
    prompts_at_once = config.rollout.micro_batch // group
    records = [data.records[row] for row in np.repeat(batch.rows, group)]
    sample_ids = [(step, batch.number, number) for number in range(len(records))]
    launched = []

    def hand_on(number: int) -> None:
        """Waits for the images of a micro-batch and hands them on."""
        _, images = launched[number]
        if on_images is None or images is None:
            return
        first = number * prompts_at_once * group
        rows = slice(first, first + prompts_at_once * group)
        on_images(batch, sample_ids[rows], distributed.to_host(images), records[rows], first)

    # Images are handed on while the device samples the micro-batches behind them.
    pace = MicroBatches(run.stop)
    for number, first in enumerate(range(0, len(batch.rows), prompts_at_once)):
        if number > AHEAD:
            hand_on(number - AHEAD - 1)
        pace.begin()
        rows = slice(first, first + prompts_at_once)
        images = None if batch.images is None else image_block(run.loaded, batch.images[rows])
        prefix = fns.train.prefill(params, data.inputs(batch.rows[rows], images))
        row = jnp.int32(first * group)
        launched.append(fns.train.generate(params, prefix, sample_key, row, start, temperature))
        pace.dispatched(launched[-1])
    for number in range(max(0, len(launched) - AHEAD - 1), len(launched)):
        hand_on(number)
    micro_batches = [trajectories for trajectories, _ in launched]
    trajectories = micro_batches[0] if len(micro_batches) == 1 else fns.join(micro_batches)
    samples = distributed.to_host(trajectories.texts)
    tokenizer = run.loaded.tokenizer
    texts = [decode_texts(tokenizer, sample.tokens, sample.mask) for sample in samples]
    rollout = RolloutBatch(batch, trajectories, records, sample_ids, texts, _text_metrics(samples))
    if on_texts is not None:
        on_texts(rollout)
    return rollout


def decode_steps(tokenizer: Tokenizer, trajectories: Rollout) -> list[list[str]]:
    """Decodes the texts of each text step: [text steps][B]."""
    samples = distributed.to_host(trajectories.texts)
    return [decode_texts(tokenizer, sample.tokens, sample.mask) for sample in samples]


def decode_texts(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Decodes int32[B, T] tokens under their bool[B, T] mask, without the two delimiters."""
    return [tokenizer.decode(row[valid][1:-1]) for row, valid in zip(tokens, mask, strict=True)]


def _text_metrics(samples: Sequence[TextSample]) -> dict[str, float]:
    """Averages over the texts of all text steps; samples are numpy."""
    if not samples:
        return {}
    lengths = np.concatenate([sample.scored.sum(axis=1) for sample in samples])
    truncated = np.concatenate([sample.truncated for sample in samples])
    return {
        "text/length": float(lengths.mean()),
        "text/truncated_fraction": float(truncated.mean()),
    }
