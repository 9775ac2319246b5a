"""DiffusionNFT: moves velocities towards good finished images and away from bad ones.

Images are sampled by plain ODE steps; no log-prob of theirs is needed. Source: DiffusionNFT (arXiv
2509.16117, algorithm 1) in the form in which AlphaGRPO (arXiv 2605.12495) trains BAGEL.
"""

import jax
import jax.numpy as jnp

from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.losses.terms import (
    MatchingTerms,
    Metrics,
    check_matching,
    clipped_advantage,
    matching_share,
    squared_gap,
)

SCALE = 5.0  # factor of the loss, as released
MIN_ERROR = 1e-5  # no smaller mean error divides


def image_nft(
    image: MatchingTerms,
    valid: jax.Array,
    *,
    trajectories_total: jax.Array,
    options: LossOptions,
) -> tuple[jax.Array, Metrics]:
    """Computes a micro-batch's share of the DiffusionNFT loss.

    With `b = nft_beta`, `v` the trained velocity and `v_avg` that of the average policy:
    `v+ = b v + (1 - b) v_avg`, `v- = (1 + b) v_avg - b v`. The error of each against `target` is
    `E = sigma mean((v - target)^2) / max(mean |v - target|, 1e-5)`, means over the latent, the
    divisor a constant. With `w = clip(A / (2 c) + 1/2, 0, 1)` and `c = advantage_clip`, the loss is
    `5 (w E+ + (1 - w) E-) / b + image_beta mean((v - v_ref)^2)`, mean over noise levels and the
    update's valid trajectories. The factor 5 stays whatever `c` is.

    Args:
      image: velocities, targets, noise levels and advantages.
      valid: bool[B].
      trajectories_total: float32[], valid trajectories in the whole update.
      options: `nft_beta`, `advantage_clip`, `image_beta`.
    Returns:
      (float32[] share, metrics): `loss/image`, and the metrics of `terms.matching_share`.
    Raises:
      ValueError: `image_beta` without reference velocities.
    """
    check_matching(image, valid, image_beta=options.image_beta)
    average, beta = jax.lax.stop_gradient(image.average_velocity), options.nft_beta
    advantage = clipped_advantage(image.advantage, valid, options.advantage_clip)
    weight = jnp.clip(advantage / (2.0 * options.advantage_clip) + 0.5, 0.0, 1.0)[:, None]
    positive = _error(beta * image.velocity + (1.0 - beta) * average, image)
    negative = _error((1.0 + beta) * average - beta * image.velocity, image)
    terms = SCALE * (weight * positive + (1.0 - weight) * negative) / beta
    return matching_share(terms, image, valid, trajectories_total, image_beta=options.image_beta)


def _error(velocity: jax.Array, image: MatchingTerms) -> jax.Array:
    """Computes the normalized errors of velocities, float32[B, J]."""
    size = jnp.mean(jnp.abs(velocity - image.target), axis=(2, 3))
    divisor = jax.lax.stop_gradient(jnp.maximum(size, MIN_ERROR))
    return image.sigma * squared_gap(velocity, image.target) / divisor
