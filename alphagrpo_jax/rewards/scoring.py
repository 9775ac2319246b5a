"""Rewards of images and texts: asks the pool, combines the answers, adds the format reward."""

import collections
import dataclasses
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from alphagrpo_jax import score_specs
from alphagrpo_jax.config import RewardOptions
from alphagrpo_jax.rewards.dvreward import INVALID, Reward, dvreward
from alphagrpo_jax.rewards.formats import answer_reward, format_reward
from alphagrpo_jax.rewards.viescore import viescore
from alphagrpo_jax.rewards.workers import ledger
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.runtime.stopping import StoppedError

ISOLATED_WEIGHT = 0.5  # of the format terms' mean where it counts for the texts alone
HOLISTIC = "holistic"  # the score that ratings make; the others come from answers
SATURATED = 0.02  # P(yes) this near 0 or 1 no longer tells the samples of a group apart
ELSEWHERE = "judged on another host"


class VerifierPool(Protocol):
    """Answers questions about images: `workers.pool.Pool` or `workers.in_process.InProcessPool`."""

    def submit(
        self,
        sample_id: Hashable,
        image: np.ndarray,
        questions: Sequence[str],
        rated: Sequence[str] = (),
        scored: Sequence[str] = (),
    ) -> None:
        """Queues a sample; see `workers.pool.Pool.submit`."""
        ...

    def gather(self, sample_ids: Iterable[Hashable]) -> dict[Hashable, ledger.VerifierResult]:
        """Waits for samples and returns their results; see `workers.pool.Pool.gather`."""
        ...


def score_weights(options: RewardOptions) -> np.ndarray:
    """Returns the weights of `options.scores`, float64[K], summing to 1."""
    weights = np.array([1.0, *options.extra_weights])
    return weights / weights.sum()


def yes_no_questions(options: RewardOptions, record: Record) -> list[str]:
    """Returns the questions about a prompt's image that are answered by yes or no."""
    return record.question_texts if set(options.judged) - {HOLISTIC} else []


def rating_questions(options: RewardOptions, record: Record) -> list[str]:
    """Returns what is rated of a prompt's image: consistency first, then perceptual quality."""
    if HOLISTIC not in options.judged:
        return []
    templates = (*options.rate_semantic, *options.rate_quality)
    return [template.replace("{prompt}", record.prompt) for template in templates]


def scored_texts(options: RewardOptions, record: Record) -> list[str]:
    """Returns what each scorer scores a prompt's image by, in the order of `options.scorers`.

    It is the record's "caption", which describes the image, if it has one, else its prompt. The
    exact checker gets the record's facts as JSON, or "" where it has none.
    """
    return [
        facts_text(record) if spec.kind == "exact" else record.image_text
        for spec in options.scorers
    ]


