"""From images to rewards: asks the pool, combines the answers, adds the reward of the text."""

import collections
import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from alphagrpo_jax.rewards.dvreward import INVALID, Reward, dvreward
from alphagrpo_jax.rewards.formats import answer_reward, format_reward
from alphagrpo_jax.rewards.pool import Pool
from alphagrpo_jax.rewards.questions import Record
from alphagrpo_jax.runtime import distributed

REFLECTION_WEIGHT = 0.5


@dataclasses.dataclass(frozen=True)
class ScoringOptions:
    """How answers become a reward."""

    aggregate: str
    score: str
    format_weight: float  # 0 where the task has no format reward
    isolate: bool = False  # whether the form counts for the text steps alone
    dependencies: bool = False  # a question counts only if those that it depends on hold


@dataclasses.dataclass(frozen=True)
class Scores:
    """Rewards of N samples; NaN where not valid."""

    reward: np.ndarray  # float64[N], DVReward in [0, 1]
    semantic: np.ndarray  # float64[N]
    quality: np.ndarray  # float64[N]
    format: np.ndarray  # float64[N], 0 or 1
    valid: np.ndarray  # bool[N]
    failures: dict[str, int]  # why samples are invalid, and how many

    def metrics(self) -> dict[str, float]:
        """Means over the valid samples (NaN if there are none), and the valid share."""
        names = ("semantic", "quality", "format")
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
    form = _forms(texts, len(table))
    return Scores(
        reward=table[:, 0],
        semantic=table[:, 1],
        quality=table[:, 2],
        format=form,
        valid=table[:, 3] > 0,
        failures=dict(failures),
    )


def answer_scores(
    records: Sequence[Record], answers: Sequence[str], texts: Sequence[str] | None
) -> Scores:
    """Rewards of answers: 1 where an answer is right, else 0, by rule and without a verifier.

    Args:
      records: with the right answers.
      answers: what was answered.
      texts: think texts, for the format reward; None if the task has none.
    """
    pairs = zip(answers, records, strict=True)
    nothing = np.full(len(records), np.nan)
    return Scores(
        reward=np.array([answer_reward(text, record.answers) for text, record in pairs]),
        semantic=nothing,
        quality=nothing,
        format=_forms(texts, len(records)),
        valid=np.ones(len(records), bool),
        failures={},
    )


def totals(
    scores: Scores,
    options: ScoringOptions,
    *,
    reward: np.ndarray | None = None,
    reflection: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What the advantages of text and of image steps are made of, float64[N] each.

    Reward plus the weighted format reward, for both, or with `isolate` for the text alone. With a
    judged reflection the text's is `reward + 0.5 mean(format, reflection)` and the image's the
    reward (AlphaGRPO's SRR recipe).

    Args:
      scores: of a batch.
      options: weights.
      reward: float64[N], rectified rewards instead of `scores.reward`.
      reflection: float64[N], 0 or 1.
    """
    reward = scores.reward if reward is None else reward
    if reflection is not None:
        return reward + REFLECTION_WEIGHT * (scores.format + reflection) / 2, reward
    text = reward + options.format_weight * scores.format
    return text, reward if options.isolate else text


def _forms(texts: Sequence[str] | None, count: int) -> np.ndarray:
    return np.array([format_reward(text) for text in texts or []] or [0.0] * count)


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
