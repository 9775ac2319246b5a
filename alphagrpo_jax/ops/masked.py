"""Means and attention masks under padding."""

import chex
import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of `x` where `mask` holds; 0 where nothing is valid.

    Values outside the mask may be anything, NaN included, and get a zero gradient.

    Args:
      x: float[...].
      mask: bool, the shape of `x`.
      axis: axis to average over; None for all.
    Returns:
      float[...] without `axis`.
    """
    chex.assert_equal_shape([x, mask])
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis)
    return total / jnp.maximum(jnp.sum(mask, axis=axis), 1).astype(x.dtype)


def causal_mask(valid: jax.Array) -> jax.Array:
    """Query t may see key s if `s <= t` and key s is no padding.

    Args:
      valid: bool[B, T].
    Returns:
      bool[B, T, T], query axis first.
    """
    chex.assert_rank(valid, 2)
    length = valid.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
