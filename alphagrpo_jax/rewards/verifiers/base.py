"""What a verifier is: something that answers questions about an image, or rates it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Answer(NamedTuple):
    """P(yes) of one question, or why there is none. Exactly one of the two is None."""

    p_yes: float | None  # P(yes) / (P(yes) + P(no)), in [0, 1]
    failure: str | None = None


class Rating(NamedTuple):
    """One rating, or why there is none. Exactly one of the two is None."""

    value: float | None  # expected value over the numbers 0 to 10, in [0, 10]
    failure: str | None = None


class VerifierLoadError(RuntimeError):
    """A verifier cannot be used; the message says why and what to do."""


class Verifier(Protocol):
    """Lives inside one worker process; the same image and questions give the same answers."""

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers each question about the image, in order.

        Args:
          image: uint8[H, W, 3] RGB.
          questions: at least one; "yes" is the good answer of each.
        Returns:
          One `Answer` per question. Exceptions are taken as the failure of this attempt.
        """
        ...

    def rate(self, image: np.ndarray, questions: Sequence[str]) -> list[Rating]:
        """Rates the image by each question, in order; needed for holistic scores only.

        Args:
          image: uint8[H, W, 3] RGB.
          questions: at least one; 10 is the best rating.
        Returns:
          One `Rating` per question. Exceptions are taken as the failure of this attempt.
        """
        ...
