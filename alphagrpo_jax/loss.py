"""GRPO losses of the text and image steps of trajectories, as pure functions of arrays.

Conventions: an image log-prob is a mean over the latent (see `flow.sde`); a text log-prob is one
token's. Every function returns its micro-batch's *share* of the update's loss: sums divided by the
totals of the whole update, which the caller passes in. Shares of micro-batches therefore add up to
the same loss and the same gradient however the update is cut; metrics add up too, or their largest
counts, by the table of `runtime.metric_reductions`. Invalid trajectories (`valid` false) count
nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.runtime.metric_reductions import reduction_of

Metrics = dict[str, jax.Array]  # float32[] each


class TextTerms(NamedTuple):
    """Inputs of the text loss: B trajectories with T scored tokens."""

    new_logp: jax.Array  # float32[B, T], differentiated
    old_logp: jax.Array  # float32[B, T]
    mask: jax.Array  # bool[B, T], the texts' tokens
    advantage: jax.Array  # float32[B]
    entropy: jax.Array  # float32[B, T], for the metrics only
    ref_logp: jax.Array | None = None  # float32[B, T], needed if text_beta > 0
    selected: jax.Array | None = None  # bool[B, T], tokens whose policy loss is trained; None: all


class ImageTerms(NamedTuple):
    """Inputs of the image loss: B trajectories with J stochastic steps."""

    new_logp: jax.Array  # float32[B, J], differentiated
    old_logp: jax.Array  # float32[B, J]
    advantage: jax.Array  # float32[B]
    kl: jax.Array | None = None  # float32[B, J] from `gaussian_kl`, needed if image_beta > 0


def grpo_loss(
    texts: Sequence[TextTerms],
    images: Sequence[ImageTerms],
    valid: jax.Array,
    *,
    text_counts: Sequence[int],
    text_tokens_total: jax.Array,
    trajectories_total: jax.Array,
    options: LossOptions,
    selected_tokens_total: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Computes a micro-batch's share of the update's loss over text and image steps.

    `L_i = (sum_k n_k w L_text_k + sum_j L_image_j) / (K + J)` over K texts and the J stochastic
    steps of all images, where `n_k` counts the stochastic steps of all images that follow the text
    (1 if none does). So a think text before one image has as much weight as the image, and a
    trajectory of texts alone the mean of theirs. The update's loss is the mean over its valid
    trajectories (AlphaGRPO, arXiv 2605.12495, section 3).

    Args:
      texts: terms of each text step.
      images: terms of each image step.
      valid: bool[B], trajectories that count.
      text_counts: `n_k`.
      text_tokens_total: float32[K], tokens of each text step in the whole update.
      trajectories_total: float32[], valid trajectories in the whole update.
      options: `text_loss_weight` is `w`; see also `text_grpo` and `image_grpo`. What is not to be
        trained is left out of the terms: `options.text` and `options.image` are not read here.
      selected_tokens_total: float32[K], those of them that are selected, needed where
        `options.entropy_mean` is "kept" and texts have `selected`.
    Returns:
      (float32[] share, metrics): `loss/total`, and the metrics of `text_grpo` and `image_grpo`,
      means over the steps of a kind.
    Raises:
      ValueError: neither text nor image terms, or another number of counts than of texts.
    """
    if not texts and not images:
        raise ValueError("grpo_loss got neither text nor image terms; expected at least one")
    if len(text_counts) != len(texts):
        raise ValueError(f"got {len(text_counts)} text_counts for {len(texts)} text steps")
    total = jnp.zeros((), jnp.float32)
    step_metrics: dict[str, list[Metrics]] = {"text": [], "image": []}
    for index, (text, count) in enumerate(zip(texts, text_counts, strict=True)):
        share, metrics = text_grpo(
            text,
            valid,
            text_tokens_total=text_tokens_total[index],
            trajectories_total=trajectories_total,
            options=options,
            selected_tokens_total=None
            if selected_tokens_total is None
            else selected_tokens_total[index],
        )
        total += count * options.text_loss_weight * share
        step_metrics["text"].append(metrics)
    for image in images:
        share, metrics = image_grpo(
            image, valid, trajectories_total=trajectories_total, options=options
        )
        total += image.new_logp.shape[1] * share
        step_metrics["image"].append(metrics)
    total /= len(texts) + sum(image.new_logp.shape[1] for image in images)
    metrics = _over_steps(step_metrics["text"]) | _over_steps(step_metrics["image"])
    return total, metrics | {"loss/total": jax.lax.stop_gradient(total)}


