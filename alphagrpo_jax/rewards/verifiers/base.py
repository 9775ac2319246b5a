"""Interfaces of verifiers: models that answer questions about an image, or rate it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from alphagrpo_jax.runtime.errors import UserError


class Answer(NamedTuple):
    """P(yes) of one question, or the reason for its absence. Exactly one of the two is None."""

    p_yes: float | None  # P(yes) / (P(yes) + P(no)), in [0, 1]
    failure: str | None = None
    mass: float | None = None  # P(yes) + P(no) of the token read, in [0, 1]; None if unknown
    permanent: bool = False  # no verifier could answer: the question is not asked again


class Rating(NamedTuple):
    """One rating, or the reason for its absence. Exactly one of the two is None."""

    value: float | None  # expected value over the numbers 0 to 10, in [0, 10]
    failure: str | None = None


class VerifierLoadError(UserError, RuntimeError):
    """A verifier cannot be loaded; the message says why and what to do."""


class Verifier(Protocol):
    """Answers questions about one image; equal images and questions give equal answers.

    Most verifiers live in a worker process each (`workers.pool`).
    """

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers each question about the image, in order.

        Args:
          image: uint8[H, W, 3] RGB.
          questions: at least one; "yes" is the good answer of each.
        Returns:
          One `Answer` per question. The pool books an exception as a failed attempt.
        """
        ...

    def rate(self, image: np.ndarray, questions: Sequence[str]) -> list[Rating]:
        """Rates the image by each question, in order; needed for holistic scores only.

        Args:
          image: uint8[H, W, 3] RGB.
          questions: at least one; 10 is the best rating.
        Returns:
          One `Rating` per question. The pool books an exception as a failed attempt.
        """
        ...


class BatchVerifier(Verifier, Protocol):
    """Answers about many images at once, in this process (`workers.in_process`)."""

    def answer_batch(
        self, images: Sequence[np.ndarray], questions: Sequence[Sequence[str]]
    ) -> list[list[Answer]]:
        """Answers each image's questions, in order.

        Args:
          images: N of uint8[H, W, 3] RGB, all of one size.
          questions: N lists; "yes" is the good answer of each question.
        Returns:
          N lists, one `Answer` per question.
        """
        ...


def checked_image(image: np.ndarray, where: str = "") -> np.ndarray:
    """Returns the image as an array if it is uint8[H, W, 3].

    Args:
      image: pixels.
      where: begins the error message.
    Raises:
      ValueError: it has another dtype or shape.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"{where}got an image {image.dtype}{list(image.shape)}, expected uint8[H, W, 3]"
        )
    return image
