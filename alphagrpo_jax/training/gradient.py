"""Stage 6: scores stored trajectories, and takes one optimizer step on the GRPO loss.

An update is: `forward` of each micro-batch for the old log-probs; then, per micro-batch, `forward`
and `backward`; then `apply`. Each is jitted once, in the command.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from alphagrpo_jax import loss, policy
from alphagrpo_jax.config import LossOptions
from alphagrpo_jax.models import lora
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.sampling import image
from alphagrpo_jax.sampling.trajectory import (
    RolloutSpec,
    context,
    guidance_contexts,
    rebuild,
    step_options,
)
from alphagrpo_jax.tasks import Plan
from alphagrpo_jax.types import (
    LogProbs,
    Rollout,
    TrainState,
    UpdateBatch,
    map_rows,
    row_count,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """What an update compiles for; hashable, a static argument of jit."""

    rollout: RolloutSpec  # of the trajectories
    loss: LossOptions
    micro_batches: int  # into which a batch is cut
    rebuild_contexts: bool  # compute contexts again, so that the gradient flows through them
    lora_scale: float | None  # alpha / rank; None: part of the base is trained

    @property
    def plan(self) -> Plan:
        """The plan of the trajectories' task."""
        return self.rollout.plan


class LossNormalizers(NamedTuple):
    """What a micro-batch has to know of the whole update."""

    tokens: jax.Array  # float32[K], trained tokens of each text step of valid trajectories
    trajectories: jax.Array  # float32[], valid ones
    entropy_threshold: jax.Array  # float32[K], tokens below it are not trained


def policy_params(base: dict, trainable: Any, *, lora_scale: float | None) -> policy.PolicyParams:
    """The policy's weights from the frozen and the trained part.

    Args:
      base: the pretrained parameters.
      trainable: an adapter tree, or a part of the base tree, which it replaces.
      lora_scale: alpha / rank of the adapters; None for the second form.
    """
    if lora_scale is not None:
        return policy.PolicyParams(base=base, lora=trainable, lora_scale=lora_scale)
    flat = traverse_util.flatten_dict(base) | traverse_util.flatten_dict(trainable)
    return policy.PolicyParams(base=traverse_util.unflatten_dict(flat))


def init_trainable(
    base: dict, key: jax.Array, *, rank: int, targets: str, full_targets: str | None
) -> Any:
    """What is trained at the start: fresh adapters, or float32 copies of a part of the base.

    Args:
      base: parameter tree.
      key: typed key, for the adapters.
      rank, targets: of the adapters.
      full_targets: regex over whole parameter paths; None: adapters.
    Raises:
      ValueError: nothing matches.
    """
    if full_targets is None:
        return lora.init(key, base, targets, rank=rank)
    flat = traverse_util.flatten_dict(base, sep="/")
    chosen = {
        path: jnp.array(leaf, jnp.float32)
        for path, leaf in sorted(flat.items())
        if re.fullmatch(full_targets, path)
    }
    if not chosen:
        raise UsageError(
            f"train.full_targets={full_targets!r} matches none of {len(flat)} parameter paths, "
            f"e.g. {sorted(flat)[:3]}"
        )
    return traverse_util.unflatten_dict(chosen, sep="/")


def log_probs(
    model: Bagel, params: policy.PolicyParams, trajectories: Rollout, *, spec: UpdateSpec
) -> LogProbs:
    """Log-probs of all text and image steps of B trajectories, in their stored contexts.

    The stored contexts are constants; with `rebuild_contexts` they are computed again here, so
    that the gradient flows through them.
    """
    plan, rows = spec.plan, row_count(trajectories.inputs)
    pieces = jax.lax.stop_gradient(trajectories.pieces)
    if spec.rebuild_contexts:
        pieces = rebuild(
            model,
            params,
            trajectories,
            plan=plan,
            system_tokens=spec.rollout.system_tokens,
            grid=spec.rollout.grid,
        )
    texts = [
        policy.text_log_probs(
            model,
            params,
            context(pieces, step.gen, rows),
            trajectories.texts[step.index].tokens,
            trajectories.texts[step.index].mask,
            temperature=spec.rollout.options.temperature,
        )
        for step in plan.text_steps
    ]
    images = [
        image.image_log_probs(
            model,
            params,
            guidance_contexts(pieces, step, rows),
            trajectories.images[step.index],
            options=step_options(spec.rollout.options, step),
            grid=spec.rollout.grid,
        )
        for step in plan.image_steps
    ]
    return LogProbs(
        text_log_prob=tuple(each.log_prob for each in texts),
        text_entropy=tuple(each.entropy for each in texts),
        image_log_prob=tuple(logp for logp, _ in images),
        image_mean=tuple(mean for _, mean in images),
    )


