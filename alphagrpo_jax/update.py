"""Stages 5 and 6: computes the loss's gradient over an update and takes the optimizer steps."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.metric_reductions import reduction_of
from alphagrpo_jax.runtime.stopping import NEVER
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.checks import TrainingError, check_sampled
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.training.gradient import Residuals
from alphagrpo_jax.training.optimizer import average_of
from alphagrpo_jax.training.pacing import MicroBatches
from alphagrpo_jax.training.steps import TaskFns
from alphagrpo_jax.training.update_loss import FixedOutputs, LossNormalizers
from alphagrpo_jax.types import BatchAdvantages, LogProbs, RolloutBatch, TrainState, UpdateBatch


class UpdateMetrics(NamedTuple):
    """Metrics of an update."""

    update: dict[str, float]  # of the update as a whole
    batches: list[dict[str, float]]  # of each batch


class OldLogProbs(NamedTuple):
    """The log-probs of a batch before its update, by micro-batch."""

    log_probs: list[LogProbs]
    # What the backward pass needs, for the first optimizer step, which takes it out; else Nones.
    residuals: list[Residuals | None]


def old_log_probs(run: Run, state: TrainState, rollout: RolloutBatch) -> OldLogProbs | None:
    """Computes the log-probs before the update.

    Returns:
      None with `train.old_logprob` "self", where the loss takes its own log-probs for the old ones.
    Raises:
      StoppedError: a stop is overdue.
    """
    if run.config.train.old_logprob == "self":
        return None
    forward = run.tasks[rollout.batch.task.name].fns.forward
    old, pace = OldLogProbs([], []), MicroBatches(run.stop)
    for index in _micro_batch_indices(run, rollout.batch.task.name):
        pace.begin()
        policy = (state.trainable, run.loaded.base)
        new, residuals = pace.call(forward, *policy, rollout.trajectories, index)
        old.log_probs.append(new)
        old.residuals.append(residuals if run.config.train.keep_residuals else None)
        del residuals  # else it would lie beside the next micro-batch's
        pace.dispatched(new)
    return old


def step(
    run: Run,
    state: TrainState,
    rollouts: Sequence[RolloutBatch],
    old: Sequence[OldLogProbs | None],
    advantages: Sequence[BatchAdvantages],
    step: int,
) -> tuple[TrainState, UpdateMetrics]:
    """Takes the optimizer steps of one update; leaves the state as it was if nothing differs.

    The loss is the mean over the update's trajectories: batches of one task count as one large
    batch, tasks by their trajectories. A batch that is left out counts nowhere; one whose
    advantages happen to be all zero counts like any other.

    Args:
      run: the run.
      state: its memory is given to the new state once the last optimizer step is taken; if all
        weights are trained, already with the first.
      rollouts, old, advantages: one entry per batch, from the stages before. Residuals of `old`
        are taken out, so that their memory is free.
      step: number of the update, for messages.
    Raises:
      TrainingError: a loss or gradient that is not finite, before it has changed anything; or
        nothing differs and the sampled log-probs are not finite.
      StoppedError: a stop is overdue, and the state as it was before is still there.
    """
    if all(batch.text.all_zero and not batch.image.any() for batch in advantages):
        for rollout in rollouts:
            check_sampled(rollout.trajectories, step)
        _drop_residuals(old)
        skipped: dict[str, float] = {"update/skipped": 1}
        return state, UpdateMetrics(skipped, [dict(skipped) for _ in rollouts])
    average = average_of(state.opt_state) if run.config.loss.matches else None
    tasks = _group_by_task(run, average, rollouts, old, advantages)
    batch_metrics: list[dict[str, float]] = [{"update/skipped": 1} for _ in rollouts]
    update_metrics: dict[str, float] = {}
    count, adapters = run.config.train.updates_per_batch, run.config.train.trainable == "lora"
    if count > 1 and adapters:
        state = run.fns.copy(state)  # so that a stop between two optimizer steps leaves the first
    for number in range(count):
        # A copy of all weights would not fit: such an update is finished once it has begun.
        stop = run.stop if number == 0 or adapters else NEVER
        gradient, loss_total, metrics = _gradient(run._replace(stop=stop), state, tasks)
        state, update_metrics = _apply(run, state, gradient, loss_total, step)
        for task, device_metrics in zip(tasks, jax.device_get(metrics), strict=True):
            values = {key: float(value) for key, value in device_metrics.items()}
            for index in task.indices:
                _record(batch_metrics[index], values)
    _drop_residuals(old)
    update_metrics |= {
        "update/skipped": 0,
        "update/old_is_self": int(run.config.train.old_logprob == "self"),
    }
    return state, UpdateMetrics(update_metrics, batch_metrics)


def _drop_residuals(old: Sequence[OldLogProbs | None]) -> None:
    """Frees what no optimizer step has taken: the next rollout may need the memory."""
    for entry in old:
        if entry is not None:
            entry.residuals[:] = [None] * len(entry.residuals)


def _record(batch_metrics: dict[str, float], values: dict[str, float]) -> None:
    """Takes over an optimizer step's metrics; some keep their first value, see the table."""
    first = {
        name: value
        for name, value in batch_metrics.items()
        if reduction_of(name).optimizer_steps == "first"
    }
    batch_metrics |= values | first | {"update/skipped": 0}


