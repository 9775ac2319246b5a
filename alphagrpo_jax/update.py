"""What the last two calls of `train.main` do: the loss, and the update of the policy."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.config import Config
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.training import steps as steps_lib
from alphagrpo_jax.training.checks import TrainingError, check_sampled
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.training.gradient import LossNormalizers
from alphagrpo_jax.types import BatchAdvantages, LogProbs, RolloutBatch, TrainState, UpdateBatch

# Metrics of a batch's first optimizer step; of its others the last one's are kept.
FIRST_ONLY = {"text/ratio_max_dev", "image/ratio_max_dev", "logp/rollout_update_max_abs_diff"}


def old_log_probs(run: Run, state: TrainState, drawn: RolloutBatch) -> list[LogProbs] | None:
    """The log-probs before the update, per micro-batch; None where the policy's own are used."""
    if run.config.train.old_logprob == "self":
        return None
    forward = run.steps.tasks[drawn.batch.task.name].forward
    return [
        forward(state.trainable, run.loaded.base, drawn.trajectories, part)[0]
        for part in _parts(run.config)
    ]


def step(
    run: Run,
    state: TrainState,
    drawn: Sequence[RolloutBatch],
    old: Sequence[list[LogProbs] | None],
    advantages: Sequence[BatchAdvantages],
    step: int,
) -> tuple[TrainState, dict[str, float], list[dict[str, float]]]:
    """Stages 5 and 6: the optimizer steps of one update; the state as it was if nothing differs.

    The loss is the mean over the update's trajectories: batches of one task count as one large
    batch, tasks by their trajectories. A batch that is to be left out counts nowhere; one whose
    advantages happen to be all zero counts like any other.

    Returns:
      The new state, the metrics of the whole update, and those of each batch.
    Raises:
      TrainingError: a loss or gradient that is not finite, before it has changed anything; or
        nothing differs and what was drawn is not finite.
    """
    if all(each.text.all_zero and not each.image.any() for each in advantages):
        for each in drawn:
            check_sampled(each.trajectories, step)
        return state, {"update/skipped": 1}, [{"update/skipped": 1} for _ in drawn]
    used = [0 if each.left_out else int(each.text.used.sum()) for each in advantages]
    members: dict[str, list[int]] = {}  # by task
    for index, each in enumerate(drawn):
        if used[index]:
            members.setdefault(each.batch.task.name, []).append(index)
    groups = {
        name: _TaskBatches.of(
            run, [_UpdateBatch.of(run, drawn[i], old[i], advantages[i]) for i in own]
        )
        for name, own in members.items()
    }
    weights = {name: sum(used[i] for i in own) / sum(used) for name, own in members.items()}
    whole: dict[str, float] = {}
    parts: list[dict[str, float]] = [{"update/skipped": int(not each)} for each in used]
    for _ in range(run.config.train.updates_per_batch):
        gradient, total, found = None, 0.0, {}
        for name, group in groups.items():
            weight = jnp.float32(weights[name])
            own, metrics = group.gradient(run, state, weight)
            gradient = own if gradient is None else run.steps.add(gradient, own)
            total += weight * metrics["loss/total"]
            found[name] = metrics
        state, applied = run.steps.apply(state, gradient, {"loss/total": total})
        values = {name: float(x) for name, x in jax.device_get(applied).items()}
        if not values.pop("update/finite"):
            raise TrainingError(
                f"step {step}: the loss ({values['loss/total']}) or its gradient (norm "
                f"{values['update/grad_norm']}) is not finite; the update was not applied and the "
                "last checkpoint is untouched. Lower optimizer.learning_rate, or look for broken "
                "weights or rewards"
            )
        whole = values
        for name, metrics in jax.device_get(found).items():
            values = {key: float(x) for key, x in metrics.items()}
            for index in members[name]:
                first = {key: parts[index][key] for key in FIRST_ONLY & parts[index].keys()}
                parts[index] |= values | first
    is_self = int(run.config.train.old_logprob == "self")
    return state, whole | {"update/skipped": 0, "update/old_is_self": is_self}, parts


