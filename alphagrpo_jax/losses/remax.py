"""ReMax: REINFORCE on text tokens or stochastic image steps, without ratios and clipping.

Source: ReMax (arXiv 2310.10505) in the form in which AlphaGRPO (arXiv 2605.12495) offers it; the
baseline is that of the advantage (`advantage.std` "none" leaves its scale away).
"""

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.losses.terms import (
    ImageTerms,
    Metrics,
    TextTerms,
    clipped_advantage,
    masked_difference,
    share_of_mean,
)
from alphagrpo_jax.losses.text_grpo import k3_kl

SCALE = 10.0  # divides the advantage, as released


def text_remax(
    text: TextTerms,
    valid: jax.Array,
    *,
    text_tokens_total: jax.Array,
    trajectories_total: jax.Array,
    options: LossOptions,
    selected_tokens_total: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Computes a micro-batch's share of `-(A / 10) log p` of texts, A within +-`advantage_clip`.

    Mean over the update's tokens (`level` "token"), or over its trajectories of each text's mean
    log-prob ("sequence").

    Args:
      text: log-probs, mask and advantages; `selected` is not supported.
      valid: bool[B].
      text_tokens_total, trajectories_total: float32[], of the whole update.
      options: `level` and `advantage_clip`.
      selected_tokens_total: None; the argument is that of `text_grpo`.
    Returns:
      (float32[] share, metrics): `loss/text`, `text/ratio_max_dev` (largest |token ratio - 1|),
      `text/entropy`, and `text/kl`, mean over tokens, where a reference is given.
    Raises:
      ValueError: selected tokens, or a weight of the KL.
    """
    if text.selected is not None or selected_tokens_total is not None or options.text_beta:
        raise ValueError(
            "loss.text=remax has neither selected tokens nor a KL; set loss.entropy_fraction=1 "
            "and loss.text_beta=0"
        )
    chex.assert_rank([text.new_logp, text.advantage, valid], [2, 1, 1])
    chex.assert_equal_shape([text.new_logp, text.old_logp, text.mask, text.entropy])
    tokens = text.mask & valid[:, None]
    weight = -clipped_advantage(text.advantage, valid, options.advantage_clip) / SCALE
    log_p = jnp.where(tokens, text.new_logp, 0.0)
    if options.level == "token":
        loss = share_of_mean(weight[:, None] * log_p, tokens, text_tokens_total)
    else:
        length = jnp.maximum(jnp.sum(tokens, axis=1, dtype=jnp.float32), 1.0)
        mean_log_p = jnp.sum(log_p, axis=1) / length
        loss = share_of_mean(weight * mean_log_p, valid, trajectories_total)
    log_ratio = masked_difference(text.new_logp, text.old_logp, tokens)
    metrics = {
        "loss/text": loss,
        "text/ratio_max_dev": jnp.max(jnp.abs(jnp.expm1(log_ratio))),
        "text/entropy": share_of_mean(text.entropy, tokens, text_tokens_total),
    }
    if text.ref_logp is not None:
        kl = k3_kl(text.new_logp, text.ref_logp, tokens)
        metrics["text/kl"] = share_of_mean(kl, tokens, text_tokens_total)
    return loss, jax.lax.stop_gradient(metrics)


def image_remax(
    image: ImageTerms,
    valid: jax.Array,
    *,
    trajectories_total: jax.Array,
    options: LossOptions,
) -> tuple[jax.Array, Metrics]:
    """Computes a micro-batch's share of `-(A / 10) log p` of stochastic image steps.

    A within +-`advantage_clip`; mean over steps and the update's trajectories.

    Args:
      image: log-probs and advantages.
      valid: bool[B].
      trajectories_total: float32[], valid trajectories in the whole update.
      options: `advantage_clip`.
    Returns:
      (float32[] share, metrics): `loss/image`, `image/ratio_max_dev`, and `image/kl` where given.
    Raises:
      ValueError: a weight of the KL.
    """
    if options.image_beta:
        raise ValueError("loss.image=remax has no KL; set loss.image_beta=0")
    chex.assert_rank([image.new_logp, image.advantage, valid], [2, 1, 1])
    chex.assert_equal_shape([image.new_logp, image.old_logp])
    steps = jnp.broadcast_to(valid[:, None], image.new_logp.shape)
    denominator = trajectories_total * image.new_logp.shape[1]
    weight = -clipped_advantage(image.advantage, valid, options.advantage_clip) / SCALE
    log_p = jnp.where(steps, image.new_logp, 0.0)
    loss = share_of_mean(weight[:, None] * log_p, steps, denominator)
    log_ratio = masked_difference(image.new_logp, image.old_logp, steps)
    metrics = {
        "loss/image": loss,
        "image/ratio_max_dev": jnp.max(jnp.abs(jnp.expm1(log_ratio))),
    }
    if image.kl is not None:
        metrics["image/kl"] = share_of_mean(image.kl, steps, denominator)
    return loss, jax.lax.stop_gradient(metrics)
