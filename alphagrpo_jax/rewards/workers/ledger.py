"""Ledger of a pool: samples that wait, results, cached answers, counters and the audit log.

Not thread-safe: the pool calls everything here with its lock held. Times are `time.monotonic()`.
"""

import collections
import dataclasses
import hashlib
import math
import time
from collections.abc import Hashable, Sequence

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import Kind, TextResult, VerifierRequest
from alphagrpo_jax.rewards.workers.audit import AuditLog

# The two equations hold at every moment; the fault tests check them after every kind of failure.
COUNTERS = (
    "submitted",  # samples = answered + invalid + those under way
    "answered",
    "invalid",
    "cached",  # answered samples for which no worker was asked
    "attempts",  # = answered - cached + timeouts + deaths + bad_answers
    "retries",
    "timeouts",
    "deaths",
    "bad_answers",  # the verifier raised, or gave no number, a wrong one, too many or too few
    "starts",  # of members: processes, and clients of chat servers
    "questions",  # answered by workers
    "busy_seconds",  # of attempts, summed over all, also over those at the same time
)


@dataclasses.dataclass(frozen=True)
class VerifierResult:
    """Outcome of a sample: its answers, or the reason why it is invalid."""

    p_yes: tuple[float, ...] | None  # one per yes/no question; None if not valid
    valid: bool
    failure: str | None  # of the last attempt, if not valid
    attempts: int
    worker: int | None  # index of the worker that answered; None if cached or not valid
    latency_s: float  # from submission to outcome
    ratings: tuple[float, ...] = ()  # in [0, 10], one per question that asks for a rating
    scores: tuple[float, ...] = ()  # finite, one per prompt that the image is scored by
    masses: tuple[float | None, ...] = ()  # P(yes) + P(no) per yes/no question, None if unknown
    unanswerable: str | None = None  # text that nobody could answer or score, if that is why


@dataclasses.dataclass(eq=False)
class Job:
    """A sample that waits for a worker or is being tried by one."""

    sample_id: Hashable
    image: np.ndarray  # uint8[H, W, 3]
    request: VerifierRequest
    image_key: str  # see `image_key`
    submitted: float
    not_before: float  # end of the back-off after a failed attempt
    attempts: int = 0
    avoid: int | None = None  # worker that failed last; it leaves the sample to others ...
    avoid_until: float = 0.0  # ... until this moment
    failure: str = "no worker was free"
    permanent: bool = False  # no attempt can succeed
    unanswerable: str | None = None  # text that nobody could answer or score

    @property
    def keys(self) -> list[tuple[str, Kind, str]]:
        """Cache keys, one per text: image, kind, text.

        Several kinds may use the same words, but a rating is never an answer.
        """
        request = self.request
        return [
            (self.image_key, kind, text)
            for kind, text in zip(request.kinds, request.texts, strict=True)
        ]


