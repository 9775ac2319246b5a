"""Contexts as views: appending, merging, repeating."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.kv_cache import Context, Segment


def segment(batch: int, length: int, start: float) -> Segment:
    values = start + jnp.arange(2 * batch * length * 1 * 2, dtype=jnp.float32)
    k = values.reshape(2, batch, 1, length, 2)
    return Segment(k, -k, jnp.arange(length)[None] <= jnp.arange(batch)[:, None])


def context() -> Context:
    ctx = kv_cache.append(kv_cache.empty(2), segment(2, 2, 0.0), jnp.array([1, 2]))
    return kv_cache.append(ctx, segment(2, 3, 100.0), 1)


def test_append_shares_the_prefix():
    ctx = context()
    longer = kv_cache.append(ctx, segment(2, 1, 7.0), 1)
    assert longer.segments[0].k is ctx.segments[0].k
    assert ctx.rope.tolist() == [2, 3]
    assert longer.rope.tolist() == [3, 4]
    assert kv_cache.length(ctx).tolist() == [2, 4]


def test_merge_keeps_order_and_validity():
    ctx = context()
    merged = kv_cache.merge(ctx)
    (only,) = merged.segments
    np.testing.assert_array_equal(only.k[..., :2, :], ctx.segments[0].k)
    np.testing.assert_array_equal(only.v[..., 2:, :], ctx.segments[1].v)
    assert only.valid.tolist() == [[1, 0, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert kv_cache.merge(merged).segments[0] is only


def test_rows():
    ctx = context()
    twice = kv_cache.take(ctx, jnp.array([0, 0, 1, 1]))
    assert twice.rope.tolist() == [2, 2, 3, 3]
    np.testing.assert_array_equal(twice.segments[1].k[:, 3], ctx.segments[1].k[:, 1])
    second = kv_cache.take(ctx, jnp.array([1]))
    spread = kv_cache.broadcast(second, 3)
    assert spread.rope.tolist() == [3, 3, 3]
    np.testing.assert_array_equal(spread.segments[0].v[:, 2], ctx.segments[0].v[:, 1])
    assert kv_cache.broadcast(ctx, 2) is ctx
    with pytest.raises(ValueError, match="2 rows, expected 1 to broadcast to 3"):
        kv_cache.broadcast(ctx, 3)


def test_stop_gradient():
    def total(x):
        ctx = kv_cache.stop_gradient(Context((Segment(x, x, jnp.ones((1, 1), bool)),), jnp.ones(1)))
        return ctx.segments[0].k.sum()

    assert float(jax.grad(total)(jnp.ones((1, 1, 1, 1, 1))).sum()) == 0.0


def test_what_rows_share_is_merged_apart_from_what_is_their_own():
    ctx = Context((segment(1, 2, 0.0), segment(2, 3, 50.0)), jnp.array([5, 5, 6, 6]))
    ctx = kv_cache.append(ctx, segment(4, 1, 100.0), 1)
    shared, of_one_row = kv_cache.merge(ctx).segments
    assert (shared.k.shape[1], of_one_row.k.shape[1]) == (2, 4)
    for row in range(2):
        np.testing.assert_array_equal(shared.k[:, row, :, :2], ctx.segments[0].k[:, 0])
        np.testing.assert_array_equal(shared.v[:, row, :, 2:], ctx.segments[1].v[:, row])
    assert kv_cache.length(ctx).tolist() == [3, 3, 4, 4]
    taken = kv_cache.take(ctx, jnp.array([3, 0]))
    assert taken.rope.tolist() == [7, 6]
    np.testing.assert_array_equal(taken.segments[1].k, ctx.segments[1].k[:, jnp.array([1, 0])])
    np.testing.assert_array_equal(taken.segments[0].valid[1], ctx.segments[0].valid[0])
    repeated = kv_cache.repeat(ctx, 2)
    assert repeated.rope.tolist() == [6, 6, 6, 6, 7, 7, 7, 7]
    assert repeated.segments[2] is ctx.segments[2]


def test_the_structure_of_a_merged_context_does_not_depend_on_the_rows():
    def merged(rows):
        system = dataclasses.replace(segment(1, 2, 0.0), shared=True)
        ctx = kv_cache.append(kv_cache.empty(rows), system, 1)
        return kv_cache.merge(kv_cache.append(ctx, segment(rows, 3, 9.0), 1))

    structures = {jax.tree.structure(merged(rows)) for rows in (1, 2, 3)}
    assert len(structures) == 1
    assert len(merged(1).segments) == 2