def forward(
    trainable: Any,
    base: dict,
    trajectories: Rollout,
    part: jax.Array,
    *,
    model: Bagel,
    spec: UpdateSpec,
) -> tuple[LogProbs, Callable]:
    """Scores one micro-batch, and what its backward pass needs.

    Old and new log-probs both come from this one function, compiled once: before the first step
    of a batch they are the same bits, so that the first ratio is exactly 1.

    Args:
      trainable, base: the policy.
      trajectories: of the whole update.
      part: int32[], which micro-batch.
      model, spec: static.
    Returns:
      The scores, and the function from their cotangents to the gradient (a pytree).
    """
    micro = take_micro_batch(trajectories, part, spec.micro_batches, shared=spec.plan.shared)

    def scores(tree: Any) -> LogProbs:
        params = policy_params(base, tree, lora_scale=spec.lora_scale)
        return log_probs(model, params, micro, spec=spec)

    return jax.vjp(scores, trainable)


def reference_log_probs(
    base: dict, trajectories: Rollout, part: jax.Array, *, model: Bagel, spec: UpdateSpec
) -> LogProbs:
    """Scores of a micro-batch under the base alone, in contexts that it builds from the tokens."""
    micro = take_micro_batch(trajectories, part, spec.micro_batches, shared=spec.plan.shared)
    rebuilt = dataclasses.replace(spec, rebuild_contexts=True)
    return log_probs(model, policy.PolicyParams(base=base), micro, spec=rebuilt)


def backward(
    pullback: Callable,
    new: LogProbs,
    old: LogProbs | None,
    reference: LogProbs | None,
    batch: UpdateBatch,
    part: jax.Array,
    totals: LossNormalizers,
    weight: jax.Array,
    *,
    spec: UpdateSpec,
) -> tuple[Any, loss.Metrics]:
    """A micro-batch's share of the gradient and of the metrics.

    Args:
      pullback, new: from `forward` of the same part.
      old: scores of this part before the first step of the batch; None: `new` itself.
      reference: of this part, if the loss has a KL term.
      batch: of the whole update.
      part: int32[].
      totals: from `count_normalizers`, over all batches of this task in the update.
      weight: float32[], the task's share of the update's trajectories: 1 unless the update holds
        several tasks. Scales the gradient, not the metrics.
      spec: static.
    """
    micro = take_micro_batch(batch, part, spec.micro_batches, shared=spec.plan.shared)
    old = jax.lax.stop_gradient(new) if old is None else old

    def share(scores: LogProbs) -> tuple[jax.Array, loss.Metrics]:
        own, metrics = micro_loss(scores, old, reference, micro, totals, spec=spec)
        return weight * own, metrics

    cotangents, metrics = jax.grad(share, has_aux=True)(new)
    (gradient,) = pullback(cotangents)
    return gradient, metrics


