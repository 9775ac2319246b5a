"""Holistic 0 to 10 scores (VIEScore, arXiv 2312.14867), the baseline that DVReward replaces."""

import math
from collections.abc import Sequence


def viescore(semantic: Sequence[float], quality: Sequence[float]) -> float:
    """Computes `sqrt(min(semantic) min(quality)) / 10`.

    Args:
      semantic: semantic-consistency sub-scores, 0 to 10 each, at least one.
      quality: perceptual-quality sub-scores, 0 to 10 each, at least one.
    Returns:
      The score in [0, 1].
    Raises:
      ValueError: an empty list, or a sub-score outside 0 to 10 (NaN included).
    """
    for name, scores in (("semantic", semantic), ("quality", quality)):
        if not scores or not all(0.0 <= score <= 10.0 for score in scores):
            raise ValueError(
                f"got {name} sub-scores {list(scores)}, expected at least one, each in 0..10"
            )
    return math.sqrt(min(semantic) * min(quality)) / 10.0
