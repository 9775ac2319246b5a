"""Normalization over the last axis, statistics in float32.

Squares of bfloat16 values, summed over thousands of features, would lose most of their digits.
"""

import chex
import jax
import jax.numpy as jnp


def _per_feature(weight: jax.Array, like: jax.Array) -> jax.Array:
    # Explicit axes: implicit rank promotion is an error in the tests.
    chex.assert_shape(weight, (like.shape[-1],))
    return weight.reshape((1,) * (like.ndim - 1) + weight.shape)


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Computes `weight * x / sqrt(mean(x^2) + epsilon)`; times `weight` in the dtype of `x`.

    Args:
      x: float[..., D].
      weight: float[D].
      epsilon: added to the mean square.
    Returns:
      float[..., D] in the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    # Rounded before the product, as in the official Qwen2 norm: it matters in bfloat16.
    return _per_feature(weight, x).astype(x.dtype) * (wide * scale).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Computes `weight * (x - mean) / sqrt(variance + epsilon) + bias`, all in float32.

    Args:
      x: float[..., D].
      weight: float[D].
      bias: float[D].
      epsilon: added to the variance.
    Returns:
      float[..., D] in the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(variance + epsilon)
    out = normed * _per_feature(weight, x) + _per_feature(bias, x)
    return out.astype(x.dtype)
