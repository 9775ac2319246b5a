"""Log-probs of stored trajectories, the gradient of the loss, and the optimizer step.

An update is: `forward` of each micro-batch for the old log-probs; then, per micro-batch, `forward`
and `backward`, or `gradient` where the new log-probs are the old ones; then `apply_gradient`. Each
is jitted once, in `training.steps`.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from alphagrpo_jax import loss, policy
from alphagrpo_jax.config import LoraOptions, TrainOptions
from alphagrpo_jax.losses.terms import Metrics
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.ops.log_probs import TextLogProbs
from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.sampling import image
from alphagrpo_jax.sampling.contexts import context, guidance_contexts, rebuild
from alphagrpo_jax.sampling.text import text_log_probs
from alphagrpo_jax.sampling.trajectory import image_options, merged_params
from alphagrpo_jax.training.update_loss import (
    FixedOutputs,
    LossNormalizers,
    UpdateSpec,
    micro_loss,
)
from alphagrpo_jax.types import LogProbs, Rollout, TrainState, UpdateBatch, take_micro_batch


def policy_params(base: dict, trainable: Any, *, lora_scale: float | None) -> policy.PolicyParams:
    """Puts the policy's weights together from the frozen and the trained part.

    Args:
      base: the pretrained parameters.
      trainable: an adapter tree, or a part of the base tree, which it replaces.
      lora_scale: alpha / rank of the adapters; None for the second form.
    """
    if lora_scale is not None:
        return policy.PolicyParams(base=base, lora=trainable, lora_scale=lora_scale)
    flat = traverse_util.flatten_dict(base) | traverse_util.flatten_dict(trainable)
    return policy.PolicyParams(base=traverse_util.unflatten_dict(flat))


def init_trainable(base: dict, key: jax.Array, adapters: LoraOptions, options: TrainOptions) -> Any:
    """Makes what is trained: fresh adapters, or float32 copies of a part of the base.

    Args:
      base: parameter tree.
      key: typed key, for the adapters.
      adapters: rank and targets of the adapters.
      options: which of the two, and a regex over whole parameter paths for the second.
    Raises:
      UsageError: nothing matches.
    """
    if options.trainable == "lora":
        return lora.init(key, base, adapters.targets, rank=adapters.rank)
    flat = traverse_util.flatten_dict(base, sep="/")
    chosen = {
        path: jnp.array(leaf, jnp.float32)
        for path, leaf in sorted(flat.items())
        if re.fullmatch(options.full_targets, path)
    }
    if not chosen:
        raise UsageError(
            f"train.full_targets: got {options.full_targets!r}, which matches none of {len(flat)} "
            f"parameter paths; expected a match, e.g. of {sorted(flat)[:3]}"
        )
    return traverse_util.unflatten_dict(chosen, sep="/")


def log_probs(
    model: Bagel, params: policy.PolicyParams, trajectories: Rollout, *, spec: UpdateSpec
) -> LogProbs:
    """Computes log-probs of the trained steps of B trajectories, in their stored contexts.

    A kind of steps whose loss is "none" is left out: its tuples are empty. Of images whose loss
    matches velocities, velocities take the place of log-probs. The stored contexts are constants;
    with `rebuild_contexts` they are computed again here, so that the gradient flows through them.
    """
    plan, owner = spec.plan, trajectories.owner
    sharing = spec.layout.sharing(spec.rollout.rows_per_prompt)
    pieces = jax.lax.stop_gradient(trajectories.pieces)
    if spec.rebuild_contexts:
        fixed = {"system_tokens": spec.rollout.system_tokens, "grid": spec.rollout.grid}
        pieces = rebuild(model, params, trajectories, plan=plan, **fixed)
    texts = [
        text_log_probs(
            model,
            params,
            kv_cache.merge(context(pieces, step.gen, owner, sharing=sharing)),
            trajectories.texts[step.index].tokens,
            trajectories.texts[step.index].mask,
            temperature=spec.rollout.options.temperature,
            chunk=spec.passes.text_chunk,
        )
        for step in (plan.text_steps if spec.loss.text != "none" else ())
    ]
    image_steps = plan.image_steps if spec.loss.image != "none" else ()
    if spec.loss.matches:
        velocities = tuple(
            image.image_velocities(
                model,
                params,
                guidance_contexts(pieces, step, owner, sharing=sharing).gen,
                trajectories.images[step.index],
                grid=spec.rollout.grid,
                at_once=spec.passes.image_steps_at_once,
            )
            for step in image_steps
        )
        return _outputs(texts, velocities=velocities)
    images = [
        image.image_log_probs(
            model,
            params,
            guidance_contexts(pieces, step, owner, sharing=sharing),
            trajectories.images[step.index],
            options=image_options(spec.rollout.options, step),
            grid=spec.rollout.grid,
            at_once=spec.passes.image_steps_at_once,
        )
        for step in image_steps
    ]
    return _outputs(texts, images)


def _outputs(
    texts: Sequence[TextLogProbs],
    images: Sequence[tuple[jax.Array, jax.Array]] = (),
    velocities: tuple[jax.Array, ...] = (),
) -> LogProbs:
    """Puts the outputs of all steps together; images as log-probs and means, or as velocities."""
    return LogProbs(
        text_log_prob=tuple(step.log_prob for step in texts),
        text_entropy=tuple(step.entropy for step in texts),
        image_log_prob=tuple(logp for logp, _ in images),
        image_mean=tuple(mean for _, mean in images),
        image_velocity=velocities,
    )


@struct.dataclass
class Residuals:
    """Holds what a backward pass needs of its forward pass, without the arrays that both are given.

    A function that jit returns copies the arrays it holds: the frozen weights, 27 of 35 GB per row
    at BAGEL's size.
    """

    arrays: list[jax.Array]
    structure: Any = struct.field(pytree_node=False)  # of the pullback
    inputs: tuple[int | None, ...] = struct.field(pytree_node=False)  # leaves that were given


def forward(
    trainable: Any,
    base: dict,
    trajectories: Rollout,
    micro_batch: jax.Array,
    *,
    model: Bagel,
    spec: UpdateSpec,
) -> tuple[LogProbs, Residuals]:
    """Computes a micro-batch's log-probs, and what its backward pass needs.

    Old and new log-probs both come from this one function, compiled once: before the first step
    of a batch they are the same bits, so that the first ratio is exactly 1.

    Args:
      trainable, base: the policy.
      trajectories: of the whole update.
      micro_batch: int32[], its number.
      model, spec: static.
    """
    new, pullback = _vjp(trainable, base, trajectories, micro_batch, model=model, spec=spec)
    given = {id(x): index for index, x in enumerate(jax.tree.leaves((trainable, base)))}
    leaves, structure = jax.tree.flatten(pullback)
    inputs = tuple(given.get(id(leaf)) for leaf in leaves)
    arrays = [leaf for leaf, index in zip(leaves, inputs, strict=True) if index is None]
    return new, Residuals(arrays, structure, inputs)


def _vjp(
    trainable: Any,
    base: dict,
    trajectories: Rollout,
    micro_batch: jax.Array,
    *,
    model: Bagel,
    spec: UpdateSpec,
) -> tuple[LogProbs, Callable]:
    """Computes a micro-batch's log-probs, and the function from cotangents to the gradient."""
    rows = take_micro_batch(spec.layout, trajectories, micro_batch)

    def compute(trainable: Any) -> LogProbs:
        params = policy_params(base, trainable, lora_scale=spec.lora_scale)
        params = merged_params(params, merge_lora=spec.passes.merge_lora)
        return log_probs(model, params, rows, spec=spec)

    return jax.vjp(compute, trainable)