def apply(
    state: TrainState,
    gradient: Any,
    metrics: loss.Metrics,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, loss.Metrics]:
    """One optimizer step. A loss or gradient that is not finite leaves the state as it was;
    `update/finite` tells.
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss/total"])
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
    moved = (optax.apply_updates(state.trainable, updates), opt_state)
    trainable, opt_state = jax.tree.map(
        lambda new, same: jnp.where(finite, new, same), moved, (state.trainable, state.opt_state)
    )
    metrics = metrics | {"update/grad_norm": norm, "update/finite": finite.astype(jnp.float32)}
    return state.replace(trainable=trainable, opt_state=opt_state), metrics


def accumulate(
    first: tuple[Any, loss.Metrics], second: tuple[Any, loss.Metrics]
) -> tuple[Any, loss.Metrics]:
    """Gradients and metrics of two micro-batches as of one."""
    gradient = jax.tree.map(jnp.add, first[0], second[0])
    return gradient, loss.merge_metrics(first[1], second[1])


def take_micro_batch(
    tree: Any, part: jax.Array, parts: int, *, shared: tuple[int, ...] = ()
) -> Any:
    """Rows part, part + parts, part + 2 parts, ... of a batch.

    Strided, so that on a mesh every device holds its share of each micro-batch already.
    """

    def one(axis: int, x: jax.Array) -> jax.Array:
        cut = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(x.reshape(cut), part, axis + 1, keepdims=False)

    return map_rows(one, tree, shared=shared)


def join_entropy(scores: list[LogProbs]) -> tuple[jax.Array, ...]:
    """Entropies float32[B, T - 1] of each text step, from the scores of all parts."""
    stacked = [
        jnp.stack(parts, axis=1)
        for parts in zip(*(each.text_entropy for each in scores), strict=True)
    ]
    return tuple(each.reshape(-1, each.shape[-1]) for each in stacked)


def count_normalizers(
    batch: UpdateBatch, entropy: tuple[jax.Array, ...] | None, *, spec: UpdateSpec
) -> LossNormalizers:
    """The denominators of the means over a batch.

    Args:
      batch: of the whole update, or its trajectories of one task.
      entropy: float32[B, T - 1] of each text step before the update, if only the most uncertain
        tokens are trained.
      spec: static.
    """
    tokens, thresholds = [], []
    for index, sample in enumerate(batch.rollout.texts):
        mask = sample.scored & batch.valid[:, None]
        thresholds.append(jnp.float32(-jnp.inf))
        if entropy is not None:
            fraction = spec.loss.entropy_fraction
            mask = loss.top_entropy_mask(entropy[index], mask, fraction=fraction)
            thresholds[-1] = jnp.min(jnp.where(mask, entropy[index], jnp.inf))
        tokens.append(jnp.sum(mask, dtype=jnp.float32))
    return LossNormalizers(
        jnp.array(tokens, jnp.float32),
        jnp.sum(batch.valid, dtype=jnp.float32),
        jnp.array(thresholds, jnp.float32),
    )


def micro_loss(
    new: LogProbs,
    old: LogProbs,
    reference: LogProbs | None,
    micro: UpdateBatch,
    totals: LossNormalizers,
    *,
    spec: UpdateSpec,
) -> tuple[jax.Array, loss.Metrics]:
    """A micro-batch's share of the update's loss, as a function of the new scores."""
    trajectories, own, plan = micro.rollout, spec.loss, spec.plan
    text_kl, image_kl = (own.report_kl or beta > 0 for beta in (own.text_beta, own.image_beta))
    text_trained, image_trained = own.text != "none", own.image != "none"
    texts = [
        loss.TextTerms(
            new_logp=new.text_log_prob[k],
            old_logp=old.text_log_prob[k],
            # An entropy of NaN counts.
            mask=sample.scored & ~(old.text_entropy[k] < totals.entropy_threshold[k]),
            advantage=micro.advantage,
            entropy=jax.lax.stop_gradient(new.text_entropy[k]),
            ref_logp=reference.text_log_prob[k] if text_kl else None,
        )
        for k, sample in enumerate(trajectories.texts if text_trained else ())
    ]
    images = [
        loss.ImageTerms(
            new_logp=new.image_log_prob[k],
            old_logp=old.image_log_prob[k],
            advantage=micro.image_advantage,
            kl=_image_kl(k, new, reference, trajectories, spec) if image_kl else None,
        )
        for k in range(len(plan.image_steps) if image_trained else 0)
    ]
    followed = [spec.rollout.options.window if image_trained else 0] * len(plan.text_steps)
    counts = [max(1, n * drawn) for n, drawn in zip(followed, plan.followed_by_image, strict=True)]
    share, metrics = loss.grpo_loss(
        texts,
        images,
        micro.valid,
        text_counts=counts if text_trained else (),
        text_tokens_total=totals.tokens,
        trajectories_total=totals.trajectories,
        options=spec.loss,
    )
    return share, metrics | {"logp/rollout_update_max_abs_diff": _sampler_gap(old, trajectories)}


def _image_kl(
    index: int,
    new: LogProbs,
    reference: LogProbs,
    trajectories: Rollout,
    spec: UpdateSpec,
) -> jax.Array:
    """KL to the reference of every stochastic step of an image, float32[B, J]."""
    options = spec.rollout.options
    sample, levels = trajectories.images[index], jnp.asarray(image.noise_levels(options))
    columns = []
    for j in range(options.window):
        x, at = sample.before[:, j], sample.start + j
        _, std = image.transition(x, x, levels[at], levels[at + 1], options=options)
        pair = (new.image_mean[index][:, j], reference.image_mean[index][:, j])
        columns.append(loss.gaussian_kl(*pair, std))
    return jnp.stack(columns, axis=1)


def _sampler_gap(old: LogProbs, trajectories: Rollout) -> jax.Array:
    """Largest difference between the sampler's own log-probs and the update's, float32[]."""
    gaps = [
        jnp.max(jnp.where(sample.scored, jnp.abs(sample.log_prob - logp), 0.0))
        for sample, logp in zip(trajectories.texts, old.text_log_prob, strict=True)
    ] + [
        jnp.max(jnp.abs(sample.log_prob - logp))
        for sample, logp in zip(trajectories.images, old.image_log_prob, strict=True)
    ]
    return jax.lax.stop_gradient(jnp.max(jnp.stack(gaps)))
