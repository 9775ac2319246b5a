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
    by_block = jnp.sum(p, axis=-1)
    ends = jnp.cumsum(by_block, axis=-1)
    target = (uniform * ends[:, -1])[:, None]
    block = _first_above(target, ends, by_block)
    start = jnp.take_along_axis(ends - by_block, block, axis=-1)
    inside = jnp.take_along_axis(p, block[:, :, None], axis=1)[:, 0]
    place = _first_above(target, start + jnp.cumsum(inside, axis=-1), inside)
    # Without any mass (log-probs that are NaN) the token is one of the vocabulary, too.
    return jnp.minimum(block * BLOCK + place, vocabulary - 1)[:, 0].astype(jnp.int32)


def _first_above(target: jax.Array, ends: jax.Array, mass: jax.Array) -> jax.Array:
    """Finds the first place with mass whose running sum exceeds a target, int32[B, 1].

    Running sums are rounded, at every place in another way: one may exceed the target at a place
    without mass, and the last may stay below it. Then the last place with mass is taken.

    Args:
      target: float32[B, 1].
      ends: float32[B, N], running sums of `mass`.
      mass: float32[B, N], not negative.
    """
    has_mass = mass > 0
    is_above = has_mass & (ends > target)
    last = mass.shape[-1] - 1 - jnp.argmax(has_mass[:, ::-1], axis=-1)
    place = jnp.where(jnp.any(is_above, axis=-1), jnp.argmax(is_above, axis=-1), last)
    return place[:, None]


def nucleus(log_p: jax.Array, *, top_p: float) -> jax.Array:
    """Returns the smallest set of likeliest tokens whose mass reaches `top_p`, ties included.

    A token belongs to it if those strictly likelier sum to less than `top_p`; the likeliest always
    does (Holtzman et al. 2020). The least such probability is searched among all floats, some bits
    per pass over the vocabulary, which is read 16 times and never sorted.

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
