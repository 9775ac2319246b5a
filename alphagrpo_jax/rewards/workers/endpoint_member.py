"""Member of a pool that asks chat servers about many samples at once, from one event loop."""

import concurrent.futures
import logging
import math
import time
from typing import Any

from alphagrpo_jax.rewards import verifiers
from alphagrpo_jax.rewards.verifiers.base import TextResult
from alphagrpo_jax.rewards.workers import ledger as ledger_lib
from alphagrpo_jax.rewards.workers import worker as worker_lib
from alphagrpo_jax.rewards.workers.state import GivenUpError, PoolState
from alphagrpo_jax.runtime.errors import UserError

_LOG = logging.getLogger(__name__)


class EndpointMember:
    """Feeds samples to a client of chat servers: as many as keep its requests in flight."""

    def __init__(self, state: PoolState, index: int, factory: worker_lib.Factory) -> None:
        """Opens nothing yet.

        Args:
          state: of the pool.
          index: of the member in the pool.
          factory: of an `OpenAIVerifier`.
        """
        self._state, self._index, self._factory = state, index, factory
        self._verifier: Any = None  # an `OpenAIVerifier`
        # Under the state's lock:
        self._unfinished = 0  # texts of the samples under way
        self._fruitless = 0  # attempts since the last answer
        self._last_failure = 0.0
        self._pause_ends = 0.0

    def kill(self) -> None:
        """Ends all requests at once; thread-safe."""
        if self._verifier is not None:
            self._verifier.close()

    def drive(self) -> None:
        """Starts the client and feeds it samples until the pool closes."""
        try:
            self._start()
            while (job := self._state.take(self._index, self._seconds_to_room)) is not None:
                self._begin(job)
        except GivenUpError as error:
            self._state.give_up(self._index, str(error))
        except Exception as error:  # a thread that ended silently would leave everyone waiting
            if not self._state.closing:
                self._state.give_up(self._index, f"unexpected {type(error).__name__}: {error}")
                raise
        finally:
            self.kill()

    def _start(self) -> None:
        """Builds the client and waits until a server answers.

        Raises:
          GivenUpError: none does in time, or the client cannot be built.
        """
        kind, options = self._factory
        try:
            self._verifier = verifiers.build(kind, {**options, "wait": False})
            self._verifier.await_servers(self._state.start_seconds(self._index))
        except UserError as error:
            raise GivenUpError(str(error)) from error
        except concurrent.futures.CancelledError as error:
            raise GivenUpError("the pool is closed") from error
        self._state.started(self._index)

    def _seconds_to_room(self) -> float:
        """Returns when another sample may be started; with the state's lock held."""
        assert self._verifier is not None
        if self._unfinished >= self._verifier.capacity:
            return math.inf
        return max(0.0, self._pause_ends - time.monotonic())

    def _begin(self, job: ledger_lib.Job) -> None:
        """Starts an attempt at a sample; the event loop's thread books how it ends."""
        assert self._verifier is not None
        state, started = self._state, time.monotonic()
        with state.changed:
            self._unfinished += len(job.request.texts)
        attempt = self._verifier.start(
            job.image, job.request, state.options.attempt_seconds, state.note_answer
        )
        attempt.add_done_callback(lambda ended: self._finish(job, ended, started))

    def _finish(
        self,
        job: ledger_lib.Job,
        attempt: "concurrent.futures.Future[list[TextResult]]",
        started: float,
    ) -> None:
        """Books how an attempt has ended."""
        answered = False
        try:
            answered = self._state.settle_results(self._index, job, attempt.result(), started)
        except concurrent.futures.CancelledError:
            pass  # the pool closes
        except Exception as error:  # nobody else knows of this sample
            _LOG.exception("verifier worker %d has failed unexpectedly", self._index)
            self._state.abandon(job, error)
        with self._state.changed:
            self._unfinished -= len(job.request.texts)
            if answered:
                self._fruitless = 0
            # Of attempts at the same time the first failure counts, else one hiccup looks like
            # many. A question that nobody could answer says nothing about the servers.
            elif started > self._last_failure and not job.permanent:
                self._last_failure = time.monotonic()
                self._fruitless += 1
                self._pause_ends = self._last_failure + self._state.pause_seconds(self._fruitless)
            self._state.changed.notify_all()
