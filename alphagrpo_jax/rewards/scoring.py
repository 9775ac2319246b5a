"""From images to rewards: asks the pool, combines the answers, adds the reward of the text."""

import collections
import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from alphagrpo_jax.config import RewardOptions, Score
from alphagrpo_jax.rewards.dvreward import INVALID, Reward, dvreward
from alphagrpo_jax.rewards.formats import answer_reward, format_reward
from alphagrpo_jax.rewards.viescore import viescore
from alphagrpo_jax.rewards.workers import ledger
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.records import Record

REFLECTION_WEIGHT = 0.5
HOLISTIC = "holistic"  # the score that ratings make; the others come from answers
SATURATED = 0.02  # P(yes) so near 0 or 1 tells samples of a group apart no longer
ELSEWHERE = "judged on another host"


class VerifierPool(Protocol):
    """What answers questions about images: a `pool.Pool`, or the policy itself."""

    def submit(
        self,
        sample_id: Hashable,
        image: np.ndarray,
        questions: Sequence[str],
        rated: Sequence[str] = (),
    ) -> None:
        """Takes a sample, see `pool.Pool.submit`."""
        ...

    def gather(self, sample_ids: Iterable[Hashable]) -> dict[Hashable, ledger.VerifierResult]:
        """Hands out outcomes, see `pool.Pool.gather`."""
        ...


def score_weights(options: RewardOptions) -> np.ndarray:
    """Weights of `options.scores`, float64[K], summing to 1."""
    weights = np.array([1.0, *options.extra_weights])
    return weights / weights.sum()


def yes_no_questions(options: RewardOptions, record: Record) -> list[str]:
    """What is to be answered by yes or no about an image of a prompt."""
    return record.asked if set(options.scores) - {HOLISTIC} else []