class _BatchUpdate(NamedTuple):
    """One batch with everything that its gradient needs."""

    task: str
    fns: TaskFns
    batch: UpdateBatch
    old: OldLogProbs | None
    fixed: list[FixedOutputs]  # by micro-batch
    entropy: tuple[jax.Array, ...] | None  # float32[B, T - 1] of each text step


@dataclasses.dataclass(frozen=True)
class _TaskUpdate:
    """All batches of one task in an update, and the normalizers of their common means."""

    batches: list[_BatchUpdate]
    indices: list[int]  # of the batches in the update
    weight: float  # share of the update's trajectories
    normalizers: LossNormalizers


def _group_by_task(
    run: Run,
    average: Any,
    rollouts: Sequence[RolloutBatch],
    old: Sequence[OldLogProbs | None],
    advantages: Sequence[BatchAdvantages],
) -> list[_TaskUpdate]:
    """Groups the batches that are trained by task; batches without a used trajectory stay out."""
    used = [0 if batch.left_out else int(batch.text.used.sum()) for batch in advantages]
    indices: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        if used[index]:
            indices.setdefault(rollout.batch.task.name, []).append(index)
    return [
        _task_update(
            run,
            [_batch_update(run, average, rollouts[i], old[i], advantages[i]) for i in task_indices],
            task_indices,
            sum(used[i] for i in task_indices) / sum(used),
        )
        for task_indices in indices.values()
    ]


def _batch_update(
    run: Run,
    average: Any,
    rollout: RolloutBatch,
    old: OldLogProbs | None,
    advantages: BatchAdvantages,
) -> _BatchUpdate:
    """Puts a batch's arrays on the device, with outputs of other policies and entropies if needed.

    `average` is that of the trained weights, None where the loss does not need it.
    """
    fns, loss_options = run.tasks[rollout.batch.task.name].fns, run.config.loss
    by_row = (advantages.text.advantage, advantages.image, advantages.text.used)
    text, image, used = (_padded(x.ravel(), rollout) for x in by_row)
    batch = UpdateBatch(rollout.trajectories, text, image, used)
    has_reference = (
        loss_options.text_beta > 0 or loss_options.image_beta > 0 or loss_options.report_kl
    )
    entropy, fixed, pace = None, [], MicroBatches(run.stop)
    for index in _micro_batch_indices(run, rollout.batch.task.name):
        outputs = FixedOutputs()
        if has_reference or average is not None:
            pace.begin()
            common = (run.loaded.base, rollout.trajectories, index)
            if has_reference:
                outputs = outputs._replace(reference=pace.call(fns.reference, *common))
            if average is not None:
                outputs = outputs._replace(average=pace.call(fns.average, average, *common))
            pace.dispatched(outputs)
        fixed.append(outputs)
    has_texts = rollout.trajectories.texts and loss_options.text != "none"
    if loss_options.entropy_fraction < 1 and has_texts:
        assert old is not None  # the checks of a configuration refuse "self" here
        entropy = fns.entropy(old.log_probs)
    return _BatchUpdate(rollout.batch.task.name, fns, batch, old, fixed, entropy)


def _padded(values: np.ndarray, rollout: RolloutBatch) -> jax.Array:
    """Puts values of B trajectories on the device, with zeros for the rows that fill up a mesh."""
    rows = rollout.trajectories.owner.shape[0]
    return jnp.asarray(np.pad(values, (0, rows - len(values))))


def _task_update(
    run: Run, batches: list[_BatchUpdate], indices: list[int], weight: float
) -> _TaskUpdate:
    """Adds up the normalizers of a task's batches."""
    by_batch = [batch.fns.count(batch.batch, batch.entropy) for batch in batches]
    if len(batches) == 1:
        return _TaskUpdate(batches, indices, weight, by_batch[0])
    # On the host: jitted, it would compile for every number of batches.
    tokens, selected_tokens, trajectories, thresholds = (
        np.stack(values) for values in zip(*distributed.to_host(by_batch), strict=True)
    )
    totals = (values.sum(axis=0) for values in (tokens, selected_tokens, trajectories))
    joint = LossNormalizers(*totals, entropy_threshold=thresholds.max(axis=0))
    if batches[0].entropy is not None:
        joint = _most_uncertain(batches, joint, run.config.loss.entropy_fraction)
    on_device = (
        jax.device_put(x, like.sharding) for x, like in zip(joint, by_batch[0], strict=True)
    )
    return _TaskUpdate(batches, indices, weight, LossNormalizers(*on_device))