def facts_text(record: Record) -> str:
    """Returns a record's facts as JSON; "" where it has none."""
    return json.dumps(record.extra["facts"], sort_keys=True) if "facts" in record.extra else ""


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards of N samples; NaN where not valid."""

    reward: np.ndarray  # float64[N], DVReward in [0, 1], or what the options say
    semantic: np.ndarray  # float64[N], of the first score that the verifier's answers make
    quality: np.ndarray  # float64[N]
    format: np.ndarray  # float64[N], 0 or 1, or a mean over think steps
    valid: np.ndarray  # bool[N]
    failures: dict[str, int]  # number of invalid samples by reason
    # float64[N] by `score_specs.short_name`; a scorer's are as it gave them, not rescaled.
    by_score: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    p_yes: tuple[tuple[float, ...], ...] = ()  # per sample as asked; empty where not valid
    ratings: tuple[tuple[float, ...], ...] = ()  # the same, 0 to 10
    reasons: tuple[str | None, ...] = ()  # per sample, why it is invalid
    tags: Mapping[str, float] = dataclasses.field(default_factory=dict)  # see `_tag_means`
    masses: np.ndarray | None = None  # float64[N, Q], P(yes) + P(no); NaN where not known
    # Samples by number with a text that no verifier could answer; None if another host asked it.
    unanswerable: Mapping[int, str | None] = dataclasses.field(default_factory=dict)

    @property
    def shown_scores(self) -> Mapping[str, np.ndarray]:
        """Returns `by_score`, or nothing if its only score is the reward itself."""
        is_reward = len(self.by_score) == 1 and set(self.by_score) <= {*score_specs.JUDGED}
        return {} if is_reward else self.by_score

    def metrics(self) -> dict[str, float]:
        """Computes means over the valid samples (NaN if there are none), and the valid share.

        Where there are yes/no questions: their means by tag, the share of saturated ones, and the
        mean mass of yes and no where the verifier tells it.
        """
        metrics = {"reward/mean": _mean(self.reward, self.valid)}
        for name in ("semantic", "quality", "format"):
            metrics[f"reward/{name}"] = _mean(vars(self)[name], self.valid)
        for name, values in self.shown_scores.items():
            metrics[f"reward/score/{name}"] = _mean(values, self.valid)
        metrics |= {f"reward/tag/{tag}": mean for tag, mean in self.tags.items()}
        metrics["reward/valid_fraction"] = float(np.mean(self.valid))
        answers = np.array([p for sample_p_yes in self.p_yes for p in sample_p_yes])
        if answers.size:
            saturated = (answers < SATURATED) | (answers > 1.0 - SATURATED)
            metrics["question/saturated_fraction"] = float(saturated.mean())
        if self.masses is not None and not np.isnan(self.masses).all():
            metrics["reward/answer_mass"] = float(np.nanmean(self.masses))
        return metrics


def submit(
    pool: VerifierPool,
    sample_ids: Sequence[Hashable],
    images: Sequence[np.ndarray] | np.ndarray,
    records: Sequence[Record],
    options: RewardOptions,
    *,
    rows: np.ndarray | None = None,
) -> None:
    """Hands images to the pool, each with its record's questions.

    Args:
      pool: answers the questions.
      sample_ids: N.
      images: uint8[H, W, 3] each, N.
      records: N.
      options: which scores are needed; the same must be given to `gather`.
      rows: int64[N], their numbers in the batch that `gather` asks for; None: from 0 on. Of
        several processes each scores its own share of the batch.
    """
    rows = np.arange(len(sample_ids)) if rows is None else rows
    for row in np.flatnonzero(distributed.is_own(rows)).tolist():
        questions = yes_no_questions(options, records[row])
        rated = rating_questions(options, records[row])
        scored = scored_texts(options, records[row])
        pool.submit(sample_ids[row], images[row], questions, rated, scored)


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
      thinks: texts of each think step, for the format reward; none if the task has none.
      options: how to combine.
    Raises:
      StoppedError: a stop has ended the wait on some process.
    """
    local_rows = distributed.own_rows(len(sample_ids))
    results = gather_together(pool, [sample_ids[row] for row in local_rows])
    questions = max((len(yes_no_questions(options, record)) for record in records), default=0)
    rating_count = _rating_count(options)
    # The last column tells of a text that no verifier could answer.
    lengths = (len(Reward._fields), len(options.scores), questions, rating_count, questions, 1)
    # All numbers in one array, NaN where there is none: one exchange between processes is enough.
    local_table = np.full((len(local_rows), sum(lengths)), np.nan)
    reasons: list[str | None] = [ELSEWHERE] * len(sample_ids)
    for line, row in enumerate(local_rows):
        result = results[sample_ids[row]]
        reward, by_score = _combine(records[row], result, options)
        reasons[row] = None if result.valid else str(result.failure)
        if result.valid and not reward.valid:
            reasons[row] = f"the numbers {result.p_yes, result.scores} make no finite reward"
        masses = [np.nan if mass is None else mass for mass in result.masses]
        hopeless = [float(result.unanswerable is not None)]
        numbers = (reward, by_score, result.p_yes or (), result.ratings, masses, hopeless)
        for start, values in zip(np.cumsum((0, *lengths)), numbers, strict=False):
            local_table[line, start : start + len(values)] = values
    failures = collections.Counter(reasons[row] for row in local_rows if reasons[row] is not None)
    merged = distributed.merge_rows(local_table, len(sample_ids))
    columns = np.split(merged, np.cumsum(lengths)[:-1], axis=1)
    table, by_score, answers, ratings, masses, hopeless = columns
    valid = table[:, 3] > 0
    p_yes = _without_padding(answers)
    texts = {row: results[sample_ids[row]].unanswerable for row in local_rows}
    return Rewards(
        reward=table[:, 0],
        semantic=table[:, 1],
        quality=table[:, 2],
        format=_format_rewards(thinks, len(table)),
        valid=valid,
        failures=dict(failures),
        by_score=dict(zip(map(score_specs.short_name, options.scores), by_score.T, strict=True)),
        p_yes=p_yes,
        ratings=_without_padding(ratings),
        reasons=tuple(None if ok else why for ok, why in zip(valid, reasons, strict=True)),
        tags=_tag_means(records, p_yes, options),
        masses=masses,
        unanswerable={row: texts.get(row) for row in np.flatnonzero(hopeless[:, 0] > 0).tolist()},
    )