def rating_questions(options: RewardOptions, record: Record) -> list[str]:
    """What is to be rated: semantic consistency first, then perceptual quality."""
    if HOLISTIC not in options.scores:
        return []
    templates = (*options.rate_semantic, *options.rate_quality)
    return [template.replace("{prompt}", record.prompt) for template in templates]


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards of N samples; NaN where not valid."""

    reward: np.ndarray  # float64[N], DVReward (or what the options say) in [0, 1]
    semantic: np.ndarray  # float64[N], of the first score
    quality: np.ndarray  # float64[N]
    format: np.ndarray  # float64[N], 0 or 1, or a mean over think steps
    valid: np.ndarray  # bool[N]
    failures: dict[str, int]  # why samples are invalid, and how many
    parts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # score: float64[N]
    p_yes: tuple[tuple[float, ...], ...] = ()  # per sample as asked; empty where not valid
    ratings: tuple[tuple[float, ...], ...] = ()  # the same, 0 to 10
    reasons: tuple[str | None, ...] = ()  # per sample, why it is invalid
    tags: Mapping[str, float] = dataclasses.field(default_factory=dict)  # see `_tag_means`

    def metrics(self) -> dict[str, float]:
        """Means over the valid samples (NaN if there are none), and the valid share.

        Where there were yes/no questions: their means by tag, and the share of saturated ones.
        """
        names = ("semantic", "quality", "format")
        parts = {f"reward/{name}": _mean(vars(self)[name], self.valid) for name in names}
        share = {"reward/valid_fraction": float(np.mean(self.valid))}
        if len(self.parts) > 1:
            parts |= {
                f"reward/score/{name}": _mean(values, self.valid)
                for name, values in self.parts.items()
            }
        parts |= {f"reward/tag/{tag}": mean for tag, mean in self.tags.items()}
        answers = np.array([p for own in self.p_yes for p in own])
        if answers.size:
            saturated = (answers < SATURATED) | (answers > 1.0 - SATURATED)
            share["question/saturated_fraction"] = float(saturated.mean())
        return {"reward/mean": _mean(self.reward, self.valid)} | parts | share


def submit(
    pool: VerifierPool,
    sample_ids: Sequence[Hashable],
    images: Sequence[np.ndarray],
    records: Sequence[Record],
    options: RewardOptions,
    *,
    first: int,
) -> None:
    """Hands images to the pool, each with its record's questions.

    Args:
      pool: what answers them.
      sample_ids: N.
      images: uint8[H, W, 3] each, N.
      records: N.
      options: which scores are needed; the same must be given to `gather`.
      first: number of the first image in the batch that `gather` asks for; of several processes
        each scores its own share of the batch.
    """
    for row in distributed.own_rows(len(sample_ids), first=first):
        asked = yes_no_questions(options, records[row])
        rated = rating_questions(options, records[row])
        pool.submit(sample_ids[row], images[row], asked, rated)


def gather(
    pool: VerifierPool,
    sample_ids: Sequence[Hashable],
    records: Sequence[Record],
    thinks: Sequence[Sequence[str]],
    options: RewardOptions,
) -> Rewards:
    """Waits for the samples' answers and combines them; a missing answer makes a sample invalid.

    Args:
      pool: where the samples were submitted.
      sample_ids, records: as submitted.
      thinks: what each think step wrote, for the format reward; none if the task has none.
      options: how to combine.
    """
    own = distributed.own_rows(len(sample_ids))
    outcomes = pool.gather(sample_ids[row] for row in own)
    most = max((len(yes_no_questions(options, record)) for record in records), default=0)
    lengths = (len(Reward._fields), len(options.scores), most, _rating_count(options))
    blocks = np.full((len(own), sum(lengths)), np.nan)  # one array, to go between processes
    reasons: list[str | None] = [ELSEWHERE] * len(sample_ids)
    for line, row in enumerate(own):
        outcome = outcomes[sample_ids[row]]
        reasons[row] = None if outcome.valid else str(outcome.failure)
        reward, parts = _judge(records[row], outcome, options)
        numbers = (reward, parts, outcome.p_yes or (), outcome.ratings)
        for start, values in zip(np.cumsum((0, *lengths)), numbers, strict=False):
            blocks[line, start : start + len(values)] = values
    failures = collections.Counter(reasons[row] for row in own if reasons[row] is not None)
    merged = distributed.merge_rows(blocks, len(sample_ids))
    table, parts, answers, ratings = np.split(merged, np.cumsum(lengths)[:-1], axis=1)
    valid = table[:, 3] > 0
    p_yes = _known(answers)
    return Rewards(
        reward=table[:, 0],
        semantic=table[:, 1],
        quality=table[:, 2],
        format=_forms(thinks, len(table)),
        valid=valid,
        failures=dict(failures),
        parts=dict(zip(options.scores, parts.T, strict=True)),
        p_yes=p_yes,
        ratings=_known(ratings),
        reasons=tuple(None if v else why for v, why in zip(valid, reasons, strict=True)),
        tags=_tag_means(records, p_yes, options),
    )


def answer_scores(
    records: Sequence[Record], answers: Sequence[str], thinks: Sequence[Sequence[str]]
) -> Rewards:
    """Rewards of answers: 1 where an answer is right, else 0, by rule and without a verifier.

    Args:
      records: with the right answers.
      answers: what was answered.
      thinks: what each think step wrote, for the format reward; none if the task has none.
    """
    pairs = zip(answers, records, strict=True)
    nothing = np.full(len(records), np.nan)
    return Rewards(
        reward=np.array([answer_reward(text, record.answers) for text, record in pairs]),
        semantic=nothing,
        quality=nothing,
        format=_forms(thinks, len(records)),
        valid=np.ones(len(records), bool),
        failures={},
    )


def totals(
    scores: Rewards,
    options: RewardOptions,
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


def without(scores: Rewards, failed: np.ndarray, reason: str) -> Rewards:
    """The scores with further samples invalid, bool[N], for one reason."""
    new = failed & scores.valid
    if not new.any():
        return scores
    blank = {
        name: np.where(new, np.nan, vars(scores)[name])
        for name in ("reward", "semantic", "quality")
    }
    failures = dict(scores.failures) | {reason: int(new.sum())}
    reasons = scores.reasons or (None,) * len(new)
    return dataclasses.replace(
        scores,
        **blank,
        valid=scores.valid & ~new,
        failures=failures,
        reasons=tuple(reason if n else old for n, old in zip(new, reasons, strict=True)),
    )


def _forms(thinks: Sequence[Sequence[str]], count: int) -> np.ndarray:
    """The format reward, mean over the think steps; 0 where there are none."""
    steps = [[format_reward(text) for text in own] for own in thinks]
    return np.mean(steps, axis=0) if steps else np.zeros(count)


def _judge(
    record: Record, outcome: ledger.VerifierResult, options: RewardOptions
) -> tuple[Reward, list[float]]:
    """A sample's reward, with the first score's means, and every score by itself."""
    if not outcome.valid:
        return INVALID, []
    parts = [_score(name, record, outcome, options) for name in options.scores]
    if not all(part.valid for part in parts):
        return INVALID, []
    values = [part.reward for part in parts]
    # One score alone stays as it is, to the last bit.
    total = values[0] if len(values) == 1 else float(score_weights(options) @ values)
    return parts[0]._replace(reward=total), values


def _score(
    name: Score, record: Record, outcome: ledger.VerifierResult, options: RewardOptions
) -> Reward:
    if name == HOLISTIC:
        cut = len(options.rate_semantic)
        semantic, quality = outcome.ratings[:cut], outcome.ratings[cut:]
        least = (min(semantic) / 10.0, min(quality) / 10.0)
        return Reward(viescore(semantic, quality), *least, valid=True)
    semantic, quality = record.split(outcome.p_yes)
    return dvreward(
        semantic,
        quality,
        score=name,
        aggregate=options.aggregate,
        parents=record.asked_parents if options.dependencies else None,
    )


def _rating_count(options: RewardOptions) -> int:
    return len(options.rate_semantic + options.rate_quality) if HOLISTIC in options.scores else 0


def _known(rows: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """The numbers of each row, without the NaN behind them."""
    return tuple(tuple(row[~np.isnan(row)].tolist()) for row in rows)


def _tag_means(
    records: Sequence[Record], p_yes: Sequence[Sequence[float]], options: RewardOptions
) -> dict[str, float]:
    """Mean answer of the valid samples' questions by tag; of 0 or 1 each if the score is binary."""
    found: dict[str, list[float]] = {}
    for record, own in zip(records, p_yes, strict=True):
        for question, p in zip(record.asked_questions if own else (), own, strict=True):
            value = float(p > 0.5) if options.score == "binary" else p
            found.setdefault(question.tag or "untagged", []).append(value)
    return {tag: math.fsum(values) / len(values) for tag, values in sorted(found.items())}


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    chosen = values[valid & ~np.isnan(values)]
    return float(chosen.mean()) if chosen.size else float("nan")
