"""Holds what a judge's ways are compared by: a test image, questions, and the rounding allowed."""

import numpy as np
import torch

# Largest difference of a probability from "single" that rounding explains. The shipped verifier
# has at most 5e-7, 7e-4 and 6e-3; deeper models round more often.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}
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