def _over_steps(step_metrics: list[Metrics]) -> Metrics:
    """Reduces the metrics of all steps of one kind, by `metric_reductions`."""
    reduced: Metrics = {}
    for name in step_metrics[0] if step_metrics else ():
        values = [metrics[name] for metrics in step_metrics]
        is_max = reduction_of(name).batches == "max"
        reduced[name] = jnp.max(jnp.stack(values)) if is_max else _mean(values)
    return reduced


def _mean(values: list[jax.Array]) -> jax.Array:
    """Averages scalars."""
    return cast(jax.Array, sum(values)) / len(values)


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
    log_ratio = _masked_difference(text.new_logp, text.old_logp, tokens)
    clip = (options.clip_low, options.clip_high)
    if options.level == "token":
        terms, clipped = _clipped(log_ratio, advantage[:, None], *clip)
        loss = _share(terms, selected, tokens_total)
        clip_fraction = _share(clipped, counted, tokens_total)
    else:
        selected_ratio = jnp.where(selected, log_ratio, 0.0)
        terms, clipped = _clipped(_token_mean(selected_ratio, counted), advantage, *clip)
        loss = _share(terms, valid, trajectories_total)
        clip_fraction = _share(clipped, valid, trajectories_total)
    metrics = {
        "text/ratio_max_dev": jnp.max(jnp.where(counted, jnp.abs(jnp.expm1(log_ratio)), 0.0)),
        "text/clip_fraction": clip_fraction,
        "text/entropy": _share(text.entropy, counted, tokens_total),
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
        return _share(ratio * kl, tokens, text_tokens_total)
    ratio = jax.lax.stop_gradient(jnp.exp(_token_mean(log_ratio, tokens)))
    return _share(ratio * _token_mean(kl, tokens), valid, trajectories_total)


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
    advantage = jnp.where(valid, image.advantage, 0.0)
    advantage = jnp.clip(advantage, -options.advantage_clip, options.advantage_clip)
    log_ratio = _masked_difference(image.new_logp, image.old_logp, steps)
    terms, clipped = _clipped(log_ratio, advantage[:, None], options.image_clip, options.image_clip)
    loss = _share(terms, steps, denominator)
    metrics = {
        "image/ratio_max_dev": jnp.max(jnp.abs(jnp.expm1(log_ratio))),
        "image/clip_fraction": _share(clipped, steps, denominator),
    }
    if image.kl is not None:
        chex.assert_equal_shape([image.new_logp, image.kl])
        kl_share = _share(image.kl, steps, denominator)
        if options.image_beta:
            loss += options.image_beta * kl_share
        metrics["image/kl"] = kl_share
    return loss, jax.lax.stop_gradient(metrics | {"loss/image": loss})


def k3_kl(new_logp: jax.Array, ref_logp: jax.Array, mask: jax.Array) -> jax.Array:
    """Estimates a token's KL by `exp(r) - r - 1`, `r = ref - new` (k3, arXiv 2402.03300, eq. 4).

    Args:
      new_logp, ref_logp: float32[B, T].
      mask: bool[B, T].
    Returns:
      float32[B, T], at least 0, and 0 where masked.
    """
    chex.assert_equal_shape([new_logp, ref_logp, mask])
    log_ratio = _masked_difference(ref_logp, new_logp, mask)
    return jnp.expm1(log_ratio) - log_ratio


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


def merge_metrics(first: Mapping[str, jax.Array], second: Mapping[str, jax.Array]) -> Metrics:
    """Reduces the metrics of two micro-batches, by `metric_reductions`.

    Raises:
      ValueError: the two have different names.
    """
    if first.keys() != second.keys():
        raise ValueError(f"got metrics {sorted(second)}, expected the same as {sorted(first)}")
    return {
        name: jnp.maximum(value, second[name])
        if reduction_of(name).micro_batches == "max"
        else value + second[name]
        for name, value in first.items()
    }


def _masked_difference(a: jax.Array, b: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `a - b` where the mask holds, else 0, so that padding never meets an exponential."""
    return jnp.where(mask, a - b, 0.0)


def _clipped(
    log_ratio: jax.Array, advantage: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """Computes PPO's pessimistic surrogate as a loss, and where clipping took the gradient."""
    ratio = jnp.exp(log_ratio)
    plain = -ratio * advantage
    bounded = -jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantage
    return jnp.maximum(plain, bounded), (bounded > plain).astype(jnp.float32)


def _share(terms: jax.Array, mask: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides the sum of the masked terms by the update's denominator (at least 1)."""
    total = jnp.sum(jnp.where(mask, terms, 0.0))
    return total / jnp.maximum(jnp.asarray(denominator, jnp.float32), 1.0)
