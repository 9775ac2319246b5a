"""DVReward (AlphaGRPO, arXiv 2605.12495): P(yes) of atomic questions -> a reward in [0, 1]."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SCORES = ("confidence", "binary")
AGGREGATES = ("geometric", "mean", "pooled")


class Reward(NamedTuple):
    """Reward of one image; all numbers are NaN if not valid."""

    reward: float
    semantic: float  # mean over the semantic questions
    quality: float  # mean over the quality questions
    valid: bool


INVALID = Reward(math.nan, math.nan, math.nan, valid=False)


def dvreward(
    semantic: Sequence[float | None],
    quality: Sequence[float | None],
    *,
    score: str = "confidence",
    aggregate: str = "geometric",
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
    Returns:
      `Reward`; `INVALID` if any answer is missing or there are no questions.
    Raises:
      ValueError: unknown option.
    """
    if score not in SCORES:
        raise ValueError(f"got score={score!r}, expected one of {SCORES}")
    if aggregate not in AGGREGATES:
        raise ValueError(f"got aggregate={aggregate!r}, expected one of {AGGREGATES}")
    scores = [*semantic, *quality]
    if not scores or not all(p is not None and 0.0 <= p <= 1.0 for p in scores):
        return INVALID
    values = np.asarray(scores, np.float64)
    if score == "binary":
        values = (values > 0.5).astype(np.float64)
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
