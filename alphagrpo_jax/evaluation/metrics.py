"""Evaluation inside a run: held-out prompts drawn with fixed keys, rewarded and checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alphagrpo_jax.config import RewardOptions
from alphagrpo_jax.evaluation.checkers import FactCheck
from alphagrpo_jax.refinement import outcomes
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.workers.pool import Pool
from alphagrpo_jax.runtime.records import Record


class Sampled(NamedTuple):
    """What a micro-batch of N prompts gave."""

    images: np.ndarray | None  # uint8[N, H, W, 3]
    thinks: Sequence[list[str]]  # of each think step
    answers: list[str]  # none if the task has none


# (numbers of N prompts, int64[N]; number of the first) -> what was made
Draw = Callable[[np.ndarray, int], Sampled]


# Metrics of scores that stand in an evaluation's rows, beside the means by tag.
KEPT = ("reward/mean", "reward/format", "reward/valid_fraction", "question/saturated_fraction")


class Evaluation(NamedTuple):
    """What an evaluation found, N prompts."""

    metrics: dict[str, float]
    images: np.ndarray | None  # uint8[N, H, W, 3]
    captions: list[dict[str, Any]]  # prompt, text, reward, exact, per image or answer
    scores: scoring.Rewards
    records: Sequence[Record]


def evaluate_images(
    draw: Draw,
    pool: Pool,
    records: Sequence[Record],
    *,
    micro_batch: int,
    scoring_options: RewardOptions,
    check: FactCheck,
    prefix: str,
    second: scoring.VerifierPool | None = None,
) -> Evaluation:
    """Draws one image per prompt, while the pool answers about those drawn before.

    Args:
      draw: draws a micro-batch.
      pool: answers the questions.
      records: of the prompts, N.
      micro_batch: prompts per call of `draw`; the last call is filled up and cut.
      scoring_options: as in training.
      check: the exact checker.
      prefix: of the metrics' names, "eval" or "eval_greedy".
      second: rates the same images in the same way, for the metrics alone.
    """
    ids = [(prefix, number) for number in range(len(records))]
    images, thinks = [], []
    for part, filled in _parts(len(records), micro_batch):
        made = draw(filled, part.start)
        drawn = made.images[: part.stop - part.start]
        for judge in (pool, second) if second else (pool,):
            scoring.submit(
                judge, ids[part], drawn, records[part], scoring_options, first=part.start
            )
        images.append(drawn)
        thinks.append([own[: len(drawn)] for own in made.thinks])
    thinks = _joined(thinks)
    scores = scoring.gather(pool, ids, records, thinks, scoring_options)
    pictures = np.concatenate(images)
    facts = [check(image, record) for image, record in zip(pictures, records, strict=True)]
    metrics = summarise(scores, facts, records)
    if second:
        other = scoring.gather(second, ids, records, (), scoring_options)
        metrics |= compare_verifiers(scores, other)
    exact = [None if held is None else all(held.values()) for held in facts]
    shown = [" | ".join(own) for own in zip(*thinks, strict=True)] or [None] * len(records)
    captions = _captions(records, shown, scores, exact)
    return Evaluation(_named(prefix, metrics), pictures, captions, scores, records)


def evaluate_answers(
    draw: Draw, records: Sequence[Record], *, micro_batch: int, prefix: str
) -> Evaluation:
    """Writes one answer per question; `exact_all` is the share of right ones.

    Args:
      draw: writes a micro-batch.
      records, micro_batch, prefix: as of `evaluate_images`.
    """
    thinks, answers = [], []
    for part, filled in _parts(len(records), micro_batch):
        made = draw(filled, part.start)
        count = part.stop - part.start
        thinks.append([own[:count] for own in made.thinks])
        answers += made.answers[:count]
    scores = scoring.answer_scores(records, answers, _joined(thinks))
    facts = [{"answer": reward == 1.0} for reward in scores.reward]
    metrics = summarise(scores, facts, records)
    del metrics["reward_minus_exact"]  # the reward is the exact verdict
    captions = _captions(records, answers, scores, [reward == 1.0 for reward in scores.reward])
    return Evaluation(_named(prefix, metrics), None, captions, scores, records)


def refinement_metrics(
    records: Sequence[Record], before: np.ndarray, after: np.ndarray, check: FactCheck
) -> dict[str, float]:
    """What refinement did to the share of facts that hold: `refined/improved`, `kept`, `spoilt`,
    and `refined/gain`, by how much the share of fully right images rose.

    Args:
      records: N, some of which describe facts.
      before, after: uint8[N, H, W, 3].
      check: the exact checker.
    """
    pairs = [
        (check(first, record), check(last, record))
        for first, last, record in zip(before, after, records, strict=True)
    ]
    pairs = [(first, last) for first, last in pairs if first is not None and last is not None]
    if not pairs:
        return {}
    shares = np.array([[np.mean(list(facts.values())) for facts in pair] for pair in pairs])
    whole = shares == 1.0
    found = outcomes(shares[:, 0], shares[:, 1])
    found["gain"] = float(whole[:, 1].mean() - whole[:, 0].mean())
    return {f"refined/{name}": value for name, value in found.items()}


def _parts(count: int, micro_batch: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of at most `micro_batch` rows, and each one's row numbers filled up to that many."""
    for first in range(0, count, micro_batch):
        part = slice(first, min(first + micro_batch, count))
        yield part, np.resize(np.arange(part.start, part.stop), micro_batch)


