"""GRPO on the stochastic steps of images (Flow-GRPO): clipped ratios, and a KL."""

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.losses.terms import (
    ImageTerms,
    Metrics,
    clipped_advantage,
    clipped_surrogate,
    masked_difference,
    share_of_mean,
)


def image_grpo(
    image: ImageTerms,
    valid: jax.Array,
    *,
    trajectories_total: jax.Array,
    options: LossOptions,
) -> tuple[jax.Array, Metrics]:
    """Computes the clipped loss on stochastic image steps (Flow-GRPO, arXiv 2505.05470, eq. 5).

    `max(-rho A, -clip(rho, 1 - c, 1 + c) A) + image_beta KL` with `rho = exp(new - old)` of the
    step's mean log-prob and A clipped to +-`advantage_clip`; mean over steps and trajectories.

    Args:
      image: log-probs and advantages, and the steps' KL to the reference policy if known.
      valid: bool[B].
      trajectories_total: float32[].
      options: `image_clip` is `c`, small because a log-prob is a mean over the latent;
        `advantage_clip`, the largest magnitude of A; and `image_beta`.
    Returns:
      (float32[] share, metrics): `loss/image`, `image/ratio_max_dev`, `image/clip_fraction`, and
      `image/kl` where given.
    Raises:
      ValueError: `image_beta` without KL terms.
    """
    if options.image_beta and image.kl is None:
        raise ValueError(
            f"got image_beta={options.image_beta} without kl; pass gaussian_kl of every step"
        )
    chex.assert_rank([image.new_logp, image.advantage, valid], [2, 1, 1])
    chex.assert_equal_shape([image.new_logp, image.old_logp])
    chex.assert_equal_shape([image.advantage, valid])
    chex.assert_type([image.new_logp, valid], [jnp.float32, bool])
    steps = jnp.broadcast_to(valid[:, None], image.new_logp.shape)
    denominator = trajectories_total * image.new_logp.shape[1]
    advantage = clipped_advantage(image.advantage, valid, options.advantage_clip)
    log_ratio = masked_difference(image.new_logp, image.old_logp, steps)
    terms, clipped = clipped_surrogate(
        log_ratio, advantage[:, None], options.image_clip, options.image_clip
    )
    loss = share_of_mean(terms, steps, denominator)
    metrics = {
        "image/ratio_max_dev": jnp.max(jnp.abs(jnp.expm1(log_ratio))),
        "image/clip_fraction": share_of_mean(clipped, steps, denominator),
    }
    if image.kl is not None:
        chex.assert_equal_shape([image.new_logp, image.kl])
        kl_share = share_of_mean(image.kl, steps, denominator)
        if options.image_beta:
            loss += options.image_beta * kl_share
        metrics["image/kl"] = kl_share
    return loss, jax.lax.stop_gradient(metrics | {"loss/image": loss})


def gaussian_kl(mean: jax.Array, mean_ref: jax.Array, std: jax.Array) -> jax.Array:
    """Computes the KL of two transitions of equal spread: mean of `(m - m_ref)^2 / (2 std^2)`.

    As released by Flow-GRPO and AlphaGRPO, `std` is the diffusion coefficient, without `sqrt(-dt)`.

    Args:
      mean, mean_ref: float32[B, M, C].
      std: float32[] or float32[B], positive.
    Returns:
      float32[B].
    """
    chex.assert_rank([mean, std], [3, {0, 1}])
    chex.assert_equal_shape([mean, mean_ref])
    chex.assert_type([mean, mean_ref], jnp.float32)
    return jnp.mean(jnp.square(mean - mean_ref), axis=(1, 2)) / (2.0 * jnp.square(std))
