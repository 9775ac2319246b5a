"""The pool's books: which samples wait, what became of the others, and counts that add up.

Not thread-safe: the pool calls everything here with its lock held. Times are `time.monotonic()`.
"""

import collections
import dataclasses
import hashlib
import time
from collections.abc import Hashable

import numpy as np

from alphagrpo_jax.rewards.workers.audit import AuditLog

COUNTERS = (
    "submitted",  # = answered + invalid + those still under way
    "answered",
    "invalid",
    "cached",  # of the answered: without asking a worker
    "attempts",  # = answered - cached + timeouts + deaths + bad_answers
    "retries",
    "timeouts",
    "deaths",
    "bad_answers",  # the verifier raised, or gave no number, a wrong one, or too many or too few
    "starts",  # of worker processes
    "questions",  # answered by workers
    "busy_seconds",  # summed over workers
)


@dataclasses.dataclass(frozen=True)
class VerifierResult:
    """What became of a sample."""

    p_yes: tuple[float, ...] | None  # one per yes/no question; None if not valid
    valid: bool
    failure: str | None  # of the last attempt, if not valid
    attempts: int
    worker: int | None  # that gave the answers
    latency_s: float  # from submission to outcome
    ratings: tuple[float, ...] = ()  # in [0, 10], one per question that asks for one


@dataclasses.dataclass(eq=False)
class Job:
    """A sample under way."""

    sample_id: Hashable
    image: np.ndarray  # uint8[H, W, 3]
    questions: tuple[str, ...]  # the yes/no questions, then those that ask for a rating
    rated: int  # how many of them ask for a rating
    image_key: str  # see `image_key`
    submitted: float
    deadline: float  # no attempt starts later
    not_before: float
    attempts: int = 0
    avoid: int | None = None  # the worker that failed last; others go first until avoid_until
    avoid_until: float = 0.0
    failure: str = "no worker was free"

    @property
    def cut(self) -> int:
        """The number of yes/no questions, which come first."""
        return len(self.questions) - self.rated

    @property
    def keys(self) -> list[tuple[str, bool, str]]:
        """By what the answers are remembered: image, whether a rating is asked for, question."""
        return [
            (self.image_key, number >= self.cut, question)
            for number, question in enumerate(self.questions)
        ]


class Ledger:
    """Samples waiting, under way and finished; remembered answers; counters; audit log."""

    def __init__(self, *, cache_size: int, audit: AuditLog | None) -> None:
        self.unaudited: str | None = None  # why the audit log does not account for everything
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.under_way: set[Hashable] = set()  # waiting or being tried
        self.results: dict[Hashable, VerifierResult] = {}
        self._queue: list[Job] = []  # waiting for a worker
        # Numbers by `Job.keys`; the verifier is one, so it has no place in the key.
        self._cache: collections.OrderedDict[tuple, float] = collections.OrderedDict()
        self._cache_size = cache_size
        self._audit = audit

    def add(self, job: Job) -> None:
        """Takes a new sample: answers it from memory or queues it."""
        self.counters["submitted"] += 1
        self.under_way.add(job.sample_id)
        keys = job.keys
        # An image is asked all its questions or none: the answers of one batch belong together.
        if all(key in self._cache for key in keys):
            self.counters["cached"] += 1
            numbers = tuple(self._cache[key] for key in keys)
            self._account(job, None, numbers=numbers, failure=None)
            self._finish(job, numbers, None)
        else:
            self._queue.append(job)

    def take(self, worker: int, *, alone: bool) -> Job | None:
        """The first sample that this worker may try now, no longer waiting.

        Args:
          worker: its index.
          alone: whether there is no other worker, so that it may not avoid what it failed at.
        """
        now = time.monotonic()
        for job in self._queue:
            avoided = job.avoid == worker and now < job.avoid_until and not alone
            if job.not_before <= now and not avoided:
                self._queue.remove(job)
                return job
        return None

    def answered(self, job: Job, worker: int, numbers: tuple[float, ...], seconds: float) -> None:
        """Books a successful attempt; `numbers` are one per question, in their order."""
        self._book_attempt(job, worker, seconds, numbers=numbers, failure=None)
        self.counters["questions"] += len(numbers)
        self._finish(job, numbers, worker)

    def failed(self, job: Job, worker: int, kind: str, failure: str, seconds: float) -> None:
        """Books a failed attempt; `kind` is the counter it goes to."""
        self._book_attempt(job, worker, seconds, numbers=None, failure=failure)
        self.counters[kind] += 1
        job.failure = f"worker {worker}, attempt {job.attempts}: {failure}"

    def retry(self, job: Job, *, avoid: int, not_before: float, avoid_until: float) -> None:
        """Queues a sample again after a failed attempt."""
        self.counters["retries"] += 1
        job.not_before, job.avoid, job.avoid_until = not_before, avoid, avoid_until
        self._queue.append(job)

    def reject(self, job: Job) -> None:
        """Finishes a sample as invalid, with the failure it carries."""
        self._finish(job, None, None)

    def abandon(self, job: Job, reason: str) -> None:
        """Finishes a sample as invalid in whatever state an unexpected error left it."""
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
        """Finishes the waiting samples whose time is over as invalid; whether there were any."""
        now = time.monotonic()
        late = [job for job in self._queue if job.deadline <= now]
        for job in late:
            self._queue.remove(job)
            job.failure = f"gave up after {now - job.submitted:.1f} s: {job.failure}"
            self.reject(job)
        return bool(late)

    def seconds_to_next_event(self) -> float | None:
        """Until something in the queue changes by the clock alone; None if nothing will."""
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
        valid = numbers is not None
        self.counters["answered" if valid else "invalid"] += 1
        self.under_way.discard(job.sample_id)
        self.results[job.sample_id] = VerifierResult(
            p_yes=numbers[: job.cut] if valid else None,
            valid=valid,
            failure=None if valid else job.failure,
            attempts=job.attempts,
            worker=worker,
            latency_s=time.monotonic() - job.submitted,
            ratings=numbers[job.cut :] if valid else (),
        )
        if valid and self._cache_size:
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
        """Writes a row of the audit log; `worker` is None where the answers were remembered."""
        if self._audit is None:
            return
        row = {
            "sample": str(job.sample_id),
            "image": job.image_key,
            "questions": job.questions[: job.cut],
            "worker": worker,
            "attempt": job.attempts,
            "p_yes": numbers and numbers[: job.cut],
            "failure": failure,
            "cached": worker is None,
        }
        if job.rated:
            row |= {
                "rated": job.questions[job.cut :],
                "ratings": numbers and numbers[job.cut :],
            }
        try:
            self._audit.write(row)
        except OSError as error:
            self.unaudited = (
                f"the audit log cannot be written: {self._audit.path}: {error}; make room there, "
                "or choose another file or none (verifier.audit), and run the command again"
            )


def image_key(image: np.ndarray) -> str:
    """sha256 over the image's shape and pixels."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
