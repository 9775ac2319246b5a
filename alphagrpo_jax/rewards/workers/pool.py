"""Pool of verifier worker processes: answers questions about images, never by a made-up number.

One thread of the caller's process drives each worker. A sample (one image and its questions) is
tried until a worker gives a number in [0, 1] for each question, at most `max_attempts` times; then
it is invalid. A failed attempt is repeated after an exponential back-off, on another worker if
there is one. A worker that dies is restarted; one that does not answer in time is killed and
restarted; one that fails repeatedly pauses. No worker holds up the others.
"""

import logging
import pickle
import sys
import threading
import time
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from alphagrpo_jax.config import PoolOptions
from alphagrpo_jax.rewards.verifiers.base import VerifierRequest, checked_image
from alphagrpo_jax.rewards.workers import ledger as ledger_lib
from alphagrpo_jax.rewards.workers import worker as worker_lib
from alphagrpo_jax.rewards.workers.audit import AuditLog
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.runtime.backoff import Backoff
from alphagrpo_jax.runtime.errors import UserError
from alphagrpo_jax.runtime.stopping import LOOK_SECONDS, StopRequest

LONGEST_PAUSE = 50.0  # of a worker that fails repeatedly, in units of backoff_seconds
LARGEST = sys.float_info.max
# By kind of text: the answer's name, its least and largest value, and both in words.
RANGES = {
    "question": ("P(yes) =", 0.0, 1.0, "a number in [0, 1]"),
    "rating": ("a rating of", 0.0, 10.0, "a number in [0, 10]"),
    "score": ("a score of", -LARGEST, LARGEST, "a finite number"),
}

_LOG = logging.getLogger(__name__)


class PoolError(UserError, RuntimeError):
    """The pool cannot work at all; the message says why."""


