"""Rotary position embedding, half-split (NeoX) layout, float32 angles."""

import chex
import jax
import jax.numpy as jnp


def rotary(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Computes cosine and sine of every angle `position * theta^(-2 i / H)`.

    Args:
      positions: int32[B, T].
      width: head dimension H, even.
      theta: base of the frequencies.
    Returns:
      Two float32[B, T, H / 2].
    """
    chex.assert_rank(positions, 2)
    # float32 island: a bfloat16 position is exact only up to 256.
    exponent = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    angles = positions.astype(jnp.float32)[..., None] * (1.0 / theta**exponent)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}) of every head by its position's angles.

    Args:
      x: float[B, T, N, H].
      cos: float32[B, T, H / 2].
      sin: float32[B, T, H / 2].
    Returns:
      float[B, T, N, H] in the dtype of `x`.
    """
    chex.assert_rank([x, cos, sin], [4, 3, 3])
    cos, sin = (a[:, :, None].astype(x.dtype) for a in (cos, sin))
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
