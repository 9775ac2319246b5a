"""One verifier worker: a Python process of its own, and the handle by which the pool drives it.

The process imports neither JAX nor the caller's main module. It gets its thread count by
environment variables (they count only before torch is imported), ignores Ctrl-C and SIGTERM (a
scheduler sends them to the whole group, while the parent still wants answers), and ends when its
parent is gone.
"""

import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Factory = tuple[str, Mapping[str, Any]]  # (kind, options), see `verifiers.build`
_BOOT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "from alphagrpo_jax.rewards.workers import worker; "
    "worker.serve(int(sys.argv[1]), int(sys.argv[2]))"
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(Exception):
    """A request that a worker could not answer; the process is alive."""


class WorkerBuildError(WorkerError):
    """The verifier could not be built; the process has ended."""


class WorkerDiedError(Exception):
    """The process ended before it answered."""


class WorkerTimeoutError(Exception):
    """The process did not answer in time and was killed."""


class Worker:
    """Handle of one worker process; used by one thread, except `kill`."""

    def __init__(self, factory: Factory, *, threads: int) -> None:
        self._factory = factory
        self._threads = threads
        self._process: subprocess.Popen | None = None
        self._connection: multiprocessing.connection.Connection | None = None

    @property
    def running(self) -> bool:
        """Whether there is a live process."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id, None before the first start."""
        return None if self._process is None else self._process.pid

    def start(self, seconds: float) -> None:
        """Starts a process and waits until its verifier is built.

        Raises:
          WorkerBuildError: building failed; WorkerDiedError, WorkerTimeoutError: as they say.
        """
        self.stop()
        self._connection, theirs = multiprocessing.Pipe(duplex=True)
        with theirs:
            arguments = [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                arguments,
                pass_fds=[theirs.fileno()],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
            )
        kind, value = self._exchange(self._factory, seconds)
        if kind != "ready":
            self.stop()
            raise WorkerBuildError(value)

    def ask(
        self, image: np.ndarray, questions: Sequence[str], rated: int, seconds: float
    ) -> list[tuple[float | None, str | None]]:
        """The verifier's answers to the questions, as (number, failure) pairs, unchecked.

        Args:
          image: uint8[H, W, 3].
          questions: the last `rated` of them ask for a rating, the others for yes or no.
          rated: how many.
          seconds: after which the process is killed.
        Raises:
          WorkerError: the verifier raised; WorkerDiedError, WorkerTimeoutError: as they say.
        """
        kind, value = self._exchange((image, list(questions), rated), seconds)
        if kind != "answers":
            raise WorkerError(value)
        return value

    def kill(self) -> None:
        """Ends the process at once; safe from any thread."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()

    def stop(self) -> None:
        """Ends the process if there is one, and frees what it held."""
        self.kill()
        if self._process is not None:
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _exchange(self, message: Any, seconds: float) -> tuple[str, Any]:
        """Sends a message and waits for the reply; a process that takes too long is killed.

        The timer, rather than `poll`, also covers a process that stops reading or replies in part.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            self._connection.send(message)
            return self._connection.recv()
        except Exception as error:  # a closed pipe, or a reply that cannot be unpickled
            self.kill()
            code = self._process.wait()
            if expired.is_set():
                raise WorkerTimeoutError(f"no answer within {seconds:.1f} s") from error
            raise WorkerDiedError(f"worker process ended with code {code} ({error!r})") from error
        finally:
            timer.cancel()

    def _environment(self) -> dict[str, str]:
        search = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = dict.fromkeys(_THREAD_VARIABLES, str(self._threads))
        return {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": search}


def serve(descriptor: int, parent: int) -> None:
    """Main function of a worker process: builds a verifier, then answers until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    connection = multiprocessing.connection.Connection(descriptor)
    try:
        kind, options = connection.recv()
        verifier = _build(connection, kind, options)
        while verifier is not None:
            connection.send(_answer(verifier, *connection.recv()))
    except (EOFError, ConnectionError):
        return  # the parent closed the pipe or is gone


def _build(
    connection: multiprocessing.connection.Connection, kind: str, options: Mapping[str, Any]
) -> Any:
    """The verifier, after reporting "ready"; None after reporting "failed"."""
    from alphagrpo_jax.rewards import verifiers  # here: a worker's import errors are reported too

    try:
        verifier = verifiers.build(kind, options)
    except Exception as error:  # whatever it is, the parent must hear of it
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return None
    connection.send(("ready", None))
    return verifier


def _answer(verifier: Any, image: np.ndarray, questions: list[str], rated: int) -> tuple[str, Any]:
    cut = len(questions) - rated
    try:
        answers = verifier.answer(image, questions[:cut]) if cut else []
        found = [(_plain(answer.p_yes), answer.failure) for answer in answers]
        if len(found) != cut:  # ratings behind them could make up for it
            return "error", f"got {len(found)} answers, expected {cut}"
        if rated:
            ratings = verifier.rate(image, questions[cut:])
            found += [(_plain(rating.value), rating.failure) for rating in ratings]
        return "answers", found
    except Exception as error:  # the failure of one attempt, to be retried
        return "error", f"{type(error).__name__}: {error}"


def _plain(number: Any) -> float | None:
    """A python number, so that the parent needs no tensor library to read it."""
    return None if number is None else float(number)


def _end_with_parent(parent: int) -> None:
    """Ends this process, even in the middle of an answer, soon after its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
