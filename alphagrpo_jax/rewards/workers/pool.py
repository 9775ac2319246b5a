"""Pool of verifiers: answers questions about images, never by a made-up number.

Its members are worker processes, which try one sample at a time, and clients of chat servers, which
try many; a thread of the caller's process drives each. A sample (one image and its questions) is
tried until a worker gives a number in [0, 1] for each question, at most `max_attempts` times; then
it is invalid. A failed attempt is repeated after an exponential back-off, on another member if
there is one. A process that dies is restarted; one that does not answer in time is killed and
restarted; one that fails repeatedly pauses. No member holds up the others.
"""

import pickle
import threading
import time
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from alphagrpo_jax.config import PoolOptions
from alphagrpo_jax.rewards.verifiers.base import VerifierRequest, checked_image
from alphagrpo_jax.rewards.workers import ledger as ledger_lib
from alphagrpo_jax.rewards.workers.endpoint_member import EndpointMember
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.rewards.workers.process_member import ProcessMember
from alphagrpo_jax.rewards.workers.state import PoolState
from alphagrpo_jax.rewards.workers.worker import Factory
from alphagrpo_jax.runtime.errors import UserError
from alphagrpo_jax.runtime.stopping import LOOK_SECONDS, StopRequest

MEMBERS = {"openai": EndpointMember}  # by kind of verifier; all others get a process


class PoolError(UserError, RuntimeError):
    """The pool cannot work at all; the message says why."""


class Pool:
    """Members that answer questions about images; a context manager.

    All public methods are thread-safe.
    """

    def __init__(
        self,
        factories: Sequence[Factory],
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
          factories: one per member, (kind, options) of `verifiers.build`; those of kind "openai"
            are clients in this process, all others are resolved inside a worker process. Samples
            go to whichever member is free, so all must serve the same model.
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
        self._capacity = capacity
        self._stop = StopRequest() if stop is None else stop
        self._state = PoolState(
            options,
            members=len(factories),
            max_restarts=max_restarts,
            backoff_seconds=backoff_seconds,
            audit_path=audit_path,
        )
        self._members = [
            MEMBERS.get(factory[0], ProcessMember)(self._state, index, factory)
            for index, factory in enumerate(factories)
        ]
        self._drivers = [
            threading.Thread(target=member.drive, daemon=True, name=f"worker-{index}")
            for index, member in enumerate(self._members)
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
        with self._state.changed:
            while len(self._state.ready | self._state.lost.keys()) < len(self._members):
                self._check_open()
                self._stop.check()
                self._state.changed.wait(LOOK_SECONDS)
            if self._state.all_lost:
                raise PoolError(self._state.lost_message)

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
        with self._state.changed:
            self._wait_for_room()
            if sample_id in self._state.ledger.under_way or sample_id in self._state.ledger.results:
                raise ValueError(f"sample {sample_id!r} was submitted before and not yet gathered")
            now = time.monotonic()
            job = ledger_lib.Job(
                sample_id=sample_id,
                image=image,
                request=VerifierRequest(tuple(questions), tuple(rated), tuple(scored)),
                image_key=key,
                submitted=now,
                not_before=now,
            )
            self._state.ledger.add(job)
            # Nobody would ever take it from the queue: `gather` would wait until its deadline.
            if self._state.all_lost:
                self._state.ledger.reject_waiting(self._state.lost_message)
            self._state.changed.notify_all()

    def gather(self, sample_ids: Iterable[Hashable]) -> dict[Hashable, VerifierResult]:
        """Waits for these samples and returns their results, each once, in the order of the ids.

        Raises:
          ValueError: an id that was not submitted, or was gathered before.
          PoolError: the pool was closed before all had a result, or the audit log cannot be
            written: the pool returns no number that is not in the log.
          StoppedError: a stop ended the wait.
        """
        sample_ids = list(dict.fromkeys(sample_ids))
        with self._state.changed:
            ledger = self._state.ledger
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
        with self._state.changed:
            return self._state.ledger.counters | {"lost_workers": len(self._state.lost)}

    def close(self) -> None:
        """Ends all workers at once; samples under way get no result. May be called twice."""
        # First the mark, then the kills: a driver that finds its worker dead must know that the
        # pool did it, and neither book a failure nor start another process.
        with self._state.changed:
            self._state.closing = True
            self._state.changed.notify_all()
        for member, driver in zip(self._members, self._drivers, strict=True):
            # One kill may come too early: the driver may be just about to start a process.
            while driver.is_alive():
                member.kill()
                driver.join(timeout=0.1)
        # Last, when no driver can write a row any more.
        with self._state.changed:
            self._state.ledger.close()

    # Called with the lock held.

    def _wait_for_room(self) -> None:
        """Waits until fewer than `capacity` samples are under way.

        A stop ends the wait, but not by an error: only `gather` is a place where all processes
        of a run can leave together.
        """
        self._check_open()
        while len(self._state.ledger.under_way) >= self._capacity and not self._stop.overdue:
            if not self._state.ledger.expire():
                self._wait_as_caller()
            self._check_open()

    def _wait_as_caller(self) -> None:
        """Waits until something may have changed, or it is time to look for a stop."""
        self._state.changed.wait(min(self._state.ledger.seconds_to_event(), LOOK_SECONDS))

    def _check_open(self) -> None:
        if self._state.closing:
            raise PoolError("the verifier pool is closed; make a new one")
        self._check_audit()

    def _check_audit(self) -> None:
        if self._state.ledger.unaudited is not None:
            raise PoolError(self._state.ledger.unaudited)


def _check_factories(factories: Sequence[Factory]) -> None:
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
