"""A pool over one verifier in this process, which answers when its samples are gathered."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import Answer, BatchVerifier, checked_image
from alphagrpo_jax.rewards.workers.ledger import VerifierResult


class _Sample(NamedTuple):
    image: np.ndarray  # uint8[H, W, 3]
    questions: tuple[str, ...]


class InProcessPool:
    """A `scoring.VerifierPool` without worker processes, threads or retries.

    `submit` only stores a sample: the answers come from the verifier as it is at `gather`, so a
    verifier that shares the device with rollouts does not compete with them. Used by one thread.

    Attributes:
      verifier: what answers.
    """

    def __init__(self, verifier: BatchVerifier) -> None:
        self.verifier = verifier
        self._waiting: dict[Hashable, _Sample] = {}

    def submit(
        self,
        sample_id: Hashable,
        image: np.ndarray,
        questions: Sequence[str],
        rated: Sequence[str] = (),
    ) -> None:
        """Stores a sample; see `pool.Pool.submit`.

        Raises:
          ValueError: wrong image or questions, the id is in use, or a rating is asked for.
        """
        if rated or not questions or isinstance(questions, str):
            raise ValueError(
                f"sample {sample_id!r}: got questions {questions!r} and {rated!r} to be rated, "
                "expected a list of yes/no questions only: a verifier in this process gives no "
                "ratings"
            )
        image = checked_image(image, f"sample {sample_id!r}: ").copy()
        if sample_id in self._waiting:
            raise ValueError(f"sample {sample_id!r} was submitted before and not yet gathered")
        self._waiting[sample_id] = _Sample(image, tuple(questions))

    def gather(self, sample_ids: Iterable[Hashable]) -> dict[Hashable, VerifierResult]:
        """Answers these samples, each once, and returns their results in the order of the ids.

        Raises:
          ValueError: an id that was not submitted, or was gathered before; or what the verifier
            raises, which makes no sample invalid: there is no other worker that could do better.
        """
        sample_ids = list(dict.fromkeys(sample_ids))
        unknown = [sample_id for sample_id in sample_ids if sample_id not in self._waiting]
        if unknown:
            raise ValueError(
                f"got sample ids {unknown[:5]} that are not waiting, expected ids submitted and "
                "not yet gathered"
            )
        samples = [self._waiting[sample_id] for sample_id in sample_ids]
        answers = self.verifier.answer_batch(
            [sample.image for sample in samples], [sample.questions for sample in samples]
        )
        for sample_id in sample_ids:
            del self._waiting[sample_id]
        return {
            sample_id: _result(sample_answers)
            for sample_id, sample_answers in zip(sample_ids, answers, strict=True)
        }


def _result(answers: Sequence[Answer]) -> VerifierResult:
    """Returns P(yes) of all answers of a sample, or its first failure."""
    p_yes = tuple(answer.p_yes for answer in answers if answer.p_yes is not None)
    failures = [answer.failure for answer in answers if answer.p_yes is None]
    return VerifierResult(
        p_yes=None if failures else p_yes,
        valid=not failures,
        failure=failures[0] if failures else None,
        attempts=1,
        worker=None,
        latency_s=0.0,
    )