def reference_log_probs(
    base: dict, trajectories: Rollout, micro_batch: jax.Array, *, model: Bagel, spec: UpdateSpec
) -> LogProbs:
    """Computes a micro-batch's log-probs under the base, in contexts built from the tokens."""
    rows = take_micro_batch(spec.layout, trajectories, micro_batch)
    rebuilt = dataclasses.replace(spec, rebuild_contexts=True)
    return log_probs(model, policy.PolicyParams(base=base), rows, spec=rebuilt)


def average_velocities(
    average: Any,
    base: dict,
    trajectories: Rollout,
    micro_batch: jax.Array,
    *,
    model: Bagel,
    spec: UpdateSpec,
) -> tuple[jax.Array, ...]:
    """Computes a micro-batch's velocities under the average of the trained weights.

    Args:
      average: as `trainable`, from `optimizer.average_of`.
      base, trajectories, micro_batch, model, spec: as of `forward`.
    Returns:
      float32[B, J, M, C] of each image step.
    """
    images_alone = dataclasses.replace(spec, loss=dataclasses.replace(spec.loss, text="none"))
    rows = take_micro_batch(spec.layout, trajectories, micro_batch)
    params = policy_params(base, average, lora_scale=spec.lora_scale)
    params = merged_params(params, merge_lora=spec.passes.merge_lora)
    return log_probs(model, params, rows, spec=images_alone).image_velocity


