"""The table that says how each metric of an update is reduced to one number.

Values of one metric come from micro-batches, steps of a kind (texts, images), batches and optimizer
steps. A metric that is not listed is a mean.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np


class Reduction(NamedTuple):
    """Ways to reduce the values of one metric to one number."""

    micro_batches: Literal["sum", "max"]
    batches: Literal["mean", "max"]  # also of the texts, or of the images, of a trajectory
    optimizer_steps: Literal["first", "last"]  # of several updates per batch


# Micro-batches compute shares of a mean over the whole batch, which add up.
MEAN = Reduction("sum", "mean", "last")
# Before the first optimizer step the policy is the sampler: only there are deviations errors.
LARGEST_DEVIATION = Reduction("max", "max", "first")

REDUCTIONS = {
    "advantage/scale": MEAN,
    "group/left_out_fraction": MEAN,
    "group/zero_std_fraction": MEAN,
    "image/average_gap": MEAN,
    "image/clip_fraction": MEAN,
    "image/group_spread": MEAN,
    "image/kl": MEAN,
    "image/ratio_max_dev": LARGEST_DEVIATION,
    "image/target_error": MEAN,
    "logp/rollout_update_max_abs_diff": LARGEST_DEVIATION,
    "loss/image": MEAN,
    "loss/text": MEAN,
    "loss/total": MEAN,
    "question/saturated_fraction": MEAN,
    "reward/answer_mass": MEAN,
    "reward/format": MEAN,
    "reward/mean": MEAN,
    "reward/quality": MEAN,
    "reward/reflection": MEAN,
    "reward/score/": MEAN,  # and whatever begins so
    "reward/semantic": MEAN,
    "reward/tag/": MEAN,
    "reward/total": MEAN,
    "reward/valid_fraction": MEAN,
    "srr/gain": MEAN,
    "srr/improved_fraction": MEAN,
    "srr/initial_reward": MEAN,
    "text/clip_fraction": MEAN,
    "text/entropy": MEAN,
    "text/kl": MEAN,
    "text/length": MEAN,
    "text/ratio_max_dev": LARGEST_DEVIATION,
    "text/repeated_fraction": MEAN,
    "text/truncated_fraction": MEAN,
    "update/skipped": MEAN,
}
DEFAULT = MEAN


def is_listed(name: str) -> bool:
    """Tells whether the table has a metric, or the family that it belongs to."""
    return name in REDUCTIONS or _family(name) in REDUCTIONS


def reduction_of(name: str) -> Reduction:
    """Returns a metric's row of the table, that of its family, or the default."""
    return REDUCTIONS.get(name) or REDUCTIONS.get(_family(name), DEFAULT)


def merge_batches(
    batch_metrics: Sequence[Mapping[str, float]], task_names: Sequence[str], *, by_task: bool
) -> dict[str, float]:
    """Reduces the metrics of an update's batches to one row.

    Args:
      batch_metrics: of each batch; where a metric is missing or NaN the other batches count.
      task_names: the task of each batch.
      by_task: whether each task's batches are reduced by themselves as well, under its name.
    """
    merged = _merge(batch_metrics)
    for name in dict.fromkeys(task_names if by_task else ()):
        task_metrics = [
            metrics
            for metrics, task_name in zip(batch_metrics, task_names, strict=True)
            if task_name == name
        ]
        merged |= {f"{name}/{key}": value for key, value in _merge(task_metrics).items()}
    return merged


def _merge(batch_metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Reduces each metric over the batches that have it."""
    if len(batch_metrics) == 1:
        return dict(batch_metrics[0])
    merged = {}
    for name in sorted({name for metrics in batch_metrics for name in metrics}):
        values = [metrics[name] for metrics in batch_metrics if name in metrics]
        numbers = np.array(values, np.float64)
        numbers = numbers[~np.isnan(numbers)]
        reduce = np.max if reduction_of(name).batches == "max" else np.mean
        merged[name] = float(reduce(numbers)) if numbers.size else float("nan")
    return merged


def _family(name: str) -> str:
    """Returns the prefix that a family is listed by: reward/tag/Count -> reward/tag/."""
    return name.rpartition("/")[0] + "/"