class Pool:
    """Worker processes that answer questions about images; a context manager.

    All public methods are thread-safe.
    """

    def __init__(
        self,
        factories: Sequence[worker_lib.Factory],
        options: PoolOptions,
        *,
        capacity: int = 1024,
        max_restarts: int = 5,
        backoff_seconds: float = 0.2,
        audit_path: str | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """Starts the workers in the background; `wait_ready` waits for them.

        Args:
          factories: one per worker, (kind, options) of `verifiers.build`, resolved inside the
            worker. Requests go to whichever worker is free, so all must serve the same model.
          options: deadlines, attempts, threads and cache.
          capacity: most samples under way; `submit` blocks while there are so many.
          max_restarts: of one worker without an answer in between; then it is given up.
          backoff_seconds: before the first retry; doubles, with jitter of +-50%.
          audit_path: JSON Lines of every attempt and every cached answer; None for none.
          stop: ends waits for the workers once it is overdue.
        Raises:
          ValueError: there is no factory, or one cannot be pickled.
          OSError: the audit log cannot be opened.
        """
        _check_factories(factories)
        self._options, self._capacity, self._max_restarts = options, capacity, max_restarts
        self._longest_pause = LONGEST_PAUSE * backoff_seconds
        self._stop = StopRequest() if stop is None else stop
        self._first_start_ends = time.monotonic() + options.start_seconds
        audit = None if audit_path is None else AuditLog(audit_path)
        # Guards the ledger and the next three; notified at every change that someone may wait for.
        self._changed = threading.Condition()
        self._ledger = ledger_lib.Ledger(cache_size=options.cache_size, audit=audit)
        self._ready: set[int] = set()  # workers that have started at least once
        self._lost: dict[int, str] = {}  # workers given up, and why
        self._failures: dict[int, str] = {}  # why a worker last failed; written by its own thread
        self._closing = False
        self._backoff = Backoff(backoff_seconds)
        self._workers = [
            worker_lib.Worker(worker_factory, threads=options.threads)
            for worker_factory in factories
        ]
        self._drivers = [
            threading.Thread(target=self._drive, args=(index,), daemon=True, name=f"worker-{index}")
            for index in range(len(self._workers))
        ]
        for driver in self._drivers:
            driver.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Waits until every worker has started or was given up.

        Raises:
          PoolError: all workers were given up, or the pool is closed.
          StoppedError: a stop ended the wait.
        """
        with self._changed:
            while len(self._ready | self._lost.keys()) < len(self._workers):
                self._check_open()
                self._stop.check()
                self._changed.wait(LOOK_SECONDS)
            if self._all_lost():
                raise PoolError(self._lost_message())

    def submit(
        self,
        sample_id: Hashable,
        image: np.ndarray,
        questions: Sequence[str],
        rated: Sequence[str] = (),
        scored: Sequence[str] = (),
    ) -> None:
        """Queues a sample; blocks while `capacity` samples are under way.

        Args:
          sample_id: the key for `gather`; any hashable.
          image: uint8[H, W, 3], copied.
          questions: yes/no questions, e.g. `Record.question_texts`.
          rated: questions that ask for a number from 0 to 10.
          scored: prompts that a scorer scores the image by. The sample is valid only if all texts
            of the three kinds have an answer.
        Raises:
          ValueError: wrong image or texts, or the id is in use.
          PoolError: the pool is closed, or the audit log cannot be written.
        """
        image = checked_image(image, f"sample {sample_id!r}: ").copy()
        texts = (questions, rated, scored)
        if any(isinstance(text, str) for text in texts) or not any(texts):
            raise ValueError(
                f"sample {sample_id!r}: got questions {questions!r}, {rated!r} to be rated and "
                f"prompts {scored!r}, expected lists, and at least 1 text"
            )
        key = ledger_lib.image_key(image)
        with self._changed:
            self._wait_for_room()
            if sample_id in self._ledger.under_way or sample_id in self._ledger.results:
                raise ValueError(f"sample {sample_id!r} was submitted before and not yet gathered")
            now = time.monotonic()
            job = ledger_lib.Job(
                sample_id=sample_id,
                image=image,
                request=VerifierRequest(tuple(questions), tuple(rated), tuple(scored)),
                image_key=key,
                submitted=now,
                deadline=now + self._options.total_seconds,
                not_before=now,
            )
            self._ledger.add(job)
            # Nobody would ever take it from the queue: `gather` would wait until its deadline.
            if self._all_lost():
                self._ledger.reject_waiting(self._lost_message())
            self._changed.notify_all()

    def gather(self, sample_ids: Iterable[Hashable]) -> dict[Hashable, VerifierResult]:
        """Waits for these samples and returns their results, each once, in the order of the ids.

        Raises:
          ValueError: an id that was not submitted, or was gathered before.
          PoolError: the pool was closed before all had a result, or the audit log cannot be
            written: the pool returns no number that is not in the log.
          StoppedError: a stop ended the wait.
        """
        sample_ids = list(dict.fromkeys(sample_ids))
        with self._changed:
            ledger = self._ledger
            submitted = ledger.under_way | ledger.results.keys()
            unknown = [sample_id for sample_id in sample_ids if sample_id not in submitted]
            if unknown:
                raise ValueError(
                    f"got sample ids {unknown[:5]}, expected ids submitted and not yet gathered"
                )
            while not ledger.under_way.isdisjoint(sample_ids):
                self._check_open()
                self._stop.check()
                # Callers expire samples too: all workers may be busy with one that hangs.
                if not ledger.expire():
                    self._wait_as_caller()
            # Again: the last row may have failed to be written since.
            self._check_audit()
            return {sample_id: ledger.results.pop(sample_id) for sample_id in sample_ids}

    def counters(self) -> dict[str, float]:
        """Returns totals since the start: `ledger.COUNTERS`, and `lost_workers` (given up)."""
        with self._changed:
            return self._ledger.counters | {"lost_workers": len(self._lost)}

    def close(self) -> None:
        """Ends all workers at once; samples under way get no result. May be called twice."""
        # First the mark, then the kills: a driver that finds its worker dead must know that the
        # pool did it, and neither book a failure nor start another process.
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for worker, driver in zip(self._workers, self._drivers, strict=True):
            # One kill may come too early: the driver may be just about to start a process.
            while driver.is_alive():
                worker.kill()
                driver.join(timeout=0.1)
        # Last, when no driver can write a row any more.
        with self._changed:
            self._ledger.close()

    # On the thread of one worker.

    def _drive(self, index: int) -> None:
        """Keeps one worker running and feeds it samples until the pool closes."""
        worker = self._workers[index]
        failures = 0  # starts and deaths of the process since the last answer
        fruitless = 0  # attempts since the last answer
        try:
            while not self._closing:
                if not worker.running and not self._start(index, failures):
                    failures += 1
                    continue
                job = self._take(index)
                if job is None:
                    return
                answered = self._attempt(index, job)
                failures = 0 if answered else failures + (not worker.running)
                fruitless = 0 if answered else fruitless + 1
                # Two in a row are hardly the samples' fault. A broken worker fails fast, so without
                # a pause it would use up the attempts of samples that others could answer.
                if fruitless > 1:
                    self._pause(min(self._backoff.seconds(fruitless - 1), self._longest_pause))
        except _GivenUpError as error:
            self._give_up(index, str(error))
        except Exception as error:  # a thread that ended silently would leave everyone waiting
            self._give_up(index, f"unexpected {type(error).__name__}: {error}")
            raise
        finally:
            worker.stop()

    def _start(self, index: int, failures: int) -> bool:
        """Starts the worker's process; returns False if that failed and may be tried again.

        Raises:
          _GivenUpError: too many failures, or its verifier could not be built at the first start
            or not within `start_seconds`.
        """
        reason = self._failures.get(index)
        if failures > self._max_restarts:
            raise _GivenUpError(f"it failed {failures} times in a row, last: {reason}")
        seconds = self._options.start_seconds
        if failures:
            self._pause(self._backoff.seconds(failures))
        if index not in self._ready:
            seconds = self._first_start_ends - time.monotonic()
            if seconds <= 0:
                raise _GivenUpError(
                    f"it did not start within {self._options.start_seconds:.1f} s: {reason}"
                )
        try:
            self._workers[index].start(seconds)
        except (
            worker_lib.WorkerBuildError,
            worker_lib.WorkerDiedError,
            worker_lib.WorkerTimeoutError,
            OSError,
        ) as error:
            self._failures[index] = str(error)
            # At the first start a failed build is a wrong path or setting, which no retry mends;
            # later it is an accident, e.g. memory that another process took.
            if isinstance(error, worker_lib.WorkerBuildError) and index not in self._ready:
                raise _GivenUpError(str(error)) from error
            if not self._closing:
                _LOG.warning("verifier worker %d did not start: %s", index, error)
            return False
        with self._changed:
            self._ledger.counters["starts"] += 1
            self._ready.add(index)
            self._changed.notify_all()
        return True

    def _take(self, index: int) -> ledger_lib.Job | None:
        """Waits for a sample that this worker may try now; returns None when the pool closes."""
        with self._changed:
            while not self._closing:
                if self._ledger.expire():
                    self._changed.notify_all()
                is_only = len(self._workers) - len(self._lost) <= 1
                job = self._ledger.take(index, is_only=is_only)
                if job is not None:
                    return job
                self._changed.wait(self._ledger.seconds_to_next_event())
        return None

    def _attempt(self, index: int, job: ledger_lib.Job) -> bool:
        """Tries a sample once and books the outcome; returns True if it was answered."""
        try:
            return self._ask(index, job)
        except Exception as error:  # nobody else knows of this sample: `gather` would hang
            with self._changed:
                self._ledger.abandon(job, f"unexpected {type(error).__name__}: {error}")
                self._changed.notify_all()
            raise

    def _ask(self, index: int, job: ledger_lib.Job) -> bool:
        """Asks the worker and books its answers or its failure; returns True if it answered."""
        started = time.monotonic()
        try:
            answers = self._workers[index].ask(
                job.image, job.request, self._options.attempt_seconds
            )
            numbers = _checked_answers(answers, job.request)
        except worker_lib.WorkerTimeoutError as error:
            self._settle_failure(index, job, "timeouts", str(error), started)
            return False
        except worker_lib.WorkerDiedError as error:
            self._settle_failure(index, job, "deaths", str(error), started)
            return False
        except (worker_lib.WorkerError, _BadAnswerError) as error:
            self._settle_failure(index, job, "bad_answers", str(error), started)
            return False
        with self._changed:
            self._ledger.answered(job, index, numbers, time.monotonic() - started)
            self._changed.notify_all()
        return True

    def _settle_failure(
        self, index: int, job: ledger_lib.Job, kind: str, failure: str, started: float
    ) -> None:
        """Books a failed attempt, then queues the sample again or makes it invalid."""
        now = time.monotonic()
        with self._changed:
            if self._closing:
                return  # the pool itself killed the worker: not a failure of the sample
            self._ledger.failed(job, index, kind, failure, now - started)
            self._failures[index] = failure
            _LOG.warning("sample %r: %s", job.sample_id, job.failure)
            if job.attempts >= self._options.max_attempts or now >= job.deadline:
                self._ledger.reject(job)
            else:
                # For one attempt's time behind the back-off the sample waits for another worker;
                # if that one is busy or lost, this one may try again.
                not_before = now + self._backoff.seconds(job.attempts)
                self._ledger.retry(
                    job,
                    avoid=index,
                    not_before=not_before,
                    avoid_until=not_before + self._options.attempt_seconds,
                )
            self._changed.notify_all()

    def _give_up(self, index: int, reason: str) -> None:
        """Leaves a worker out for good; if it was the last, all waiting samples become invalid."""
        _LOG.error("verifier worker %d is given up: %s", index, reason)
        with self._changed:
            self._lost[index] = reason
            if self._all_lost():
                self._ledger.reject_waiting(self._lost_message())
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        """Sleeps; returns at once when the pool closes."""
        end = time.monotonic() + seconds
        with self._changed:
            while not self._closing and (remaining := end - time.monotonic()) > 0:
                self._changed.wait(remaining)

    # Called with the lock held.

    def _wait_for_room(self) -> None:
        """Waits until fewer than `capacity` samples are under way.

        A stop ends the wait, but not by an error: only `gather` is a place where all processes
        of a run can leave together.
        """
        self._check_open()
        while len(self._ledger.under_way) >= self._capacity and not self._stop.overdue:
            if not self._ledger.expire():
                self._wait_as_caller()
            self._check_open()

    def _wait_as_caller(self) -> None:
        """Waits until something may have changed, or it is time to look for a stop."""
        seconds = self._ledger.seconds_to_next_event()
        self._changed.wait(LOOK_SECONDS if seconds is None else min(seconds, LOOK_SECONDS))

    def _check_open(self) -> None:
        if self._closing:
            raise PoolError("the verifier pool is closed; make a new one")
        self._check_audit()

    def _check_audit(self) -> None:
        if self._ledger.unaudited is not None:
            raise PoolError(self._ledger.unaudited)

    def _all_lost(self) -> bool:
        return len(self._lost) == len(self._workers)

    def _lost_message(self) -> str:
        reasons = "; ".join(sorted(set(self._lost.values())))
        return f"no verifier worker is left: {reasons}"


class _BadAnswerError(Exception):
    """The answers are not one number per text, or one is outside the range of its kind."""


class _GivenUpError(Exception):
    """The worker must not be started again."""


def _check_factories(factories: Sequence[worker_lib.Factory]) -> None:
    """Refuses factories that no worker could get.

    Raises:
      ValueError: there is none, or one cannot be pickled.
    """
    if not factories:
        raise ValueError("got no verifier factories, expected one per worker")
    try:
        pickle.dumps(list(factories))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"got a verifier factory that cannot be pickled: {error}") from error


def _checked_answers(
    answers: Sequence[tuple[float | None, str | None]], request: VerifierRequest
) -> tuple[float, ...]:
    """Returns the numbers of a worker's answers, one per text of the request.

    Raises:
      _BadAnswerError: there are too many or too few, or one is outside `RANGES`.
    """
    if len(answers) != len(request.texts):
        raise _BadAnswerError(f"got {len(answers)} answers, expected {len(request.texts)}")
    numbers = []
    for position, (kind, (number, failure)) in enumerate(zip(request.kinds, answers, strict=True)):
        name, low, high, expected = RANGES[kind]
        # The comparison is false for NaN too.
        if failure is not None or number is None or not low <= number <= high:
            raise _BadAnswerError(
                f"question {position}: {failure or f'got {name} {number}, expected {expected}'}"
            )
        numbers.append(number)
    return tuple(numbers)
