"""AWM, advantage-weighted matching: PPO's ratio, of how well finished images match.

Images are sampled by plain ODE steps. Source: AWM (arXiv 2509.25050) in the form in which AlphaGRPO
(arXiv 2605.12495) trains BAGEL.
"""

import jax
import jax.numpy as jnp

from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.losses.terms import (
    MatchingTerms,
    Metrics,
    check_matching,
    clipped_advantage,
    clipped_surrogate,
    masked_difference,
    matching_share,
    share_of_mean,
    squared_gap,
)

POWER = 0.25  # of the squared error
FLOOR = 1e-10  # keeps the root's slope finite where the error vanishes


def matching_log_prob(velocity: jax.Array, target: jax.Array, sigma: jax.Array) -> jax.Array:
    """Computes `-((e + 1e-10)^p - 1e-10^p) sigma / p`, `e = mean((v - target)^2)`, `p = 0.25`.

    It stands for a log-prob of the finished image: the better the velocity matches, the higher.

    Args:
      velocity, target: float32[B, J, M, C].
      sigma: float32[B, J].
    Returns:
      float32[B, J], at most 0.
    """
    error = squared_gap(velocity, target)
    return -((error + FLOOR) ** POWER - FLOOR**POWER) * sigma / POWER


def image_awm(
    image: MatchingTerms,
    valid: jax.Array,
    *,
    trajectories_total: jax.Array,
    options: LossOptions,
) -> tuple[jax.Array, Metrics]:
    """Computes a micro-batch's share of the loss of advantage-weighted matching.

    `max(-rho a, -clip(rho, 1 - c, 1 + c) a)` with `rho = exp(new - old)` of `matching_log_prob`,
    `c = awm_clip` and `a` the advantage, bounded by +-`advantage_clip` and divided by it; plus
    `awm_average_beta mean((v - v_avg)^2)` and `image_beta mean((v - v_ref)^2)`; mean over noise
    levels and the update's valid trajectories.

    Args:
      image: velocities, targets, noise levels and advantages.
      valid: bool[B].
      trajectories_total: float32[], valid trajectories in the whole update.
      options: `awm_clip`, `awm_average_beta`, `advantage_clip`, `image_beta`.
    Returns:
      (float32[] share, metrics): `loss/image`, `image/ratio_max_dev`, `image/clip_fraction`, and
      the metrics of `terms.matching_share`.
    Raises:
      ValueError: `image_beta` without reference velocities.
    """
    check_matching(image, valid, image_beta=options.image_beta)
    old = jax.lax.stop_gradient(matching_log_prob(image.old_velocity, image.target, image.sigma))
    new = matching_log_prob(image.velocity, image.target, image.sigma)
    steps = jnp.broadcast_to(valid[:, None], new.shape)
    log_ratio = masked_difference(new, old, steps)
    limit, clip = options.advantage_clip, options.awm_clip
    advantage = clipped_advantage(image.advantage, valid, limit)[:, None] / limit
    terms, clipped = clipped_surrogate(log_ratio, advantage, clip, clip)
    average = jax.lax.stop_gradient(image.average_velocity)
    terms += options.awm_average_beta * squared_gap(image.velocity, average)
    loss, metrics = matching_share(
        terms, image, valid, trajectories_total, image_beta=options.image_beta
    )
    denominator = trajectories_total * image.sigma.shape[1]
    ratio_metrics = {
        "image/ratio_max_dev": jnp.max(jnp.abs(jnp.expm1(log_ratio))),
        "image/clip_fraction": share_of_mean(clipped, steps, denominator),
    }
    return loss, metrics | jax.lax.stop_gradient(ratio_metrics)
