"""The loss of a micro-batch as a function of log-probs and velocities, and its normalizers."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alphagrpo_jax import loss
from alphagrpo_jax.config import LossOptions, PassOptions
from alphagrpo_jax.losses.image_grpo import gaussian_kl
from alphagrpo_jax.losses.terms import ImageTerms, MatchingTerms, Metrics, TextTerms
from alphagrpo_jax.losses.text_grpo import top_entropy_mask
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.sampling import image
from alphagrpo_jax.sampling.trajectory import RolloutSpec
from alphagrpo_jax.tasks import Plan
from alphagrpo_jax.types import LogProbs, Rollout, UpdateBatch


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """Everything that an update is compiled for; hashable, a static argument of jit."""

    rollout: RolloutSpec  # of the trajectories
    loss: LossOptions
    layout: RowLayout  # rows over the mesh, and their micro-batches
    rebuild_contexts: bool  # compute contexts again, so that the gradient flows through them
    lora_scale: float | None  # alpha / rank; None: part of the base is trained
    passes: PassOptions

    @property
    def plan(self) -> Plan:
        """Plan of the trajectories' task."""
        return self.rollout.plan


class FixedOutputs(NamedTuple):
    """Outputs of the policies that the loss compares the trained one with, of a micro-batch."""

    reference: LogProbs | None = None  # of the base; None without a KL term
    average: tuple[jax.Array, ...] | None = None  # velocities under `optimizer.average_of`


class LossNormalizers(NamedTuple):
    """Batch-wide normalizers shared by all micro-batches."""

    tokens: jax.Array  # float32[K], tokens of each text step of valid trajectories
    selected_tokens: jax.Array  # float32[K], those of them that are trained
    trajectories: jax.Array  # float32[], valid ones
    entropy_threshold: jax.Array  # float32[K], tokens below it are not trained


def join_entropy(micro_batches: list[LogProbs], *, layout: RowLayout) -> tuple[jax.Array, ...]:
    """Joins the entropies of all micro-batches, float32[B, T - 1] per text step, rows in order."""
    steps = zip(*(log_probs.text_entropy for log_probs in micro_batches), strict=True)
    return tuple(layout.join(list(entropies)) for entropies in steps)


def count_normalizers(
    batch: UpdateBatch, entropy: tuple[jax.Array, ...] | None, *, spec: UpdateSpec
) -> LossNormalizers:
    """Counts the denominators of the means over a batch.

    Args:
      batch: of the whole update, or its trajectories of one task.
      entropy: float32[B, T - 1] of each text step before the update, if only the most uncertain
        tokens are trained.
      spec: static.
    """
    tokens, selected_tokens, thresholds = [], [], []
    for index, sample in enumerate(batch.rollout.texts):
        mask = sample.scored & batch.valid[:, None]
        tokens.append(jnp.sum(mask, dtype=jnp.float32))
        thresholds.append(jnp.float32(-jnp.inf))
        if entropy is not None:
            fraction = spec.loss.entropy_fraction
            mask = top_entropy_mask(entropy[index], mask, fraction=fraction)
            thresholds[-1] = jnp.min(jnp.where(mask, entropy[index], jnp.inf))
        selected_tokens.append(jnp.sum(mask, dtype=jnp.float32))
    return LossNormalizers(
        jnp.array(tokens, jnp.float32),
        jnp.array(selected_tokens, jnp.float32),
        jnp.sum(batch.valid, dtype=jnp.float32),
        jnp.array(thresholds, jnp.float32),
    )


