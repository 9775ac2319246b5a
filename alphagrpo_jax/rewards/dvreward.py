"""DVReward (AlphaGRPO, arXiv 2605.12495): turns P(yes) of atomic questions into a reward."""

import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np

from alphagrpo_jax.config import Aggregate, AnswerScore


class Reward(NamedTuple):
    """Reward of one image; all numbers are NaN if not valid."""

    reward: float
    semantic: float  # mean over the semantic questions
    quality: float  # mean over the quality questions
    valid: bool


INVALID = Reward(math.nan, math.nan, math.nan, valid=False)


def dependent(scores: np.ndarray, parents: Sequence[Sequence[int]]) -> np.ndarray:
    """Lets a question count only if the questions that it depends on hold.

    `0 if any(scores[p] <= 1/2 for p in parents[i]) else scores[i]`. Only direct parents count, by
    their unmodified scores: a failure is not inherited by grandchildren (the reference rule of the
    Davidsonian scene graph, Cho et al., arXiv 2310.18235; there a score is 0 or 1).

    Args:
      scores: float64[Q], in [0, 1].
      parents: per question the indexes of the questions that it depends on.
    Returns:
      float64[Q].
    Raises:
      ValueError: the numbers of lists and of questions differ, or an index is out of range.
    """
    if len(parents) != len(scores):
        raise ValueError(f"got {len(parents)} lists of parents for {len(scores)} questions")
    outside = [p for indexes in parents for p in indexes if not 0 <= p < len(scores)]
    if outside:
        raise ValueError(f"got parents {outside}, expected indexes 0..{len(scores) - 1}")
    holds = scores > 0.5
    return np.array(
        [
            score if all(holds[p] for p in indexes) else 0.0
            for score, indexes in zip(scores, parents, strict=True)
        ]
    )


def dvreward(
    semantic: Sequence[float | None],
    quality: Sequence[float | None],
    *,
    score: AnswerScore = "confidence",
    aggregate: Aggregate = "geometric",
    parents: Sequence[Sequence[int]] | None = None,
) -> Reward:
    """Combines the answers about one image.

    `s`, `q` = means of the scores of the semantic and of the quality questions; reward =
    `sqrt(s q)` ("geometric", AlphaGRPO's), `(s + q) / 2` ("mean"), or the mean over all questions
    ("pooled"). A score is P(yes) ("confidence") or 1 where P(yes) > 1/2, else 0 ("binary"). An
    answer that is missing (None), NaN or outside [0, 1] makes the whole reward invalid, never 0.

    Args:
      semantic, quality: P(yes) per question. One of the two may be empty: the reward is then the
        other's mean, and the empty one's mean is NaN.
      score, aggregate: see above.
      parents: per question, the semantic ones first, the indexes of the questions that must hold
        for it to count (see `dependent`); None: every question counts.
    Returns:
      `Reward`; `INVALID` if any answer is missing or there are no questions.
    Raises:
      ValueError: unknown option, or parents that do not fit the questions.
    """
    if score not in get_args(AnswerScore):
        raise ValueError(f"got score={score!r}, expected one of {get_args(AnswerScore)}")
    if aggregate not in get_args(Aggregate):
        raise ValueError(f"got aggregate={aggregate!r}, expected one of {get_args(Aggregate)}")
    scores = [*semantic, *quality]
    if not scores or not all(p is not None and 0.0 <= p <= 1.0 for p in scores):
        return INVALID
    values = np.asarray(scores, np.float64)
    if score == "binary":
        values = (values > 0.5).astype(np.float64)
    if parents is not None:
        values = dependent(values, parents)
    s_values, q_values = values[: len(semantic)], values[len(semantic) :]
    if not semantic or not quality:
        mean = float(values.mean())
        s, q = (mean, math.nan) if semantic else (math.nan, mean)
        return Reward(mean, s, q, valid=True)
    s, q = float(s_values.mean()), float(q_values.mean())
    if aggregate == "geometric":
        return Reward(math.sqrt(s * q), s, q, valid=True)
    if aggregate == "mean":
        return Reward((s + q) / 2, s, q, valid=True)
    return Reward(float(values.mean()), s, q, valid=True)