class Ledger:
    """Samples, results, cached answers, counters and audit log of one pool.

    Attributes:
      unaudited: why the audit log is incomplete; None while it is complete.
      counters: totals by the names in `COUNTERS`.
      under_way: ids of samples that wait or are being tried.
      results: outcomes by id that nobody has gathered yet.
    """

    def __init__(self, *, cache_size: int, audit: AuditLog | None, total_seconds: float) -> None:
        """Starts empty.

        Args:
          total_seconds: longest wait of a sample while no verifier answers anything.
          cache_size: most answers to remember; the least recently used go first.
          audit: log of every attempt and every cached answer, if any.
        """
        self.unaudited: str | None = None
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.under_way: set[Hashable] = set()
        self.results: dict[Hashable, VerifierResult] = {}
        self._queue: list[Job] = []  # waiting for a worker
        # Results by `Job.keys`. All workers serve the same model, so it is not part of the key.
        self._cache: collections.OrderedDict[tuple, TextResult] = collections.OrderedDict()
        self._total_seconds = total_seconds
        # When a verifier started or answered a text last. A start has a deadline of its own.
        self._last_sign_of_life = math.inf
        self._cache_size = cache_size
        self._audit = audit

    def add(self, job: Job) -> None:
        """Answers a new sample from the cache, or queues it."""
        self.counters["submitted"] += 1
        self.under_way.add(job.sample_id)
        keys = job.keys
        # All of an image's questions are asked, or none: they are one padded batch, and a batch of
        # another size may give other bits.
        if all(key in self._cache for key in keys):
            self.counters["cached"] += 1
            results = tuple(self._cache[key] for key in keys)
            self._account(job, None, results=results, failure=None)
            self._finish(job, results, None)
        else:
            self._queue.append(job)

    def take(self, worker: int, *, is_only: bool) -> Job | None:
        """Removes the first sample that this worker may try now from the queue and returns it.

        Args:
          worker: its index.
          is_only: True if no other worker is left that could try what this one failed at.
        Returns:
          The sample; None if there is none now.
        """
        now = time.monotonic()
        for job in self._queue:
            # A worker leaves a sample that it failed at to the others, but only for a while: they
            # may be busy or broken themselves, and the sample's deadline goes on.
            avoided = job.avoid == worker and now < job.avoid_until and not is_only
            if job.not_before <= now and not avoided:
                self._queue.remove(job)
                return job
        return None

    def answered(
        self, job: Job, worker: int, results: tuple[TextResult, ...], seconds: float
    ) -> None:
        """Books a successful attempt; `results` holds one per text of the request, in order."""
        self._book_attempt(job, worker, seconds, results=results, failure=None)
        self.counters["questions"] += len(results)
        self.note_life()
        self._finish(job, results, worker)

    def note_life(self) -> None:
        """Notes that a verifier has started or answered: whoever waits, waits for a healthy one."""
        self._last_sign_of_life = time.monotonic()

    def deadline(self, job: Job) -> float:
        """Returns when a waiting sample is given up.

        A queue of any length is no reason, as long as it moves: only the time counts in which no
        verifier answers anything.
        """
        return max(job.submitted, self._last_sign_of_life) + self._total_seconds

    def failed(self, job: Job, worker: int, kind: str, failure: str, seconds: float) -> None:
        """Books a failed attempt; `kind` names the counter."""
        self._book_attempt(job, worker, seconds, results=None, failure=failure)
        self.counters[kind] += 1
        job.failure = f"worker {worker}, attempt {job.attempts}: {failure}"

    def retry(self, job: Job, *, avoid: int, not_before: float, avoid_until: float) -> None:
        """Queues a sample again after a failed attempt."""
        self.counters["retries"] += 1
        job.not_before, job.avoid, job.avoid_until = not_before, avoid, avoid_until
        self._queue.append(job)

    def reject(self, job: Job) -> None:
        """Finishes a sample as invalid; the reason is its last failure."""
        self._finish(job, None, None)

    def abandon(self, job: Job, reason: str) -> None:
        """Finishes a sample as invalid, in whatever state an unexpected error left it."""
        if job in self._queue:
            self._queue.remove(job)
        if job.sample_id in self.under_way:
            job.failure = reason
            self.reject(job)

    def reject_waiting(self, reason: str) -> None:
        """Finishes all waiting samples as invalid."""
        for job in self._queue:
            job.failure = reason
            self.reject(job)
        self._queue.clear()

    def expire(self) -> bool:
        """Finishes waiting samples past their deadline as invalid; returns True if there were any.

        A sample that a worker is trying is left to it: its attempt has a deadline of its own.
        """
        now = time.monotonic()
        late = [job for job in self._queue if self.deadline(job) <= now]
        for job in late:
            self._queue.remove(job)
            job.failure = (
                f"gave up after {self._total_seconds:.1f} s in which no verifier answered: "
                f"{job.failure}"
            )
            self.reject(job)
        return bool(late)

    def seconds_to_event(self) -> float:
        """Returns the seconds until the clock alone changes something; infinity if it never will.

        Waiting threads sleep for so long: later a sample expires, or a worker may take one.
        """
        now = time.monotonic()
        moments = [
            moment
            for job in self._queue
            for moment in (self.deadline(job), job.not_before, job.avoid_until)
            if moment > now
        ]
        return min(moments, default=math.inf) - now

    def close(self) -> None:
        """Closes the audit log."""
        if self._audit is not None:
            self._audit.close()

    def _finish(self, job: Job, results: tuple[TextResult, ...] | None, worker: int | None) -> None:
        """Moves a sample to the results; `results` None makes it invalid."""
        self.counters["invalid" if results is None else "answered"] += 1
        self.under_way.discard(job.sample_id)
        request = job.request
        numbers = None if results is None else _numbers(results)
        self.results[job.sample_id] = VerifierResult(
            p_yes=None if numbers is None else request.numbers_of("question", numbers),
            valid=numbers is not None,
            failure=job.failure if numbers is None else None,
            attempts=job.attempts,
            worker=worker,
            latency_s=time.monotonic() - job.submitted,
            ratings=() if numbers is None else request.numbers_of("rating", numbers),
            scores=() if numbers is None else request.numbers_of("score", numbers),
            masses=_masses(results or (), request),
            unanswerable=job.unanswerable,
        )
        if results is not None and self._cache_size:
            for key, result in zip(job.keys, results, strict=True):
                self._cache[key] = result
                self._cache.move_to_end(key)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _book_attempt(
        self,
        job: Job,
        worker: int,
        seconds: float,
        *,
        results: tuple[TextResult, ...] | None,
        failure: str | None,
    ) -> None:
        """Counts an attempt and writes its row."""
        job.attempts += 1
        self.counters["attempts"] += 1
        self.counters["busy_seconds"] += seconds
        self._account(job, worker, results=results, failure=failure)

    def _account(
        self,
        job: Job,
        worker: int | None,
        *,
        results: tuple[TextResult, ...] | None,
        failure: str | None,
    ) -> None:
        """Writes a row of the audit log; `worker` is None where the answers are cached."""
        if self._audit is None:
            return
        request = job.request
        numbers = None if results is None else _numbers(results)
        row = {
            "sample": str(job.sample_id),
            "image": job.image_key,
            "questions": request.questions,
            "worker": worker,
            "attempt": job.attempts,
            "p_yes": numbers and request.numbers_of("question", numbers),
            "failure": failure,
            "cached": worker is None,
        }
        masses = _masses(results or (), request)
        if any(mass is not None for mass in masses):
            row["mass"] = masses
        if request.rated:
            ratings = numbers and request.numbers_of("rating", numbers)
            row |= {"rated": request.rated, "ratings": ratings}
        if request.scored:
            scores = numbers and request.numbers_of("score", numbers)
            row |= {"scored": request.scored, "scores": scores}
        try:
            self._audit.write(row)
        except OSError as error:
            # Kept instead of raised: this runs in a worker's thread, where nobody would hear of
            # it. The pool refuses to return any number from now on.
            self.unaudited = (
                f"the audit log cannot be written: {self._audit.path}: {error}; make room there, "
                "or choose another file or none (verifier.audit), and run the command again"
            )


def image_key(image: np.ndarray) -> str:
    """Returns the sha256 of the image's shape and pixels."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _numbers(results: Sequence[TextResult]) -> tuple[float, ...]:
    """Returns the numbers of results that all have one."""
    return tuple(result.number for result in results if result.number is not None)


def _masses(results: Sequence[TextResult], request: VerifierRequest) -> tuple[float | None, ...]:
    """Returns the masses of the yes/no questions."""
    return tuple(
        result.mass
        for kind, result in zip(request.kinds, results, strict=False)
        if kind == "question"
    )
