"""Grouped-query attention over several key/value blocks with explicit masks."""

# pyright: reportUnknownMemberType=false
# (one overload of jnp.einsum in JAX's stubs is untyped, so every call counts as partially unknown)

from collections.abc import Sequence
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from alphagrpo_jax.ops.fused_attention import KERNELS, TILE, UNSPLIT, attend_fused

MASKED = -1e30  # finite, so that a row without any key stays finite too (and is never read)


def attend(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    *,
    kernel: str = "plain",
    spec: PartitionSpec = UNSPLIT,
) -> jax.Array:
    """Computes softmax attention of every query over the union of several key blocks.

    `out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s`, softmax in float32 over all blocks together.
    Blocks stay separate arrays, so that a cache is never copied to append to it. Query head `n`
    reads key head `n // (N / K)`. A block of fewer rows than the query is read by B / R_i
    neighboring rows each, in one product: what a group shares is stored and read once.

    Args:
      query: float[B, T, N, H].
      keys: blocks of float[R_i, K, S_i, H], B a multiple of R_i: as the products read them, so
        that no call of a loop copies a cache to turn its axes.
      values: blocks of float[R_i, K, S_i, H].
      masks: blocks of bool[B or R_i or 1, T or 1, S_i]; True where the query may look.
      kernel: "plain" computes all scores, float32[B, N, T, S]; a key of `fused_attention.KERNELS`
        computes queries of `TILE` tokens or more without them.
      spec: mesh axes of rows and of heads, for a kernel; see `fused_attention.attend_fused`.
    Returns:
      float[B, T, N * H] in the dtype of `query`.
    """
    chex.assert_rank([query, *keys, *values], 4)
    chex.assert_rank(list(masks), 3)
    batch, length, heads, width = query.shape
    if kernel != "plain" and length >= TILE:
        fused = attend_fused(query, keys, values, masks, KERNELS[kernel], spec)
        return fused.reshape(batch, length, heads * width)
    kv_heads = keys[0].shape[1]
    # Query heads are grouped by the key head they read: keys are never repeated in memory.
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores: list[jax.Array] = []
    for key, mask in zip(keys, masks, strict=True):
        if 1 < mask.shape[0] < batch:
            mask = jnp.repeat(mask, batch // mask.shape[0], axis=0)
        score = _scores(grouped, key)
        scores.append(jnp.where(mask[:, None, None], score * width**-0.5, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    block_ends = np.cumsum([key.shape[2] for key in keys])
    block_weights = jnp.split(weights, block_ends[:-1], axis=-1)
    attended = sum(
        _weighted_sum(block_weight, value)
        for block_weight, value in zip(block_weights, values, strict=True)
    )
    # The cast is for the type checker only: `sum` of no blocks would be the integer 0.
    by_head = cast(jax.Array, attended)
    return jnp.moveaxis(by_head, 3, 1).reshape(batch, length, heads * width)


def _scores(grouped: jax.Array, key: jax.Array) -> jax.Array:
    """Computes the products of queries [B, T, K, G, H] and keys [R, K, S, H], [B, K, G, T, S]."""
    rows, readers = key.shape[0], grouped.shape[0] // key.shape[0]
    by_reader = grouped.reshape(rows, readers, *grouped.shape[1:])
    # float32 island: bfloat16 scores would lose the differences that softmax lives on.
    score = jnp.einsum("rmtkgh,rksh->rkmgts", by_reader, key, preferred_element_type=jnp.float32)
    return jnp.moveaxis(score, 1, 2).reshape(rows * readers, *score.shape[1:2], *score.shape[3:])


def _weighted_sum(weight: jax.Array, value: jax.Array) -> jax.Array:
    """Computes the sums of values [R, K, S, H] by weights [B, K, G, T, S], [B, K, G, T, H]."""
    rows, readers = value.shape[0], weight.shape[0] // value.shape[0]
    by_reader = weight.reshape(rows, readers, *weight.shape[1:])
    # The order of a plain product of matrices: on CPUs another one takes seven times as long.
    total = jnp.einsum("rmkgts,rksh->rkmgth", by_reader, value)
    return jnp.moveaxis(total, 1, 2).reshape(rows * readers, *total.shape[1:2], *total.shape[3:])
