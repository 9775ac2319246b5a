"""Attention masks under padding."""

import chex
import jax
import jax.numpy as jnp


def causal_mask(valid: jax.Array) -> jax.Array:
    """Lets query t see key s if `s <= t` and key s is no padding.

    Args:
      valid: bool[B, T].
    Returns:
      bool[B, T, T], query axis first.
    """
    chex.assert_rank(valid, 2)
    length = valid.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