def _most_uncertain(
    batches: Sequence[_BatchUpdate], joint: LossNormalizers, fraction: float
) -> LossNormalizers:
    """Replaces selected tokens and thresholds by those over several batches of one task.

    The same as `update_loss.count_normalizers` computes on the device for a single batch.
    """
    selected_tokens = joint.selected_tokens.copy()
    thresholds = joint.entropy_threshold.copy()
    for k in range(len(selected_tokens)):
        by_batch = []
        for batch in batches:
            assert batch.entropy is not None  # kept where a fraction of tokens is selected
            arrays = (batch.entropy[k], batch.batch.rollout.texts[k].scored, batch.batch.valid)
            entropy, scored, valid = distributed.to_host(arrays)
            by_batch.append(entropy[scored & valid[:, None]])
        entropies = np.concatenate(by_batch)
        entropies = entropies[~np.isnan(entropies)]
        if not entropies.size:
            continue
        trained = entropies[entropies >= np.quantile(entropies, 1.0 - fraction)]
        selected_tokens[k], thresholds[k] = trained.size, trained.min()
    return joint._replace(selected_tokens=selected_tokens, entropy_threshold=thresholds)


def _gradient(
    run: Run, state: TrainState, tasks: Sequence[_TaskUpdate]
) -> tuple[Any, jax.Array | float, list[dict[str, jax.Array]]]:
    """Computes the gradient of the update's loss.

    Returns:
      The gradient, the loss (a weighted mean over the tasks) and the metrics of each task.
    """
    gradient, loss_total, metrics = None, 0.0, []
    for task in tasks:
        weight = jnp.float32(task.weight)
        task_gradient, task_metrics = _task_gradient(run, state, task, weight)
        gradient = task_gradient if gradient is None else run.fns.add(gradient, task_gradient)
        loss_total += weight * task_metrics["loss/total"]
        metrics.append(task_metrics)
    return gradient, loss_total, metrics


def _task_gradient(
    run: Run, state: TrainState, task: _TaskUpdate, weight: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Adds up gradient and metrics over the micro-batches of a task's batches."""
    accumulated, policy = None, (state.trainable, run.loaded.base)
    pace = MicroBatches(run.stop)
    for batch in task.batches:
        for number, index in enumerate(_micro_batch_indices(run, batch.task)):
            pace.begin()
            common = (batch.fixed[number], batch.batch, index, task.normalizers, weight)
            if batch.old is None:
                micro_batch = pace.call(batch.fns.gradient, *policy, *common)
            else:
                old, residuals = batch.old.log_probs[number], batch.old.residuals[number]
                batch.old.residuals[number] = None  # they are those of the policy before this step
                new = old
                if residuals is None:
                    new, residuals = pace.call(
                        batch.fns.forward, *policy, batch.batch.rollout, index
                    )
                micro_batch = pace.call(batch.fns.backward, *policy, residuals, new, old, *common)
                del residuals  # else they would lie beside the next micro-batch's
            accumulated = (
                micro_batch
                if accumulated is None
                else run.fns.accumulate(*accumulated, micro_batch)
            )
            pace.dispatched(micro_batch[1])
    assert accumulated is not None  # a task of an update has at least one batch
    return accumulated


def _apply(
    run: Run, state: TrainState, gradient: Any, loss_total: jax.Array | float, step: int
) -> tuple[TrainState, dict[str, float]]:
    """Takes one optimizer step.

    Raises:
      TrainingError: loss or gradient is not finite.
    """
    state, device_metrics = run.fns.apply_gradient(state, gradient, {"loss/total": loss_total})
    metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    if not metrics.pop("update/finite"):
        raise TrainingError(
            f"step {step}: the loss ({metrics['loss/total']}) or its gradient (norm "
            f"{metrics['update/grad_norm']}) is not finite; the update was not applied and the "
            "last checkpoint is untouched. Lower optimizer.learning_rate, or look for broken "
            "weights or rewards"
        )
    return state, metrics


def _micro_batch_indices(run: Run, task: str) -> list[jax.Array]:
    """Returns the indices of a batch's micro-batches, int32[] each."""
    spec = options_lib.update_spec(run.config, run.loaded, TASKS[task])
    return [jnp.int32(index) for index in range(spec.layout.micro_batches)]
