"""The growing context of a sample: cached keys and values with validity masks.

A context is a tuple of segments (one per text or image block). Segments are never written after
they were made, so that contexts which share a prefix share its arrays: the guidance contexts are
views, not copies. What neighboring rows share, as a group its prompt, is a segment of fewer rows.
A loop that reads one context many times (decoding, denoising) merges it first: attention then runs
at most two products per layer and step, instead of one per segment.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Segment:
    """Keys (rotated) and values of one block of tokens.

    R divides the context's B rows: each row of a segment is that of B / R neighboring ones.
    """

    k: jax.Array  # float[L, R, K, S, H]
    v: jax.Array  # float[L, R, K, S, H]
    valid: jax.Array  # bool[R, S]; False at padding
    # What a prompt's or all rows share: merged apart also where there happens to be one row, so
    # that a context's structure does not depend on the number of rows.
    shared: bool = struct.field(pytree_node=False, default=False)


SEGMENT_ROW_AXES = {"k": 1, "v": 1, "valid": 0}  # axis R of a segment's arrays


@struct.dataclass
class Context:
    """Cached blocks that a new token attends to, and the next position."""

    segments: tuple[Segment, ...]
    # int32[B]; the next RoPE id. An image block takes a single one, as in BAGEL: its tokens are
    # told apart by their two-dimensional position table, not by RoPE.
    rope: jax.Array


@struct.dataclass
class GuidanceContexts:
    """The three contexts of classifier-free guidance."""

    gen: Context
    cfg_text: Context  # text dropped
    cfg_img: Context  # images dropped


@struct.dataclass
class DecodeCache:
    """A text while it is being written: one preallocated segment (static shapes in a loop)."""

    segment: Segment
    rope: jax.Array  # int32[B], RoPE id of the next token
    step: jax.Array  # int32[], slots used so far


def empty(batch: int) -> Context:
    """Returns a context without tokens for `batch` rows."""
    return Context((), jnp.zeros((batch,), jnp.int32))


def append(ctx: Context, segment: Segment, advance: jax.Array | int) -> Context:
    """Returns the context followed by one more block.

    Args:
      ctx: the context so far.
      segment: the new block, of B rows or fewer.
      advance: int32[B] or int, how far the RoPE id moves on.
    """
    return Context((*ctx.segments, segment), ctx.rope + advance)


def merge(ctx: Context) -> Context:
    """Returns the same context as one segment, or two: what rows share, and what is their own."""
    rows = ctx.rope.shape[0]

    def is_shared(segment: Segment) -> bool:
        return segment.shared or segment.valid.shape[0] < rows

    shared = [segment for segment in ctx.segments if is_shared(segment)]
    of_one_row = [segment for segment in ctx.segments if not is_shared(segment)]
    most = max((segment.valid.shape[0] for segment in shared), default=0)
    merged = [_join([_repeat(segment, most) for segment in shared]), _join(of_one_row)]
    return dataclasses.replace(ctx, segments=tuple(segment for segment in merged if segment))


def _join(segments: Sequence[Segment]) -> Segment | None:
    """Joins segments of the same rows; None if there are none."""
    if len(segments) <= 1:
        return segments[0] if segments else None
    k, v = (jnp.concatenate([getattr(s, name) for s in segments], axis=3) for name in ("k", "v"))
    valid = jnp.concatenate([s.valid for s in segments], axis=1)
    return Segment(k, v, valid, segments[0].shared)


def _map_rows(segment: Segment, function: Callable[[jax.Array, int], jax.Array]) -> Segment:
    """Applies `function(array, axis of the rows)` to a segment's arrays."""
    axes = SEGMENT_ROW_AXES.items()
    arrays = {name: function(getattr(segment, name), axis) for name, axis in axes}
    return dataclasses.replace(segment, **arrays)


def _repeat(segment: Segment, rows: int) -> Segment:
    """Repeats each row of a segment for its neighbors, so that there are `rows`."""
    count = rows // segment.valid.shape[0]
    if count == 1:
        return segment
    return _map_rows(segment, lambda x, axis: jnp.repeat(x, count, axis=axis))


def broadcast(ctx: Context, batch: int) -> Context:
    """Returns a context of one row for `batch` rows, which share its segments.

    Raises:
      ValueError: the context has neither one nor `batch` rows.
    """
    rows = ctx.rope.shape[0]
    if rows == batch:
        return ctx
    if rows != 1:
        raise ValueError(f"context has {rows} rows, expected 1 to broadcast to {batch} rows")
    return dataclasses.replace(ctx, rope=jnp.broadcast_to(ctx.rope, (batch,)))


def repeat(ctx: Context, count: int) -> Context:
    """Returns a context of `count` neighboring rows for each row, which share its segments."""
    return dataclasses.replace(ctx, rope=jnp.repeat(ctx.rope, count))


def take(ctx: Context, rows: jax.Array) -> Context:
    """Returns the rows `rows` (int32[B']) of a context, in that order, each with its own copy."""
    batch = ctx.rope.shape[0]

    def take_segment(segment: Segment) -> Segment:
        of_segment = rows // (batch // segment.valid.shape[0])
        return _map_rows(segment, lambda x, axis: jnp.take(x, of_segment, axis=axis))

    segments = tuple(take_segment(segment) for segment in ctx.segments)
    return Context(segments, jnp.take(ctx.rope, rows))


def stop_gradient(ctx: Context) -> Context:
    """Returns the context as a constant of differentiation."""
    return jax.tree.map(jax.lax.stop_gradient, ctx)


def length(ctx: Context) -> jax.Array:
    """Counts the valid cached tokens, int32[B]."""
    total = jnp.zeros_like(ctx.rope)
    for segment in ctx.segments:
        count = jnp.sum(segment.valid, axis=1, dtype=jnp.int32)
        total = total + jnp.repeat(count, len(total) // len(count))
    return total
