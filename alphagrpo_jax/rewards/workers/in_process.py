"""A pool over one verifier in this process, which answers when its samples are gathered."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import (
    Answer,
    BatchVerifier,
    Score,
    VerifierRequest,
    checked_image,
)
from alphagrpo_jax.rewards.workers.ledger import VerifierResult


class _Sample(NamedTuple):
    image: np.ndarray  # uint8[H, W, 3]
    request: VerifierRequest


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
        scored: Sequence[str] = (),
    ) -> None:
        """Stores a sample; see `pool.Pool.submit`.

        Raises:
          ValueError: wrong image or texts, the id is in use, or a rating is asked for.
        """
        is_text = isinstance(questions, str) or isinstance(scored, str)
        if rated or is_text or not (questions or scored):
            raise ValueError(
                f"sample {sample_id!r}: got questions {questions!r}, {rated!r} to be rated and "
                f"prompts {scored!r}, expected a list of yes/no questions or of prompts, and no "
                "ratings: a verifier in this process gives none"
            )
        image = checked_image(image, f"sample {sample_id!r}: ").copy()
        if sample_id in self._waiting:
            raise ValueError(f"sample {sample_id!r} was submitted before and not yet gathered")
        request = VerifierRequest(tuple(questions), (), tuple(scored))
        self._waiting[sample_id] = _Sample(image, request)

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
        asking = [sample for sample in samples if sample.request.questions]
        answers = iter(
            self.verifier.answer_batch(
                [sample.image for sample in asking], [sample.request.questions for sample in asking]
            )
            if asking
            else ()
        )
        pairs = [(sample.image, text) for sample in samples for text in sample.request.scored]
        scores = iter(
            self.verifier.score([image for image, _ in pairs], [text for _, text in pairs])
            if pairs
            else ()
        )
        results = {}
        for sample_id, sample in zip(sample_ids, samples, strict=True):
            sample_answers = next(answers) if sample.request.questions else []
            sample_scores = [next(scores) for _ in sample.request.scored]
            results[sample_id] = _result(sample.request, sample_answers, sample_scores)
        for sample_id in sample_ids:
            del self._waiting[sample_id]
        return results


def _result(
    request: VerifierRequest, answers: Sequence[Answer], scores: Sequence[Score]
) -> VerifierResult:
    """Returns all numbers of a sample, or its first failure."""
    p_yes = tuple(answer.p_yes for answer in answers if answer.p_yes is not None)
    values = tuple(score.value for score in scores if score.value is not None)
    failures = [answer.failure for answer in answers if answer.p_yes is None]
    failures += [score.failure for score in scores if score.value is None]
    failures += [
        f"got a score of {value}, expected a finite number"
        for value in values
        if not math.isfinite(value)
    ]
    hopeless = [
        question
        for question, answer in zip(request.questions, answers, strict=True)
        if answer.permanent
    ]
    hopeless += [
        prompt for prompt, score in zip(request.scored, scores, strict=True) if score.permanent
    ]
    return VerifierResult(
        p_yes=None if failures else p_yes,
        valid=not failures,
        failure=failures[0] if failures else None,
        attempts=1,
        worker=None,
        latency_s=0.0,
        masses=tuple(answer.mass for answer in answers),
        unanswerable=hopeless[0] if hopeless else None,
        scores=() if failures else values,
    )
