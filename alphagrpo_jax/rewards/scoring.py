"""From images to rewards: asks the pool, combines the answers, adds the reward of the text."""

import collections
import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from alphagrpo_jax.rewards.dvreward import INVALID, Reward, dvreward
from alphagrpo_jax.rewards.formats import format_reward
from alphagrpo_jax.rewards.pool import Pool
from alphagrpo_jax.rewards.questions import Record
from alphagrpo_jax.runtime import distributed


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """How answers become a reward."""

    aggregate: str
    score: str
    format_weight: float  # 0 where the task has no format reward
    dependencies: bool = False  # a question counts only if those that it depends on hold


@dataclasses.dataclass(frozen=True)
class Scores:
    """Rewards of N samples; NaN where not valid."""

    reward: np.ndarray  # float64[N], DVReward in [0, 1]
    semantic: np.ndarray  # float64[N]
    quality: np.ndarray  # float64[N]
    format: np.ndarray  # float64[N], 0 or 1
    total: np.ndarray  # float64[N], what advantages use
    valid: np.ndarray  # bool[N]
    failures: dict[str, int]  # why samples are invalid, and how many

    def metrics(self) -> dict[str, float]:
        """Means over the valid samples (NaN if there are none), and the valid share."""
        names = ("semantic", "quality", "format", "total")
        parts = {f"reward/{name}": _mean(vars(self)[name], self.valid) for name in names}
        share = {"reward/valid_fraction": float(np.mean(self.valid))}
        return {"reward/mean": _mean(self.reward, self.valid)} | parts | share


def submit(
    pool: Pool,
    sample_ids: Sequence[Hashable],
    images: np.ndarray,
    records: Sequence[Record],
    *,
    first: int,
) -> None:
    """Hands images uint8[N, H, W, 3] to the pool, each with its record's questions.

    Of several processes each scores its own share of the images; `first` is the number of the
    first one in the batch that `gather` asks for.
    """
    for row in distributed.own_rows(len(sample_ids), first=first):
        pool.submit(sample_ids[row], images[row], records[row].asked)


def gather(
    pool: Pool,
    sample_ids: Sequence[Hashable],
    records: Sequence[Record],
    texts: Sequence[str] | None,
    options: ScoringOptions,
) -> Scores:
    """Waits for the samples' answers and combines them; a missing answer makes a sample invalid.

    Args:
      pool: where the samples were submitted.
      sample_ids, records: as submitted.
      texts: think texts, for the format reward; None if the task has none.
      options: how to combine.
    """
    own = distributed.own_rows(len(sample_ids))
    outcomes = pool.gather(sample_ids[row] for row in own)
    failures: collections.Counter[str] = collections.Counter()
    rewards = []
    for row in own:
        outcome = outcomes[sample_ids[row]]
        if outcome.valid:
            rewards.append(_reward(records[row], outcome.p_yes, options))
        else:
            failures[str(outcome.failure)] += 1
            rewards.append(INVALID)
    table = np.array(rewards, np.float64).reshape(-1, 4)
    table = distributed.merge_rows(table, len(sample_ids))
    form = np.array([format_reward(text) for text in texts or []] or [0.0] * len(table))
    return Scores(
        reward=table[:, 0],
        semantic=table[:, 1],
        quality=table[:, 2],
        format=form,
        total=table[:, 0] + options.format_weight * form,
        valid=table[:, 3] > 0,
        failures=dict(failures),
    )


def _reward(record: Record, p_yes: Sequence[float], options: ScoringOptions) -> Reward:
    semantic, quality = record.split(p_yes)
    return dvreward(
        semantic,
        quality,
        score=options.score,
        aggregate=options.aggregate,
        parents=record.asked_parents if options.dependencies else None,
    )


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    chosen = values[valid & ~np.isnan(values)]
    return float(chosen.mean()) if chosen.size else float("nan")
