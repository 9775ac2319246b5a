"""Ledger of a pool: samples that wait, results, cached answers, counters and the audit log.

Not thread-safe: the pool calls everything here with its lock held. Times are `time.monotonic()`.
"""

import collections
import dataclasses
import hashlib
import time
from collections.abc import Hashable

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import Kind, VerifierRequest
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
    "starts",  # of worker processes
    "questions",  # answered by workers
    "busy_seconds",  # summed over workers
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


@dataclasses.dataclass(eq=False)
class Job:
    """A sample that waits for a worker or is being tried by one."""

    sample_id: Hashable
    image: np.ndarray  # uint8[H, W, 3]
    request: VerifierRequest
    image_key: str  # see `image_key`
    submitted: float
    deadline: float  # no attempt starts later
    not_before: float  # end of the back-off after a failed attempt
    attempts: int = 0
    avoid: int | None = None  # worker that failed last; it leaves the sample to others ...
    avoid_until: float = 0.0  # ... until this moment
    failure: str = "no worker was free"

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

    def __init__(self, *, cache_size: int, audit: AuditLog | None) -> None:
        """Starts empty.

        Args:
          cache_size: most answers to remember; the least recently used go first.
          audit: log of every attempt and every cached answer, if any.
        """
        self.unaudited: str | None = None
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.under_way: set[Hashable] = set()
        self.results: dict[Hashable, VerifierResult] = {}
        self._queue: list[Job] = []  # waiting for a worker
        # Numbers by `Job.keys`. All workers serve the same model, so it is not part of the key.
        self._cache: collections.OrderedDict[tuple, float] = collections.OrderedDict()
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
            numbers = tuple(self._cache[key] for key in keys)
            self._account(job, None, numbers=numbers, failure=None)
            self._finish(job, numbers, None)
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

    def answered(self, job: Job, worker: int, numbers: tuple[float, ...], seconds: float) -> None:
        """Books a successful attempt; `numbers` holds one per text of the request, in order."""
        self._book_attempt(job, worker, seconds, numbers=numbers, failure=None)
        self.counters["questions"] += len(numbers)
        self._finish(job, numbers, worker)

    def failed(self, job: Job, worker: int, kind: str, failure: str, seconds: float) -> None:
        """Books a failed attempt; `kind` names the counter."""
        self._book_attempt(job, worker, seconds, numbers=None, failure=failure)
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
        late = [job for job in self._queue if job.deadline <= now]
        for job in late:
            self._queue.remove(job)
            job.failure = f"gave up after {now - job.submitted:.1f} s: {job.failure}"
            self.reject(job)
        return bool(late)

    def seconds_to_next_event(self) -> float | None:
        """Returns the seconds until the clock alone changes something; None if it never will.

        Waiting threads sleep for so long: later a sample expires, or a worker may take one.
        """
        now = time.monotonic()
        moments = [
            moment
            for job in self._queue
            for moment in (job.deadline, job.not_before, job.avoid_until)
            if moment > now
        ]
        return min(moments) - now if moments else None

    def close(self) -> None:
        """Closes the audit log."""
        if self._audit is not None:
            self._audit.close()

    def _finish(self, job: Job, numbers: tuple[float, ...] | None, worker: int | None) -> None:
        """Moves a sample to the results; `numbers` None makes it invalid."""
        self.counters["invalid" if numbers is None else "answered"] += 1
        self.under_way.discard(job.sample_id)
        self.results[job.sample_id] = VerifierResult(
            p_yes=None if numbers is None else job.request.numbers_of("question", numbers),
            valid=numbers is not None,
            failure=job.failure if numbers is None else None,
            attempts=job.attempts,
            worker=worker,
            latency_s=time.monotonic() - job.submitted,
            ratings=() if numbers is None else job.request.numbers_of("rating", numbers),
            scores=() if numbers is None else job.request.numbers_of("score", numbers),
        )
        if numbers is not None and self._cache_size:
            for key, number in zip(job.keys, numbers, strict=True):
                self._cache[key] = number
                self._cache.move_to_end(key)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _book_attempt(
        self,
        job: Job,
        worker: int,
        seconds: float,
        *,
        numbers: tuple[float, ...] | None,
        failure: str | None,
    ) -> None:
        """Counts an attempt and writes its row."""
        job.attempts += 1
        self.counters["attempts"] += 1
        self.counters["busy_seconds"] += seconds
        self._account(job, worker, numbers=numbers, failure=failure)

    def _account(
        self,
        job: Job,
        worker: int | None,
        *,
        numbers: tuple[float, ...] | None,
        failure: str | None,
    ) -> None:
        """Writes a row of the audit log; `worker` is None where the answers are cached."""
        if self._audit is None:
            return
        request = job.request
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
