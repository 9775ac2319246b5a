"""Grouped-query attention over several key/value blocks with explicit masks."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # finite, so that a row without any key stays finite too (and is never read)


def attend(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    masks: Sequence[jax.Array],
) -> jax.Array:
    """Softmax attention of every query over the union of several key blocks.

    `out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s`, softmax in float32 over all blocks together.
    Blocks stay separate arrays, so that a cache is never copied to append to it. Query head `n`
    reads key head `n // (N / K)`.

    Args:
      query: float[B, T, N, H].
      keys: blocks of float[B, S_i, K, H].
      values: blocks of float[B, S_i, K, H].
      masks: blocks of bool[B or 1, T or 1, S_i]; True where the query may look.
    Returns:
      float[B, T, N * H] in the dtype of `query`.
    """
    chex.assert_rank([query, *keys, *values], 4)
    chex.assert_rank(list(masks), 3)
    batch, length, heads, width = query.shape
    kv_heads = keys[0].shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = []
    for key, mask in zip(keys, masks, strict=True):
        score = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
        scores.append(jnp.where(mask[:, None, None], score * width**-0.5, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    parts = jnp.split(weights, np.cumsum([key.shape[1] for key in keys])[:-1], axis=-1)
    out = sum(
        jnp.einsum("bkgts,bskh->btkgh", part, value)
        for part, value in zip(parts, values, strict=True)
    )
    return out.reshape(batch, length, heads * width)
