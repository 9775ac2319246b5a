"""State that the members of a pool share: its ledger under a lock, and who is ready or lost."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence

from alphagrpo_jax.config import PoolOptions
from alphagrpo_jax.rewards.verifiers.base import TextResult, VerifierRequest
from alphagrpo_jax.rewards.workers import ledger as ledger_lib
from alphagrpo_jax.rewards.workers.audit import AuditLog
from alphagrpo_jax.runtime.backoff import Backoff

LONGEST_PAUSE = 50.0  # of a member that fails repeatedly, in units of backoff_seconds
LARGEST = sys.float_info.max
# By kind of text: the answer's name, its least and largest value, and both in words.
RANGES = {
    "question": ("P(yes) =", 0.0, 1.0, "a number in [0, 1]"),
    "rating": ("a rating of", 0.0, 10.0, "a number in [0, 10]"),
    "score": ("a score of", -LARGEST, LARGEST, "a finite number"),
}

_LOG = logging.getLogger(__name__)


class BadAnswerError(Exception):
    """The results are not one number per text, or one is outside the range of its kind.

    Attributes:
      permanent: True if no attempt can succeed.
      unanswerable: the text that no verifier could answer or score, if that is why.
    """

    def __init__(
        self, message: str, *, permanent: bool = False, unanswerable: str | None = None
    ) -> None:
        super().__init__(message)
        self.permanent, self.unanswerable = permanent, unanswerable


class GivenUpError(Exception):
    """The member must not be started again."""


class PoolState:
    """State that all members of a pool work on; all methods are thread-safe.

    Attributes:
      options: deadlines, attempts, threads and cache.
      max_restarts: of one member without an answer in between.
      longest_pause: of a member that fails repeatedly, in seconds.
      backoff: waits after failures.
      changed: guards the ledger and all below; notified at every change that someone may wait for.
      ledger: samples and results.
      members: number of members.
      ready: members that have started at least once.
      lost: members given up, and why.
      failures: why a member last failed.
      closing: True once the pool closes.
    """

    def __init__(
        self,
        options: PoolOptions,
        *,
        members: int,
        max_restarts: int,
        backoff_seconds: float,
        audit_path: str | None,
    ) -> None:
        """Starts without samples; see `pool.Pool`.

        Raises:
          OSError: the audit log cannot be opened.
        """
        self.options, self.members, self.max_restarts = options, members, max_restarts
        self.longest_pause = LONGEST_PAUSE * backoff_seconds
        self.backoff = Backoff(backoff_seconds)
        self._first_start_ends = time.monotonic() + options.start_seconds
        audit = None if audit_path is None else AuditLog(audit_path)
        self.changed = threading.Condition()
        self.ledger = ledger_lib.Ledger(
            cache_size=options.cache_size, audit=audit, total_seconds=options.total_seconds
        )
        self.ready: set[int] = set()
        self.lost: dict[int, str] = {}
        self.failures: dict[int, str] = {}
        self.closing = False

    @property
    def all_lost(self) -> bool:
        """True if no member is left."""
        return len(self.lost) == self.members

    @property
    def lost_message(self) -> str:
        """Says why no member is left."""
        reasons = "; ".join(sorted(set(self.lost.values())))
        return f"no verifier worker is left: {reasons}"

    def start_seconds(self, index: int) -> float:
        """Returns the seconds that a member may take to start now.

        Raises:
          GivenUpError: it has never started, and the time for the first start is over.
        """
        seconds = self.options.start_seconds
        if index not in self.ready:
            seconds = self._first_start_ends - time.monotonic()
            if seconds <= 0:
                raise GivenUpError(
                    f"it did not start within {self.options.start_seconds:.1f} s: "
                    f"{self.failures.get(index)}"
                )
        return seconds

    def started(self, index: int) -> None:
        """Books the start of a member."""
        with self.changed:
            self.ledger.counters["starts"] += 1
            if index not in self.ready:  # one that is started again and again gives no sign of life
                self.ledger.note_life()
            self.ready.add(index)
            self.changed.notify_all()

    def take(
        self, index: int, seconds_to_room: Callable[[], float] = lambda: 0.0
    ) -> ledger_lib.Job | None:
        """Waits for a sample that a member may try now; returns None when the pool closes.

        Args:
          index: of the member.
          seconds_to_room: returns, with the lock held, when the member has room for a sample: 0
            now, infinity after a change that is notified.
        """
        with self.changed:
            while not self.closing:
                if self.ledger.expire():
                    self.changed.notify_all()
                is_only = self.members - len(self.lost) <= 1
                seconds = seconds_to_room()
                job = self.ledger.take(index, is_only=is_only) if seconds <= 0 else None
                if job is not None:
                    return job
                seconds = min(seconds if seconds > 0 else math.inf, self.ledger.seconds_to_event())
                self.changed.wait(seconds if seconds < math.inf else None)
        return None

    def note_answer(self) -> None:
        """Notes that a verifier has answered a text of a sample that is not finished yet."""
        with self.changed:
            self.ledger.note_life()

    def settle_results(
        self, index: int, job: ledger_lib.Job, results: Sequence[TextResult], started: float
    ) -> bool:
        """Books the results of an attempt; returns True if they answer the sample."""
        try:
            checked = checked_results(results, job.request)
        except BadAnswerError as error:
            job.permanent, job.unanswerable = error.permanent, error.unanswerable
            self.settle_failure(index, job, "bad_answers", str(error), started)
            return False
        with self.changed:
            if not self.closing:
                self.ledger.answered(job, index, checked, time.monotonic() - started)
                self.changed.notify_all()
        return True

    def settle_failure(
        self, index: int, job: ledger_lib.Job, kind: str, failure: str, started: float
    ) -> None:
        """Books a failed attempt, then queues the sample again or makes it invalid."""
        now = time.monotonic()
        with self.changed:
            if self.closing:
                return  # the pool itself ended the member: not a failure of the sample
            self.ledger.failed(job, index, kind, failure, now - started)
            self.failures[index] = failure
            _LOG.warning("sample %r: %s", job.sample_id, job.failure)
            is_last = job.attempts >= self.options.max_attempts or job.permanent
            if is_last or now >= self.ledger.deadline(job):
                self.ledger.reject(job)
            else:
                # For one attempt's time behind the back-off the sample waits for another member;
                # if that one is busy or lost, this one may try again.
                not_before = now + self.backoff.seconds(job.attempts)
                self.ledger.retry(
                    job,
                    avoid=index,
                    not_before=not_before,
                    avoid_until=not_before + self.options.attempt_seconds,
                )
            self.changed.notify_all()

    def abandon(self, job: ledger_lib.Job, error: BaseException) -> None:
        """Makes a sample invalid after an unexpected error: else `gather` would hang."""
        with self.changed:
            self.ledger.abandon(job, f"unexpected {type(error).__name__}: {error}")
            self.changed.notify_all()

    def give_up(self, index: int, reason: str) -> None:
        """Leaves a member out for good; if it was the last, all waiting samples become invalid."""
        with self.changed:
            if self.closing:
                return
            _LOG.error("verifier worker %d is given up: %s", index, reason)
            self.lost[index] = reason
            if self.all_lost:
                self.ledger.reject_waiting(self.lost_message)
            self.changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Sleeps; returns at once when the pool closes."""
        end = time.monotonic() + seconds
        with self.changed:
            while not self.closing and (remaining := end - time.monotonic()) > 0:
                self.changed.wait(remaining)

    def pause_seconds(self, fruitless: int) -> float:
        """Returns how long a member pauses after so many attempts in a row without an answer.

        Two in a row are hardly the samples' fault. A broken member fails fast, so without a pause
        it would use up the attempts of samples that others could answer.
        """
        return (
            min(self.backoff.seconds(fruitless - 1), self.longest_pause) if fruitless > 1 else 0.0
        )


def checked_results(
    results: Sequence[TextResult], request: VerifierRequest
) -> tuple[TextResult, ...]:
    """Returns a member's results if there is a number for every text of the request.

    Raises:
      BadAnswerError: there are too many or too few, or one is outside `RANGES`.
    """
    if len(results) != len(request.texts):
        raise BadAnswerError(f"got {len(results)} answers, expected {len(request.texts)}")
    # First a text that no verifier could answer, which decides about the sample, then other
    # failures with a reason; last come texts that were left out because of them.
    by_weight = sorted(
        range(len(results)),
        key=lambda position: (not results[position].permanent, results[position].failure is None),
    )
    for position in by_weight:
        result, text = results[position], request.texts[position]
        name, low, high, expected = RANGES[request.kinds[position]]
        # The comparison is false for NaN too.
        number = result.number
        if result.failure is not None or number is None or not low <= number <= high:
            reason = result.failure or f"got {name} {number}, expected {expected}"
            if result.permanent:
                act = "score" if request.kinds[position] == "score" else "answer"
                message = f"no verifier can {act} {text!r}: {reason}"
                raise BadAnswerError(message, permanent=True, unanswerable=text)
            raise BadAnswerError(f"question {position}: {reason}")
    return tuple(results)
