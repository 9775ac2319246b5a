"""Member of a pool that is a worker process: it tries one sample at a time."""

import logging
import time

from alphagrpo_jax.rewards.workers import ledger as ledger_lib
from alphagrpo_jax.rewards.workers import worker as worker_lib
from alphagrpo_jax.rewards.workers.state import GivenUpError, PoolState

_LOG = logging.getLogger(__name__)


class ProcessMember:
    """Keeps a worker process running and feeds it samples, on a thread of its own.

    Attributes:
      worker: handle of the process.
    """

    def __init__(self, state: PoolState, index: int, factory: worker_lib.Factory) -> None:
        """Starts nothing yet.

        Args:
          state: of the pool.
          index: of the member in the pool.
          factory: what the process builds.
        """
        self._state, self._index = state, index
        self.worker = worker_lib.Worker(factory, threads=state.options.threads)

    def kill(self) -> None:
        """Ends the process at once; thread-safe."""
        self.worker.kill()

    def drive(self) -> None:
        """Keeps the process running and feeds it samples until the pool closes."""
        state, worker = self._state, self.worker
        failures = 0  # starts and deaths of the process since the last answer
        fruitless = 0  # attempts since the last answer
        try:
            while not state.closing:
                if not worker.running and not self._start(failures):
                    failures += 1
                    continue
                job = state.take(self._index)
                if job is None:
                    return
                answered = self._attempt(job)
                failures = 0 if answered else failures + (not worker.running)
                # A question that nobody could answer says nothing about the process.
                if not job.permanent:
                    fruitless = 0 if answered else fruitless + 1
                state.pause(state.pause_seconds(fruitless))
        except GivenUpError as error:
            state.give_up(self._index, str(error))
        except Exception as error:  # a thread that ended silently would leave everyone waiting
            state.give_up(self._index, f"unexpected {type(error).__name__}: {error}")
            raise
        finally:
            worker.stop()

    def _start(self, failures: int) -> bool:
        """Starts the process; returns False if that failed and may be tried again.

        Raises:
          GivenUpError: too many failures, or its verifier could not be built at the first start or
            not within `start_seconds`.
        """
        state, index = self._state, self._index
        if failures > state.max_restarts:
            raise GivenUpError(
                f"it failed {failures} times in a row, last: {state.failures.get(index)}"
            )
        if failures:
            state.pause(state.backoff.seconds(failures))
        seconds = state.start_seconds(index)
        try:
            self.worker.start(seconds)
        except (
            worker_lib.WorkerBuildError,
            worker_lib.WorkerDiedError,
            worker_lib.WorkerTimeoutError,
            OSError,
        ) as error:
            state.failures[index] = str(error)
            # At the first start a failed build is a wrong path or setting, which no retry mends;
            # later it is an accident, e.g. memory that another process took.
            if isinstance(error, worker_lib.WorkerBuildError) and index not in state.ready:
                raise GivenUpError(str(error)) from error
            if not state.closing:
                _LOG.warning("verifier worker %d did not start: %s", index, error)
            return False
        state.started(index)
        return True

    def _attempt(self, job: ledger_lib.Job) -> bool:
        """Tries a sample once and books the outcome; returns True if it was answered."""
        try:
            return self._ask(job)
        except Exception as error:  # nobody else knows of this sample
            self._state.abandon(job, error)
            raise

    def _ask(self, job: ledger_lib.Job) -> bool:
        """Asks the worker and books its answers or its failure; returns True if it answered."""
        state, started = self._state, time.monotonic()
        try:
            results = self.worker.ask(job.image, job.request, state.options.attempt_seconds)
        except worker_lib.WorkerTimeoutError as error:
            state.settle_failure(self._index, job, "timeouts", str(error), started)
        except worker_lib.WorkerDiedError as error:
            state.settle_failure(self._index, job, "deaths", str(error), started)
        except worker_lib.WorkerError as error:
            state.settle_failure(self._index, job, "bad_answers", str(error), started)
        else:
            return state.settle_results(self._index, job, results, started)
        return False