def backward(
    trainable: Any,
    base: dict,
    residuals: Residuals,
    new: LogProbs,
    old: LogProbs | None,
    fixed: FixedOutputs,
    batch: UpdateBatch,
    micro_batch: jax.Array,
    totals: LossNormalizers,
    weight: jax.Array,
    *,
    spec: UpdateSpec,
) -> tuple[Any, Metrics]:
    """Computes a micro-batch's share of the gradient and of the metrics.

    Args:
      trainable, base: as given to `forward`.
      residuals, new: from `forward` of the same micro-batch.
      old: its log-probs before the first step of the batch; None: `new` itself.
      fixed: the outputs of the policies that the loss compares with.
      batch: of the whole update.
      micro_batch: int32[], its number.
      totals: from `count_normalizers`, over all batches of this task in the update.
      weight: float32[], the task's share of the update's trajectories: 1 unless the update holds
        several tasks. Scales the gradient, not the metrics.
      spec: static.
    """
    given, arrays = jax.tree.leaves((trainable, base)), iter(residuals.arrays)
    leaves = [next(arrays) if index is None else given[index] for index in residuals.inputs]
    pullback = jax.tree.unflatten(residuals.structure, leaves)
    return _pull_back(pullback, new, old, fixed, batch, micro_batch, totals, weight, spec=spec)


def gradient(
    trainable: Any,
    base: dict,
    fixed: FixedOutputs,
    batch: UpdateBatch,
    micro_batch: jax.Array,
    totals: LossNormalizers,
    weight: jax.Array,
    *,
    model: Bagel,
    spec: UpdateSpec,
) -> tuple[Any, Metrics]:
    """Computes `forward` and `backward` in one function, where old log-probs are the new ones.

    Nothing of the forward pass leaves the function, so that the compiler decides what it keeps.
    See `forward` and `backward` for the arguments.
    """
    new, pullback = _vjp(trainable, base, batch.rollout, micro_batch, model=model, spec=spec)
    return _pull_back(pullback, new, None, fixed, batch, micro_batch, totals, weight, spec=spec)


def _pull_back(
    pullback: Callable,
    new: LogProbs,
    old: LogProbs | None,
    fixed: FixedOutputs,
    batch: UpdateBatch,
    micro_batch: jax.Array,
    totals: LossNormalizers,
    weight: jax.Array,
    *,
    spec: UpdateSpec,
) -> tuple[Any, Metrics]:
    """Computes the loss's derivatives by the log-probs, and from them the gradient."""
    rows = take_micro_batch(spec.layout, batch, micro_batch)
    # The last micro-batch may hold rows of the one before a second time.
    rows = rows.replace(valid=rows.valid & spec.layout.new_rows(micro_batch))
    old = jax.lax.stop_gradient(new) if old is None else old

    def weighted_share(new: LogProbs) -> tuple[jax.Array, Metrics]:
        share, metrics = micro_loss(new, old, fixed, rows, totals, spec=spec)
        return weight * share, metrics

    cotangents, metrics = jax.grad(weighted_share, has_aux=True)(new)
    (trainable_gradient,) = pullback(cotangents)
    return trainable_gradient, metrics


def apply_gradient(
    state: TrainState,
    gradient: Any,
    metrics: Metrics,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step.

    A loss or gradient that is not finite leaves the state as it was, and `update/finite` at 0.
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss/total"])
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
    after = (optax.apply_updates(state.trainable, updates), opt_state)
    before = (state.trainable, state.opt_state)
    trainable, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    metrics = metrics | {"update/grad_norm": norm, "update/finite": finite.astype(jnp.float32)}
    return dataclasses.replace(state, trainable=trainable, opt_state=opt_state), metrics


def accumulate(
    gradient: Any, metrics: Metrics, micro_batch: tuple[Any, Metrics]
) -> tuple[Any, Metrics]:
    """Adds a micro-batch's gradient to those before it, and reduces their metrics."""
    gradient = jax.tree.map(jnp.add, gradient, micro_batch[0])
    return gradient, loss.merge_metrics(metrics, micro_batch[1])
