"""Samples a task's steps by the jitted functions of a run, micro-batch by micro-batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.runtime.stopping import NEVER, StopRequest
from alphagrpo_jax.sampling.trajectory import Images, add_text, noise_owners
from alphagrpo_jax.tasks import PlannedStep
from alphagrpo_jax.training.pacing import AHEAD, MicroBatches
from alphagrpo_jax.training.steps import ImageFns, SampleFns, TextFns
from alphagrpo_jax.types import ImageBlock, Rollout, TextBlock, row_count

OnRows = Callable[[np.ndarray, np.ndarray], None]  # row numbers int64[N], uint8[N, Hpx, Wpx, 3]


def run_steps(
    fns: SampleFns,
    params: PolicyParams,
    inputs: tuple[TextBlock | ImageBlock, ...],
    key: jax.Array,
    *,
    start: jax.Array | int,
    temperature: float,
    first: int = 0,
    stop: StopRequest = NEVER,
    buckets: int = 1,
    on_images: OnRows | None = None,
) -> Rollout:
    """Samples the steps of a task for P prompts: texts for all rows at once, images by micro-batch.

    Args:
      fns: the jitted steps.
      params: the weights to sample with.
      inputs: one block of P rows per input of the task, in order; on the host.
      key: typed key[].
      start: first stochastic image step; at the schedule's end there is none.
      temperature: of texts; 0 takes the likeliest tokens.
      first: number of the first row, by which it is sampled.
      stop: ends the work between two micro-batches once it is overdue.
      buckets: number of lengths to one of which inputs and texts are cut.
      on_images: called with the row numbers, int64[N], and uint8[N, Hpx, Wpx, 3] of the last
        step's images, a micro-batch at a time, while the device samples the next.
    Returns:
      The trajectories; behind the last one, rows that fill up the mesh.
    Raises:
      StoppedError: see `stop`.
    """
    layout = fns.spec.layout(row_count(inputs) * fns.spec.rows_per_prompt)
    rollout = fns.prefill(params, tuple(_cut_prompt(block, buckets) for block in inputs))
    last = fns.spec.plan.steps[-1]
    for step, step_fns in zip(fns.spec.plan.steps, fns.steps, strict=True):
        event = jnp.int32(step.event)
        if isinstance(step_fns, TextFns):
            ctx, pieces = step_fns.context(params, rollout)
            rows = jnp.asarray(first + np.arange(layout.rows), jnp.int32)
            written = step_fns.sample(params, ctx, key, event, rows, jnp.float32(temperature))
            rollout = add_text(rollout, *written, pieces, step=step)
            length = _bucket(rollout.texts[-1].mask, buckets, layout.count)
            if length < rollout.texts[-1].mask.shape[1]:
                rollout = step_fns.cut(rollout, length)
            continue
        hand_on = _HandOn(on_images if step is last else None, layout)
        micro_batches, pace = [], MicroBatches(stop)
        for number in range(layout.micro_batches):
            # Images are handed on while the device samples the micro-batches behind them.
            if number > AHEAD:
                hand_on(number - AHEAD - 1, micro_batches)
            pace.begin()
            arguments = (params, rollout, key, first, start, number, layout)
            micro_batches.append(pace.call(_micro_batch, fns, step_fns, step, *arguments))
            pace.dispatched(micro_batches[-1].pixels)
        for number in range(max(0, layout.micro_batches - AHEAD - 1), layout.micro_batches):
            hand_on(number, micro_batches)
        rollout = step_fns.join(rollout, micro_batches)
    return rollout


@dataclasses.dataclass
class _HandOn:
    """Waits for the images of a micro-batch and hands them on, without repeated rows."""

    on_images: OnRows | None
    layout: RowLayout

    def __call__(self, number: int, micro_batches: list[Images]) -> None:
        if self.on_images is not None:
            rows, new = self.layout.rows_of(number)
            self.on_images(rows[new], distributed.to_host(micro_batches[number].pixels)[new])


def _micro_batch(
    fns: SampleFns,
    step_fns: ImageFns,
    step: PlannedStep,
    params: PolicyParams,
    rollout: Rollout,
    key: jax.Array,
    first: int,
    start: jax.Array | int,
    number: int,
    layout: RowLayout,
) -> Images:
    """Dispatches one micro-batch of an image step."""
    index, rows = jnp.int32(number), first + layout.rows_of(number)[0]
    contexts, pieces = step_fns.contexts(params, rollout, index)
    numbers = (jnp.asarray(x, jnp.int32) for x in (rows, noise_owners(rows, fns.spec), start))
    sample, pixels = step_fns.sample(params, contexts, key, jnp.int32(step.event), *numbers)
    if step_fns.absorb is not None:
        pieces[step.node] = step_fns.absorb(params, rollout, pixels, pieces, index)
    return Images(sample, pixels, pieces)


def collect_images(images: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Puts what `run_steps` handed on in the order of the rows, uint8[B, Hpx, Wpx, 3]."""
    rows = np.concatenate([rows for rows, _ in images])
    return np.concatenate([pixels for _, pixels in images])[np.argsort(rows)]


def _cut_prompt(block: TextBlock | ImageBlock, buckets: int) -> TextBlock | ImageBlock:
    """Cuts the padding that all prompts of a batch share, to one of `buckets` lengths."""
    if isinstance(block, ImageBlock):
        return block
    length = _bucket(block.mask, buckets)
    return TextBlock(block.tokens[:, :length], block.mask[:, :length])


def _bucket(mask: Any, buckets: int, rows: int | None = None) -> int:
    """Returns the smallest of the bucket lengths that holds every row of bool[B, T].

    With `rows`, the first ones alone: those behind them fill up a mesh, and no number of a run may
    depend on them.
    """
    longest = mask.shape[1]
    if buckets == 1:
        return longest
    length = int(distributed.to_host(mask)[:rows].sum(axis=1).max())
    return next(size for size in bucket_lengths(longest, buckets) if size >= length)


def bucket_lengths(longest: int, buckets: int) -> list[int]:
    """Returns `buckets` lengths up to the longest, ascending."""
    return [-(-longest * number // buckets) for number in range(1, buckets + 1)]
