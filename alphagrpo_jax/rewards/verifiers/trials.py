"""Compares a judge's ways: a test image, questions, and the rounding allowed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Largest difference of a probability from "single" that rounding explains. The shipped verifier
# has at most 5e-7, 7e-4 and 6e-3; deeper models round more often.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}
# Of P(yes) among yes and no. Tiny models of 22 families have at most 4e-7, 7e-4 and 7e-3; in half
# precision, logits between 16 and 32 that are off by one step each explain 0.008 and 0.06.
P_YES_TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}
PROBE_SIZE = (208, 304)  # not square, and many patches: wrong positions would show
PROBE_QUESTIONS = ("Is there anything in the image?", "Is it flat?", "Are there exactly two?")
# What models of many families raise where a way is not theirs: a cache of another kind, an image
# token of another name, arguments that they do not take, memory that is not there.
TRIAL_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def probe_image() -> np.ndarray:
    """Returns the test image uint8[H, W, 3]: noise, the same every time."""
    return np.random.default_rng(0).integers(0, 256, (*PROBE_SIZE, 3)).astype(np.uint8)


def tolerance(dtype: torch.dtype) -> float:
    """Returns the largest difference of a probability that rounding in this dtype explains."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])


def disagreement(
    logits: Tensor, expected: Tensor, dtype: torch.dtype, words: Sequence[Sequence[int]] = ()
) -> str | None:
    """Tells how two ways' logits differ beyond what rounding explains; None if they do not.

    Args:
      logits: float[Q, V] of one way.
      expected: float[Q, V] of the other one.
      dtype: in which both were computed.
      words: ids of the tokens that spell yes, and of those that spell no; () or an empty one
        leaves P(yes) uncompared.
    """
    limit = tolerance(dtype)
    difference = _largest_difference(logits.float().softmax(-1), expected.float().softmax(-1))
    # Not "above the limit": NaN compares false.
    if not difference <= limit:
        return f"probabilities differ by {difference:.2g}, above {limit:.2g}"
    if len(words) == 2 and all(words):
        # Where the probe has little mass on yes and no, their probabilities hide a wrong P(yes).
        limit = P_YES_TOLERANCE.get(dtype, P_YES_TOLERANCE[torch.float32])
        difference = _largest_difference(_p_yes(logits, words), _p_yes(expected, words))
        if not difference <= limit:
            return f"P(yes) differs by {difference:.2g}, above {limit:.2g}"
    return None


def _p_yes(logits: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Computes P(yes) / (P(yes) + P(no)), float64[Q], by the log-odds: exact at any mass."""
    yes, no = (logits[:, list(ids)].double().logsumexp(-1) for ids in words)
    return (yes - no).sigmoid()


def _largest_difference(values: Tensor, expected: Tensor) -> float:
    """Returns the largest difference; where both are NaN, each question fails when it is asked."""
    both_nan = values.isnan() & expected.isnan()
    return float((values - expected).abs().masked_fill(both_nan, 0.0).max())
