"""The growing context of a sample: cached keys and values with validity masks.

A context is a tuple of segments (one per text or image block). Segments are never written after
they were made, so that contexts which share a prefix share its arrays: the guidance contexts are
views, not copies. A loop that reads one context many times (decoding, denoising) merges it first:
attention then runs one product per layer and step, instead of one per segment.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Segment:
    """Keys (rotated) and values of one block of tokens."""

    k: jax.Array  # float[L, B, K, S, H]
    v: jax.Array  # float[L, B, K, S, H]
    valid: jax.Array  # bool[B, S]; False at padding


SEGMENT_ROW_AXES = {"k": 1, "v": 1, "valid": 0}  # axis B of a segment's arrays


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
      segment: the new block.
      advance: int32[B] or int, how far the RoPE id moves on.
    """
    return Context((*ctx.segments, segment), ctx.rope + advance)


def merge(ctx: Context) -> Context:
    """Returns the same context as one segment."""
    if len(ctx.segments) <= 1:
        return ctx
    k, v = (
        jnp.concatenate([getattr(s, name) for s in ctx.segments], axis=3) for name in ("k", "v")
    )
    valid = jnp.concatenate([s.valid for s in ctx.segments], axis=1)
    return dataclasses.replace(ctx, segments=(Segment(k, v, valid),))


def _map_rows(ctx: Context, function: Callable[[jax.Array, int], jax.Array]) -> Context:
    """Applies `function(array, axis of the rows)` to every array."""

    def map_segment(segment: Segment) -> Segment:
        axes = SEGMENT_ROW_AXES.items()
        return Segment(**{name: function(getattr(segment, name), axis) for name, axis in axes})

    segments = tuple(map_segment(segment) for segment in ctx.segments)
    return Context(segments, function(ctx.rope, 0))


def broadcast(ctx: Context, batch: int) -> Context:
    """Repeats a context of one row for `batch` rows.

    Raises:
      ValueError: the context has neither one nor `batch` rows.
    """
    rows = ctx.rope.shape[0]
    if rows == batch:
        return ctx
    if rows != 1:
        raise ValueError(f"context has {rows} rows, expected 1 to broadcast to {batch} rows")

    def spread(x: jax.Array, axis: int) -> jax.Array:
        return jnp.broadcast_to(x, (*x.shape[:axis], batch, *x.shape[axis + 1 :]))

    return _map_rows(ctx, spread)


def take(ctx: Context, rows: jax.Array) -> Context:
    """Returns the rows `rows` (int32[B']) of a context, in that order."""
    return _map_rows(ctx, lambda x, axis: jnp.take(x, rows, axis=axis))


def stop_gradient(ctx: Context) -> Context:
    """Returns the context as a constant of differentiation."""
    return jax.tree.map(jax.lax.stop_gradient, ctx)


def length(ctx: Context) -> jax.Array:
    """Counts the valid cached tokens, int32[B]."""
    total = jnp.zeros_like(ctx.rope)
    for segment in ctx.segments:
        total = total + jnp.sum(segment.valid, axis=1, dtype=jnp.int32)
    return total