def gather_together(
    pool: VerifierPool, sample_ids: Sequence[Hashable]
) -> dict[Hashable, ledger.VerifierResult]:
    """Waits for this process's samples; if a stop ends the wait of one process, it ends all.

    Raises:
      StoppedError: a stop has ended the wait on some process.
    """
    results, stopped = {}, False
    try:
        results = pool.gather(sample_ids)
    except StoppedError:
        stopped = True  # the others may wait for this process already
    if distributed.any_process(stopped):
        raise StoppedError
    return results


def answer_scores(
    records: Sequence[Record], answers: Sequence[str], thinks: Sequence[Sequence[str]]
) -> Rewards:
    """Rewards answers by rule, without a verifier: 1 where an answer is right, else 0.

    Args:
      records: with the right answers.
      answers: texts of the answer step.
      thinks: texts of each think step, for the format reward; none if the task has none.
    """
    pairs = zip(answers, records, strict=True)
    unknown = np.full(len(records), np.nan)
    return Rewards(
        reward=np.array([answer_reward(text, record.answers) for text, record in pairs]),
        semantic=unknown,
        quality=unknown,
        format=_format_rewards(thinks, len(records)),
        valid=np.ones(len(records), bool),
        failures={},
    )


def totals(
    rewards: Rewards,
    options: RewardOptions,
    *,
    reward: np.ndarray | None = None,
    reflection: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the totals that the advantages of text and of image steps compare, float64[N] each.

    It is the reward plus the weighted format reward for both. With `isolate` the image's is the
    reward, and the text's `reward + 0.5 mean(format terms)`: the think text's form and, where it
    was judged, the reflection's (AlphaGRPO, arXiv 2605.12495, SRR as released).

    Args:
      rewards: of a batch.
      options: `format_weight`, 0 where the task has no format reward, and `isolate`.
      reward: float64[N], rectified rewards instead of `rewards.reward`.
      reflection: float64[N], 0 or 1; counts with `isolate` alone.
    """
    reward = rewards.reward if reward is None else reward
    if options.isolate:
        terms = [rewards.format] if reflection is None else [rewards.format, reflection]
        return reward + ISOLATED_WEIGHT * np.mean(terms, axis=0), reward
    total = reward + options.format_weight * rewards.format
    return total, total


def without(rewards: Rewards, failed: np.ndarray, reason: str) -> Rewards:
    """Returns the rewards with further samples invalid, bool[N], for one reason."""
    newly_failed = failed & rewards.valid
    if not newly_failed.any():
        return rewards
    blanked = {
        name: np.where(newly_failed, np.nan, vars(rewards)[name])
        for name in ("reward", "semantic", "quality")
    }
    reasons = rewards.reasons or (None,) * len(newly_failed)
    return dataclasses.replace(
        rewards,
        **blanked,
        valid=rewards.valid & ~newly_failed,
        failures=dict(rewards.failures) | {reason: int(newly_failed.sum())},
        reasons=tuple(
            reason if is_new else old for is_new, old in zip(newly_failed, reasons, strict=True)
        ),
    )


def _format_rewards(thinks: Sequence[Sequence[str]], count: int) -> np.ndarray:
    """Computes the format reward, mean over the think steps; 0 where there are none."""
    steps = [[format_reward(text) for text in texts] for texts in thinks]
    return np.mean(steps, axis=0) if steps else np.zeros(count)


def _combine(
    record: Record, result: ledger.VerifierResult, options: RewardOptions
) -> tuple[Reward, list[float]]:
    """Computes a sample's reward, with the first judged score's means, and each score's value."""
    if not result.valid:
        return INVALID, []
    judged = {text: _reward_by(text, record, result, options) for text in options.judged}
    if not all(reward.valid for reward in judged.values()):
        return INVALID, []
    pairs = zip(options.scorers, result.scores, strict=True)
    scores = iter([spec.read(number) for spec, number in pairs])
    values = [judged[text].reward if text in judged else next(scores) for text in options.scores]
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(total_of(np.array(values), options))
    if not math.isfinite(total):  # finite scores may still add up to more than a float holds
        return INVALID, []
    means = next(iter(judged.values()), Reward(total, math.nan, math.nan, valid=True))
    return means._replace(reward=total), values


def total_of(values: np.ndarray, options: RewardOptions) -> np.ndarray:
    """Combines scores to rewards: the weighted mean of what each counts, see `ScorerSpec.rescaled`.

    Args:
      values: float64[K, ...], one row per `options.scores`.
      options: scores and their weights.
    Returns:
      float64[...].
    """
    specs = [score_specs.parse(text) for text in options.scores]
    counted = [
        row if spec is None else spec.rescaled(row) for spec, row in zip(specs, values, strict=True)
    ]
    # A single score is not multiplied by its weight 1, so that it stays the same to the last bit.
    if len(counted) == 1:
        return counted[0]
    return np.tensordot(score_weights(options), np.array(counted), axes=1)


def judged_only(options: RewardOptions) -> RewardOptions:
    """Returns the options without scorers, for a verifier that is asked beside the first one.

    Raises:
      ValueError: no score is made of a verifier's answers.
    """
    if not options.judged:
        raise ValueError(f"got scores {options.scores}, expected one of a verifier's answers")
    weights = dict(zip(options.scores, (1.0, *options.extra_weights), strict=True))
    first, *others = options.judged
    # The weights matter for the mean of the judged scores alone; `with_scores_of` has the others.
    extra_weights = tuple(weights[text] / weights[first] for text in others)
    return dataclasses.replace(
        options, score=first, extra_scores=tuple(others), extra_weights=extra_weights
    )


def with_scores_of(rewards: Rewards, first: Rewards, options: RewardOptions) -> Rewards:
    """Completes rewards of the same images by `judged_only` options with the scorers' scores.

    So the rewards of two verifiers differ by the verifiers alone.

    Args:
      rewards: N, by the other verifier.
      first: N, by the first verifier and the scorers.
      options: of `first`.
    """
    if not options.scorers:
        return rewards
    by_score = dict(first.by_score) | dict(rewards.by_score)
    by_score = {name: by_score[name] for name in map(score_specs.short_name, options.scores)}
    valid = rewards.valid & first.valid
    total = total_of(np.array([*by_score.values()]), options)
    return dataclasses.replace(
        rewards, reward=np.where(valid, total, np.nan), valid=valid, by_score=by_score
    )


def _reward_by(
    name: str, record: Record, result: ledger.VerifierResult, options: RewardOptions
) -> Reward:
    """Computes a sample's reward by one judged score."""
    if name == HOLISTIC:
        cut = len(options.rate_semantic)
        semantic, quality = result.ratings[:cut], result.ratings[cut:]
        least = (min(semantic) / 10.0, min(quality) / 10.0)
        return Reward(viescore(semantic, quality), *least, valid=True)
    semantic, quality = record.split(result.p_yes or ())
    return dvreward(
        semantic,
        quality,
        score="binary" if name == "binary" else "confidence",
        aggregate=options.aggregate,
        parents=record.asked_parents if options.dependencies else None,
    )


def _rating_count(options: RewardOptions) -> int:
    """Counts the ratings per sample."""
    return len(options.rate_semantic + options.rate_quality) if HOLISTIC in options.judged else 0


def _without_padding(rows: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Returns the numbers of each row, without the NaN behind them."""
    return tuple(tuple(row[~np.isnan(row)].tolist()) for row in rows)


def _tag_means(
    records: Sequence[Record], p_yes: Sequence[Sequence[float]], options: RewardOptions
) -> dict[str, float]:
    """Averages the answers of the valid samples by tag; 0 or 1 each if the score is binary."""
    by_tag: dict[str, list[float]] = {}
    for record, answers in zip(records, p_yes, strict=True):
        for question, p in zip(record.asked_questions if answers else (), answers, strict=True):
            value = float(p > 0.5) if options.score == "binary" else p
            by_tag.setdefault(question.tag or "untagged", []).append(value)
    return {tag: math.fsum(values) / len(values) for tag, values in sorted(by_tag.items())}


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    """Averages the valid values that are known, NaN if there are none."""
    numbers = values[valid & ~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else float("nan")
