"""GRPO on the tokens of texts: clipped ratios per token or per sequence, and a KL."""

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.losses.terms import (
    Metrics,
    TextTerms,
    clipped_surrogate,
    masked_difference,
    share_of_mean,
)


def text_grpo(
    text: TextTerms,
    valid: jax.Array,
    *,
    text_tokens_total: jax.Array,
    trajectories_total: jax.Array,
    options: LossOptions,
    selected_tokens_total: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Computes the clipped loss on sampled tokens, per token (GRPO) or per sequence (GSPO).

    `-min(rho A, clip(rho, 1 - low, 1 + high) A)` with `rho = exp(new - old)` per token, mean over
    the update's tokens (arXiv 2402.03300, eq. 3), or `rho = exp(mean_t(new - old))` per sequence,
    mean over the update's trajectories (arXiv 2507.18071, eq. 7); plus `text_beta` times the KL,
    see `_text_kl`.

    Where some tokens are selected, the others have no policy loss but stay in the mean: their terms
    count as 0, per token or in the sequence's mean log-ratio (as AlphaGRPO released it). With
    `entropy_mean` "kept" all means but the KL's are over the selected tokens alone.

    Args:
      text: log-probs, masks and advantages.
      valid: bool[B].
      text_tokens_total: float32[], number of true entries of mask and valid in the whole update.
      trajectories_total: float32[].
      options: `level`, `clip_low` and `clip_high`, the two distances from 1 at which the ratio is
        clipped, `entropy_mean`, and `text_beta`.
      selected_tokens_total: float32[], number of true entries of mask, selected and valid in the
        whole update; needed with `selected` and `entropy_mean` "kept".
    Returns:
      (float32[] share, metrics): `loss/text`, `text/ratio_max_dev` (largest |token ratio - 1|),
      `text/clip_fraction`, `text/entropy`, and `text/kl` where a reference is given.
    Raises:
      ValueError: `text_beta` without reference log-probs, or `selected` without its number.
    """
    _check_text(text, valid, options, selected_tokens_total)
    tokens = text.mask & valid[:, None]
    selected = tokens if text.selected is None else tokens & text.selected
    counted, tokens_total = tokens, text_tokens_total
    if options.entropy_mean == "kept" and selected_tokens_total is not None:
        counted, tokens_total = selected, selected_tokens_total
    advantage = jnp.where(valid, text.advantage, 0.0)
    log_ratio = masked_difference(text.new_logp, text.old_logp, tokens)
    clip = (options.clip_low, options.clip_high)
    if options.level == "token":
        terms, clipped = clipped_surrogate(log_ratio, advantage[:, None], *clip)
        loss = share_of_mean(terms, selected, tokens_total)
        clip_fraction = share_of_mean(clipped, counted, tokens_total)
    else:
        selected_ratio = jnp.where(selected, log_ratio, 0.0)
        terms, clipped = clipped_surrogate(_token_mean(selected_ratio, counted), advantage, *clip)
        loss = share_of_mean(terms, valid, trajectories_total)
        clip_fraction = share_of_mean(clipped, valid, trajectories_total)
    metrics = {
        "text/ratio_max_dev": jnp.max(jnp.where(counted, jnp.abs(jnp.expm1(log_ratio)), 0.0)),
        "text/clip_fraction": clip_fraction,
        "text/entropy": share_of_mean(text.entropy, counted, tokens_total),
    }
    if text.ref_logp is not None:
        kl = k3_kl(text.new_logp, text.ref_logp, tokens)
        totals = (text_tokens_total, trajectories_total)
        kl_share = _text_kl(kl, log_ratio, tokens, valid, *totals, options=options)
        if options.text_beta:  # a KL that is only reported never touches the gradient
            loss += options.text_beta * kl_share
        metrics["text/kl"] = kl_share
    return loss, jax.lax.stop_gradient(metrics | {"loss/text": loss})


def _check_text(
    text: TextTerms,
    valid: jax.Array,
    options: LossOptions,
    selected_tokens_total: jax.Array | None,
) -> None:
    """Refuses terms that do not fit each other or the options."""
    if options.text_beta and text.ref_logp is None:
        raise ValueError(
            f"got text_beta={options.text_beta} without ref_logp; pass the reference log-probs"
        )
    if options.entropy_mean == "kept" and (text.selected is None) != (
        selected_tokens_total is None
    ):
        raise ValueError(
            "got only one of TextTerms.selected and selected_tokens_total with entropy_mean='kept',"
            " expected both or neither; pass the number of selected tokens of the whole update"
        )
    chex.assert_rank([text.new_logp, text.advantage, valid], [2, 1, 1])
    chex.assert_equal_shape([text.new_logp, text.old_logp, text.mask, text.entropy])
    chex.assert_equal_shape([text.advantage, valid])
    chex.assert_type([text.new_logp, text.mask, valid], [jnp.float32, bool, bool])
    if text.selected is not None:
        chex.assert_equal_shape([text.mask, text.selected])
        chex.assert_type(text.selected, bool)


def _token_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums float32[B, T] over T and divides by each row's masked entries (at least 1)."""
    length = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)
    return jnp.sum(values, axis=1) / length


def _text_kl(
    kl: jax.Array,
    log_ratio: jax.Array,
    tokens: jax.Array,
    valid: jax.Array,
    text_tokens_total: jax.Array,
    trajectories_total: jax.Array,
    *,
    options: LossOptions,
) -> jax.Array:
    """Computes a micro-batch's share of the texts' KL, as AlphaGRPO released it.

    It is the mean over all tokens of `rho kl`, or over the sequences of `rho mean_t(kl)`, whatever
    tokens are selected. `rho`, the importance ratio, is a constant here, and exactly 1 in the first
    optimizer step of a batch.
    """
    if options.level == "token":
        ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
        return share_of_mean(ratio * kl, tokens, text_tokens_total)
    ratio = jax.lax.stop_gradient(jnp.exp(_token_mean(log_ratio, tokens)))
    return share_of_mean(ratio * _token_mean(kl, tokens), valid, trajectories_total)


def k3_kl(new_logp: jax.Array, ref_logp: jax.Array, mask: jax.Array) -> jax.Array:
    """Estimates a token's KL by `exp(r) - r - 1`, `r = ref - new` (k3, arXiv 2402.03300, eq. 4).

    Args:
      new_logp, ref_logp: float32[B, T].
      mask: bool[B, T].
    Returns:
      float32[B, T], at least 0, and 0 where masked.
    """
    chex.assert_equal_shape([new_logp, ref_logp, mask])
    log_ratio = masked_difference(ref_logp, new_logp, mask)
    return jnp.expm1(log_ratio) - log_ratio


def top_entropy_mask(entropy: jax.Array, mask: jax.Array, *, fraction: float) -> jax.Array:
    """Selects the tokens whose entropy is in the update's top `fraction` (arXiv 2506.01939).

    Call it once with all of an update's tokens, so that micro-batches do not change the choice.

    Args:
      entropy: float32[B, T].
      mask: bool[B, T].
      fraction: share of the masked tokens to select, in (0, 1]; ties at the threshold are.
    Returns:
      bool[B, T], a subset of `mask`.
    """
    chex.assert_rank(entropy, 2)
    chex.assert_equal_shape([entropy, mask])
    chex.assert_type([entropy, mask], [jnp.float32, bool])
    if fraction >= 1.0:
        return mask
    threshold = jnp.nanquantile(jnp.where(mask, entropy, jnp.nan), 1.0 - fraction)
    return mask & (entropy >= threshold)
