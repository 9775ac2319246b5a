"""Classifier-free guidance over two dropped conditions, with renormalization."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.config import Guidance


def is_active(guidance: Guidance, sigma: float) -> bool:
    """Returns whether guidance applies at a static noise level: `lo < sigma <= hi`, in float32.

    Args:
      guidance: scales and interval.
      sigma: python or numpy scalar; for a traced sigma use `active_mask`.
    """
    low, high = (np.float32(end) for end in guidance.interval)
    return guidance.uses_text and bool(low < np.float32(sigma) <= high)


def active_mask(guidance: Guidance, sigma: jax.Array) -> jax.Array:
    """Computes `is_active` for a traced sigma, float32[...] -> bool[...]."""
    low, high = (jnp.float32(end) for end in guidance.interval)
    return guidance.uses_text & (sigma > low) & (sigma <= high)


def combine(
    v: jax.Array, v_text: jax.Array | None, v_image: jax.Array | None, guidance: Guidance
) -> jax.Array:
    """Computes the guided velocity at a noise level, by BAGEL's guidance over two conditions.

    `global`, `channel`: `u = v_t + s_t (v - v_t)`; if `s_i > 1`: `u = v_i + s_i (u - v_i)`;
    result `u clip(|v| / (|u| + 1e-8), renorm_min, 1)`.
    `text_channel`: the text-guided `u` is renormalized first, then `v_i + s_i (u - v_i)`.
    Norms are over one sample's whole latent (`global`) or its last axis; gradients flow through
    every branch and through the norms. A sample's result does not depend on its neighbours.

    Args:
      v: float[B, M, C] velocity in the full context.
      v_text: float[B, M, C] with the text dropped; unused (may be None) if `text_scale <= 1`.
      v_image: float[B, M, C] with the image dropped; unused (may be None) unless both scales
        exceed 1.
      guidance: scales and renormalization; its interval is not applied here, see `is_active`.
    Returns:
      float32[B, M, C].
    Raises:
      ValueError: a velocity that the scales need is None.
    """
    v = v.astype(jnp.float32)
    chex.assert_rank(v, 3)
    if not guidance.uses_text:
        return v
    if v_text is None:
        raise ValueError(f"got text_scale={guidance.text_scale} without v_text; pass that velocity")
    chex.assert_equal_shape([v, v_text])
    v_text = v_text.astype(jnp.float32)
    u = v_text + guidance.text_scale * (v - v_text)
    if guidance.renorm == "text_channel":
        return _add_image(_renormalize(u, v, (2,), guidance.renorm_min), v_image, guidance)
    axes = (1, 2) if guidance.renorm == "global" else (2,)
    return _renormalize(_add_image(u, v_image, guidance), v, axes, guidance.renorm_min)


def _add_image(u: jax.Array, v_image: jax.Array | None, guidance: Guidance) -> jax.Array:
    """Adds image guidance: `v_i + s_i (u - v_i)`, or u where it is off."""
    if not guidance.uses_image:
        return u
    if v_image is None:
        raise ValueError(
            f"got image_scale={guidance.image_scale} without v_image; pass that velocity"
        )
    chex.assert_equal_shape([u, v_image])
    v_image = v_image.astype(jnp.float32)
    return v_image + guidance.image_scale * (u - v_image)


def _renormalize(u: jax.Array, v: jax.Array, axes: tuple[int, ...], minimum: float) -> jax.Array:
    """Computes `u clip(|v| / (|u| + 1e-8), minimum, 1)`, norms over `axes`."""
    ratio = _norm(v, axes) / (_norm(u, axes) + 1e-8)
    ratio = jnp.where(ratio < minimum, minimum, ratio)
    # Plain `where`, not `jnp.clip`: at a tie with the bound the whole gradient passes.
    return u * jnp.where(ratio > 1.0, 1.0, ratio)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes the Euclidean norm over `axes` (of size 1 then), with gradient 0, not NaN, at 0."""
    square = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
