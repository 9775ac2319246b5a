"""Interfaces of verifiers: models that answer questions about an image, or rate or score it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from alphagrpo_jax.runtime.errors import UserError

Kind = Literal["question", "rating", "score"]  # of a text that is asked about an image


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


class Score(NamedTuple):
    """One score of how well an image fits its prompt, or the reason why it is not known.

    Exactly one of the two is None.
    """

    value: float | None  # any finite number, higher is better
    failure: str | None = None
    permanent: bool = False  # True: the prompt can have no score, whatever the image


class TextResult(NamedTuple):
    """Result of one text of any kind; exactly one of number and failure is None."""

    number: float | None
    failure: str | None = None
    mass: float | None = None  # see `Answer`
    permanent: bool = False  # True: no verifier could answer, so the text is not asked again


class VerifierRequest(NamedTuple):
    """Everything that is asked about one image."""

    questions: tuple[str, ...] = ()  # answered by yes or no
    rated: tuple[str, ...] = ()  # questions that ask for a number from 0 to 10
    scored: tuple[str, ...] = ()  # prompts that the image is scored by

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts, in the order of their answers."""
        return (*self.questions, *self.rated, *self.scored)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each of `texts`."""
        counts: dict[Kind, int] = {
            "question": len(self.questions),
            "rating": len(self.rated),
            "score": len(self.scored),
        }
        return tuple(kind for kind, count in counts.items() for _ in range(count))

    def numbers_of(self, kind: Kind, numbers: Sequence[float]) -> tuple[float, ...]:
        """Returns those of the numbers, one per text, that belong to texts of one kind."""
        return tuple(
            number
            for text_kind, number in zip(self.kinds, numbers, strict=True)
            if text_kind == kind
        )


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


class Scorer(Protocol):
    """Scores images by their prompts; equal images and prompts give equal scores.

    A scorer lives in worker processes of its own, as a verifier does. A verifier may have the
    method as well.
    """

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Scores each image by its prompt, in order.

        Args:
          images: N of uint8[H, W, 3] RGB, which may differ in size.
          prompts: N.
        Returns:
          One `Score` per image. The pool books an exception as a failed attempt.
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

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Scores each image by its prompt; see `Scorer.score`. All images have one size."""
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