class _UpdateBatch(NamedTuple):
    """One batch with everything that its gradient needs."""

    steps: steps_lib.TaskFns
    batch: UpdateBatch
    old: list[LogProbs] | None
    reference: list[LogProbs] | None
    entropy: tuple[jax.Array, ...] | None

    @classmethod
    def of(
        cls, run: Run, drawn: RolloutBatch, old: list[LogProbs] | None, scored: BatchAdvantages
    ) -> "_UpdateBatch":
        steps, config = run.steps.tasks[drawn.batch.task.name], run.config
        flat = (jnp.asarray(x.ravel()) for x in (scored.text.advantage, scored.image))
        batch = UpdateBatch(drawn.trajectories, *flat, jnp.asarray(scored.text.used.ravel()))
        reference = entropy = None
        if config.loss.text_beta > 0 or config.loss.image_beta > 0 or config.loss.report_kl:
            own = (run.loaded.base, drawn.trajectories)
            reference = [steps.reference(*own, part) for part in _parts(config)]
        if config.loss.entropy_fraction < 1 and drawn.trajectories.texts:
            entropy = steps.entropy(old)
        return cls(steps, batch, old, reference, entropy)


class _TaskBatches(NamedTuple):
    """All batches of one task in an update, and the denominators of their common means."""

    batches: list[_UpdateBatch]
    totals: LossNormalizers

    @classmethod
    def of(cls, run: Run, batches: list[_UpdateBatch]) -> "_TaskBatches":
        counted = [each.steps.count(each.batch, each.entropy) for each in batches]
        if len(batches) == 1:
            return cls(batches, counted[0])
        # On the host: jitted, it would compile for every number of batches.
        tokens, trajectories, thresholds = (
            np.stack(values) for values in zip(*distributed.to_host(counted), strict=True)
        )
        joint = LossNormalizers(
            tokens.sum(axis=0), trajectories.sum(axis=0), thresholds.max(axis=0)
        )
        if batches[0].entropy is not None:
            joint = _most_uncertain(batches, joint, run.config.loss.entropy_fraction)
        placed = (
            jax.device_put(x, like.sharding) for x, like in zip(joint, counted[0], strict=True)
        )
        return cls(batches, LossNormalizers(*placed))

    def gradient(self, run: Run, state: TrainState, weight: jax.Array) -> tuple:
        """Gradient and metrics, summed over the micro-batches of all batches."""
        summed = None
        for each in self.batches:
            for index, part in enumerate(_parts(run.config)):
                new, pullback = each.steps.forward(
                    state.trainable, run.loaded.base, each.batch.rollout, part
                )
                before = each.old[index] if each.old else None
                ref = each.reference[index] if each.reference else None
                own = each.steps.backward(
                    pullback, new, before, ref, each.batch, part, self.totals, weight
                )
                summed = own if summed is None else run.steps.accumulate(summed, own)
        return summed


def _most_uncertain(
    batches: Sequence[_UpdateBatch], joint: LossNormalizers, fraction: float
) -> LossNormalizers:
    """`update.count`'s tokens and thresholds over several batches of one task."""
    tokens, thresholds = joint.tokens.copy(), joint.entropy_threshold.copy()
    for k in range(len(tokens)):
        held = []
        for each in batches:
            arrays = (each.entropy[k], each.batch.rollout.texts[k].scored, each.batch.valid)
            entropy, scored, valid = distributed.to_host(arrays)
            held.append(entropy[scored & valid[:, None]])
        known = np.concatenate(held)
        known = known[~np.isnan(known)]
        if not known.size:
            continue
        chosen = known[known >= np.quantile(known, 1.0 - fraction)]
        tokens[k], thresholds[k] = chosen.size, chosen.min()
    return LossNormalizers(tokens, joint.trajectories, thresholds)


def _parts(config: Config) -> list[jax.Array]:
    """The numbers of a batch's micro-batches, int32[] each."""
    return [jnp.int32(part) for part in range(config.trajectories // config.train.micro_batch)]