def micro_loss(
    new: LogProbs,
    old: LogProbs,
    fixed: FixedOutputs,
    micro_batch: UpdateBatch,
    totals: LossNormalizers,
    *,
    spec: UpdateSpec,
) -> tuple[jax.Array, Metrics]:
    """Computes a micro-batch's share of the update's loss, a function of the new log-probs."""
    trajectories, options, plan = micro_batch.rollout, spec.loss, spec.plan
    reference = fixed.reference
    text_kl, image_kl = (
        options.report_kl or beta > 0 for beta in (options.text_beta, options.image_beta)
    )
    if (text_kl or image_kl) and reference is None:
        raise ValueError("got no reference log-probs, which a KL term needs; pass them")
    text_trained, image_trained = options.text != "none", options.image != "none"
    selects = options.entropy_fraction < 1.0
    texts = [
        TextTerms(
            new_logp=new.text_log_prob[k],
            old_logp=old.text_log_prob[k],
            mask=sample.scored,
            advantage=micro_batch.advantage,
            entropy=jax.lax.stop_gradient(new.text_entropy[k]),
            ref_logp=reference.text_log_prob[k] if reference is not None and text_kl else None,
            # Not `>=`: tokens whose entropy is NaN are trained too.
            selected=~(old.text_entropy[k] < totals.entropy_threshold[k]) if selects else None,
        )
        for k, sample in enumerate(trajectories.texts if text_trained else ())
    ]
    image_terms = _matching_terms if options.matches else functools.partial(_image_terms, spec=spec)
    with_kl = fixed if image_kl else fixed._replace(reference=None)
    images = [
        image_terms(k, new, old, with_kl, micro_batch)
        for k in range(len(plan.image_steps) if image_trained else 0)
    ]
    image_steps = spec.rollout.options.window if image_trained else 0
    share, metrics = loss.grpo_loss(
        texts,
        images,
        micro_batch.valid,
        text_counts=plan.text_counts(image_steps) if text_trained else (),
        text_tokens_total=totals.tokens,
        trajectories_total=totals.trajectories,
        options=options,
        selected_tokens_total=totals.selected_tokens if selects else None,
    )
    return share, metrics | {"logp/rollout_update_max_abs_diff": _sampler_gap(old, trajectories)}


def _image_terms(
    index: int,
    new: LogProbs,
    old: LogProbs,
    fixed: FixedOutputs,
    micro_batch: UpdateBatch,
    *,
    spec: UpdateSpec,
) -> ImageTerms:
    """Returns the terms of an image step whose loss is of log-probs."""
    reference = fixed.reference
    return ImageTerms(
        new_logp=new.image_log_prob[index],
        old_logp=old.image_log_prob[index],
        advantage=micro_batch.image_advantage,
        kl=None
        if reference is None
        else _image_kl(index, new, reference, micro_batch.rollout, spec),
    )


def _matching_terms(
    index: int,
    new: LogProbs,
    old: LogProbs,
    fixed: FixedOutputs,
    micro_batch: UpdateBatch,
) -> MatchingTerms:
    """Returns the terms of an image step whose loss matches velocities."""
    if fixed.average is None:
        raise ValueError("got no velocities of the average policy; pass `average_velocities`")
    sample, reference = micro_batch.rollout.images[index], fixed.reference
    return MatchingTerms(
        velocity=new.image_velocity[index],
        target=sample.after - sample.latents[:, None],
        sigma=sample.sigma,
        advantage=micro_batch.image_advantage,
        old_velocity=old.image_velocity[index],
        average_velocity=fixed.average[index],
        ref_velocity=None if reference is None else reference.image_velocity[index],
    )


def _image_kl(
    index: int,
    new: LogProbs,
    reference: LogProbs,
    trajectories: Rollout,
    spec: UpdateSpec,
) -> jax.Array:
    """Computes the KL to the reference of an image's stochastic steps, float32[B, J]."""
    options = spec.rollout.options
    sample, levels = trajectories.images[index], jnp.asarray(image.noise_levels(options))
    columns = []
    for j in range(options.window):
        x, at = sample.before[:, j], sample.start + j
        _, std = image.transition(x, x, levels[at], levels[at + 1], options=options)
        means = (new.image_mean[index][:, j], reference.image_mean[index][:, j])
        columns.append(gaussian_kl(*means, std))
    return jnp.stack(columns, axis=1)


def _sampler_gap(old: LogProbs, trajectories: Rollout) -> jax.Array:
    """Computes the largest difference of the sampler's log-probs and the update's, float32[]."""
    # Not strict: a kind of steps that is not trained has no log-probs.
    gaps = [jnp.float32(0.0)]
    for sample, logp in zip(trajectories.texts, old.text_log_prob, strict=False):
        gaps.append(jnp.max(jnp.where(sample.scored, jnp.abs(sample.log_prob - logp), 0.0)))
    for sample, logp in zip(trajectories.images, old.image_log_prob, strict=False):
        gaps.append(jnp.max(jnp.abs(sample.log_prob - logp)))
    return jax.lax.stop_gradient(jnp.max(jnp.stack(gaps)))
