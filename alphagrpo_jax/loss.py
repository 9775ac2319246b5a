"""The loss of an update: the losses of all text and image steps of its trajectories, weighted.

The algorithms are in `losses/`, whose `terms` has the conventions; which of them is used is
`loss.text` and `loss.image` of a configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp

from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.losses.awm import image_awm
from alphagrpo_jax.losses.image_grpo import image_grpo
from alphagrpo_jax.losses.nft import image_nft
from alphagrpo_jax.losses.remax import image_remax, text_remax
from alphagrpo_jax.losses.terms import ImageTerms, MatchingTerms, Metrics, TextTerms
from alphagrpo_jax.losses.text_grpo import text_grpo
from alphagrpo_jax.runtime.metric_reductions import reduction_of

# By `loss.text` and `loss.image`.
TEXT_LOSSES: dict[str, Callable[..., tuple[jax.Array, Metrics]]] = {
    "grpo": text_grpo,
    "remax": text_remax,
}
IMAGE_LOSSES: dict[str, Callable[..., tuple[jax.Array, Metrics]]] = {
    "grpo": image_grpo,
    "nft": image_nft,
    "awm": image_awm,
    "remax": image_remax,
}


def grpo_loss(
    texts: Sequence[TextTerms],
    images: Sequence[ImageTerms | MatchingTerms],
    valid: jax.Array,
    *,
    text_counts: Sequence[int],
    text_tokens_total: jax.Array,
    trajectories_total: jax.Array,
    options: LossOptions,
    selected_tokens_total: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Computes a micro-batch's share of the update's loss over text and image steps.

    `L_i = (sum_k n_k w L_text_k + sum_j L_image_j) / (K + J)` over K texts and the J trained
    steps of all images, where `n_k` counts the trained steps of all images that follow the text
    (1 if none does). So a think text before one image has as much weight as the image, and a
    trajectory of texts alone the mean of theirs. The update's loss is the mean over its valid
    trajectories (AlphaGRPO, arXiv 2605.12495, section 3).

    Args:
      texts: terms of each text step.
      images: terms of each image step, of the kind that the algorithm needs.
      valid: bool[B], trajectories that count.
      text_counts: `n_k`.
      text_tokens_total: float32[K], tokens of each text step in the whole update.
      trajectories_total: float32[], valid trajectories in the whole update.
      options: `text_loss_weight` is `w`; `text` and `image` are the algorithms, which read
        further ones. What is not to be trained is left out of the terms.
      selected_tokens_total: float32[K], those of them that are selected, needed where
        `options.entropy_mean` is "kept" and texts have `selected`.
    Returns:
      (float32[] share, metrics): `loss/total`, and the metrics of the algorithms, means over the
      steps of a kind.
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
        share, metrics = TEXT_LOSSES[options.text](
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
        share, metrics = IMAGE_LOSSES[options.image](
            image, valid, trajectories_total=trajectories_total, options=options
        )
        total += trained_steps(image) * share
        step_metrics["image"].append(metrics)
    total /= len(texts) + sum(trained_steps(image) for image in images)
    metrics = _over_steps(step_metrics["text"]) | _over_steps(step_metrics["image"])
    return total, metrics | {"loss/total": jax.lax.stop_gradient(total)}


def trained_steps(image: ImageTerms | MatchingTerms) -> int:
    """Counts the trained steps of an image."""
    return (image.velocity if isinstance(image, MatchingTerms) else image.new_logp).shape[1]


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
