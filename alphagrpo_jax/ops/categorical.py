"""Samples tokens from a vocabulary: the nucleus without sorting, a token by one random number."""

# pyright: reportUnknownMemberType=false
# (in JAX's stubs `jnp.pad` and `fori_loop` are partially untyped)

from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128  # tokens that are added up first: two short sums in place of one over the vocabulary
_BITS = 2  # of the threshold per pass over the vocabulary
_WORD = 32  # bits of a float


def sample(log_p: jax.Array, uniform: jax.Array) -> jax.Array:
    """Samples one token per row by inverting the distribution function.

    The first token whose probability, added to those before it, exceeds `uniform` times the sum of
    all. Costs one random number per row, where the Gumbel trick takes one per token.

    Args:
      log_p: float32[B, V]; need not be normalized, -inf is never sampled.
      uniform: float32[B] in [0, 1).
    Returns:
      int32[B].
    """
    chex.assert_rank([log_p, uniform], [2, 1])
    batch, vocabulary = log_p.shape
    blocks = -(-vocabulary // BLOCK)
    p = jnp.exp(log_p - jnp.max(log_p, axis=-1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, blocks * BLOCK - vocabulary))).reshape(batch, blocks, BLOCK)
    by_block = jnp.cumsum(jnp.sum(p, axis=-1), axis=-1)
    target = uniform * by_block[:, -1]
    block = jnp.sum(by_block <= target[:, None], axis=-1, keepdims=True)
    before = jnp.take_along_axis(jnp.pad(by_block, ((0, 0), (1, 0))), block, axis=-1)
    inside = jnp.take_along_axis(p, block[:, :, None], axis=1)[:, 0]
    place = jnp.sum(jnp.cumsum(inside, axis=-1) + before <= target[:, None], axis=-1)
    # Rounding: a block's running sum may end below the sum that has chosen it.
    last = BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
    return (block[:, 0] * BLOCK + jnp.minimum(place, last)).astype(jnp.int32)


def nucleus(log_p: jax.Array, *, top_p: float) -> jax.Array:
    """Returns the smallest set of likeliest tokens whose mass reaches `top_p`, ties included.

    A token belongs to it if those strictly likelier sum to less than `top_p`; the likeliest always
    does (Holtzman et al. 2020). The least such probability is searched among all floats, some bits
    per pass over the vocabulary, which costs less than sorting it.

    Args:
      log_p: float32[B, V], normalized.
      top_p: in (0, 1].
    Returns:
      bool[B, V].
    """
    chex.assert_rank(log_p, 2)
    probability, keys = jnp.exp(log_p), _ordered(log_p)
    steps = np.arange(1, 1 << _BITS, dtype=np.uint32)

    def narrow(number: jax.Array, low: jax.Array) -> jax.Array:
        """Raises a bound below the threshold by the bits of one pass."""
        shift = jnp.uint32(_WORD - _BITS) - jnp.uint32(_BITS) * number.astype(jnp.uint32)
        highest = low
        for step in steps:
            # Tokens from `bound` on sum to `top_p`: those of lower keys are not in the nucleus.
            bound = low + (jnp.uint32(step) << shift)
            mass = jnp.sum(jnp.where(keys >= bound[:, None], probability, 0.0), axis=-1)
            highest = jnp.where(mass >= top_p, bound, highest)
        return highest

    low = jnp.zeros(log_p.shape[:1], jnp.uint32)
    # The stubs of `fori_loop` have no types.
    low = cast(jax.Array, jax.lax.fori_loop(0, _WORD // _BITS, narrow, low))
    return (keys >= low[:, None]) | (log_p >= jnp.max(log_p, axis=-1, keepdims=True))


def _ordered(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << (_WORD - 1))
    return jnp.where(bits >= sign, ~bits, bits | sign)