def _joined(parts: Sequence[Sequence[list[str]]]) -> list[list[str]]:
    """Texts of each step, of all micro-batches: [parts][K][n] -> [K][N]."""
    return [[text for own in step for text in own] for step in zip(*parts, strict=True)]


def _captions(
    records: Sequence[Record],
    texts: Sequence[str | None],
    scores: scoring.Rewards,
    exact: Sequence[bool | None],
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": record.prompt,
            "think": text,
            "reward": None if np.isnan(reward) else round(float(reward), 4),
            "exact": held,
        }
        for record, text, reward, held in zip(records, texts, scores.reward, exact, strict=True)
    ]


def _named(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def compare_verifiers(scores: scoring.Rewards, other: scoring.Rewards) -> dict[str, float]:
    """What a second verifier says of the same images, over those that both have judged.

    A reward that rises while `second_minus_reward` falls is learnt against the training verifier.

    Args:
      scores: by the verifier of the training.
      other: by the second one.
    """
    both = scores.valid & other.valid
    found = {"second/valid_fraction": float(np.mean(other.valid))}
    if both.any():
        mean = float(other.reward[both].mean())
        found |= {
            "second/mean": mean,
            "second_minus_reward": mean - float(scores.reward[both].mean()),
        }
    return found


def summarise(
    scores: scoring.Rewards,
    facts: Sequence[Mapping[str, bool] | None],
    records: Sequence[Record],
) -> dict[str, float]:
    """Rewards, and, over the records that describe facts, exact scores by kind and type.

    `exact_all` is the share of images with all facts right, `exact_facts` the share of all facts
    that are; `reward_minus_exact` compares the mean reward with `exact_all` on the same images.
    """
    metrics = {
        key: value
        for key, value in scores.metrics().items()
        if key in KEPT or key.startswith("reward/tag/")
    }
    checked = np.array([held is not None for held in facts], bool)
    if not checked.any():
        return metrics
    exact = np.array([held is not None and all(held.values()) for held in facts], bool)
    values = [value for held in facts if held is not None for value in held.values()]
    metrics["exact_all"] = float(exact[checked].mean())
    metrics["exact_facts"] = float(np.mean(values))
    groups: dict[str, list[int]] = {}
    for index in np.flatnonzero(checked):
        extra = records[index].extra
        if "kind" not in extra:
            continue
        groups.setdefault(f"exact_all/{extra['kind']}", []).append(index)
        if "type" in extra:
            groups.setdefault(f"exact_all/{extra['kind']}/{extra['type']}", []).append(index)
    metrics |= {name: float(exact[members].mean()) for name, members in groups.items()}
    both = checked & scores.valid
    if both.any():
        metrics["reward_minus_exact"] = float(scores.reward[both].mean() - exact[both].mean())
    return metrics
