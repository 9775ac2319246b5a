"""Verifier worker: a separate Python process, and the handle that the pool drives it by.

The process imports neither JAX nor the caller's main module. It gets its thread count by
environment variables, which take effect only before torch is imported. It ignores Ctrl-C and
SIGTERM, since a scheduler sends them to the whole process group while the parent still needs
answers, and ends when its parent is gone.
"""

import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from alphagrpo_jax.rewards import verifiers
from alphagrpo_jax.rewards.verifiers.base import TextResult, Verifier, VerifierRequest
from alphagrpo_jax.runtime.errors import UserError

Factory = tuple[str, Mapping[str, Any]]  # (kind, options), see `verifiers.build`
# A program of its own rather than `multiprocessing`, which would import the caller's main module.
# The signals come first: an import may take seconds, and a Ctrl-C would end it.
_BOOT = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "from alphagrpo_jax.rewards.workers import worker; "
    "worker.serve(int(sys.argv[1]), int(sys.argv[2]))"
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(Exception):
    """The worker could not answer a request; its process is alive."""


class WorkerBuildError(WorkerError):
    """The worker could not build its verifier; its process has ended."""


class WorkerDiedError(Exception):
    """The worker's process ended before it answered."""


class WorkerTimeoutError(Exception):
    """The worker's process did not answer in time and was killed."""


class Worker:
    """Handle of one worker process; all but `kill` is used by one thread only."""

    def __init__(self, factory: Factory, *, threads: int) -> None:
        self._factory = factory
        self._threads = threads
        self._process: subprocess.Popen | None = None
        self._connection: multiprocessing.connection.Connection | None = None

    @property
    def running(self) -> bool:
        """True while the process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id; None without a process."""
        return None if self._process is None else self._process.pid

    def start(self, seconds: float) -> None:
        """Starts a process and waits until its verifier is built.

        Raises:
          WorkerBuildError: the verifier could not be built.
          WorkerDiedError, WorkerTimeoutError: see the classes.
        """
        self.stop()
        self._connection, child_end = multiprocessing.Pipe(duplex=True)
        # Our copy of the child's end is closed at once: only then does the pipe break when the
        # child dies, and `recv` does not wait for ever.
        with child_end:
            arguments = [sys.executable, "-c", _BOOT, str(child_end.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                arguments,
                pass_fds=[child_end.fileno()],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
            )
        kind, value = self._exchange(self._factory, seconds)
        if kind != "ready":
            self.stop()
            raise WorkerBuildError(value)

    def ask(self, image: np.ndarray, request: VerifierRequest, seconds: float) -> list[TextResult]:
        """Returns the verifier's results in the order of the request's texts, unchecked.

        Args:
          image: uint8[H, W, 3].
          request: the texts, at least one.
          seconds: deadline, after which the process is killed.
        Raises:
          WorkerError: the verifier raised.
          WorkerDiedError, WorkerTimeoutError: see the classes.
        """
        kind, value = self._exchange((image, request), seconds)
        if kind != "answers":
            raise WorkerError(value)
        return value

    def kill(self) -> None:
        """Ends the process at once; thread-safe."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()

    def stop(self) -> None:
        """Ends the process if there is one, and closes the connection."""
        self.kill()
        if self._process is not None:
            self._process.wait()  # else it would stay as a zombie
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _exchange(self, message: Any, seconds: float) -> tuple[str, Any]:
        """Sends a message and waits for the reply; kills a process that takes too long."""
        # A timer that kills, instead of `poll` with a timeout: `send` blocks if the process stops
        # reading, and `recv` if it writes half a reply. Killing also works on a stopped process.
        process, connection = self._process, self._connection
        if process is None or connection is None:
            raise WorkerDiedError("the worker has no process; start it first")
        expired = threading.Event()

        def expire() -> None:
            expired.set()  # before the kill, whose effect the other thread explains by it
            self.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            connection.send(message)
            return connection.recv()
        except Exception as error:  # a closed pipe, or a reply that cannot be unpickled
            self.kill()
            code = process.wait()
            if expired.is_set():
                raise WorkerTimeoutError(f"no answer within {seconds:.1f} s") from error
            raise WorkerDiedError(f"worker process ended with code {code} ({error!r})") from error
        finally:
            timer.cancel()

    def _environment(self) -> dict[str, str]:
        """Returns this process' environment with the thread count and the module search path."""
        # The child must find "callable" verifiers wherever the caller does ("" is the current one).
        search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = dict.fromkeys(_THREAD_VARIABLES, str(self._threads))
        fixed = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": search_path}
        return {**os.environ, **threads, **fixed}


def serve(descriptor: int, parent: int) -> None:
    """Runs a worker process: builds a verifier, then answers until the pipe closes.

    Args:
      descriptor: file descriptor of this process' end of the pipe.
      parent: process id of the pool's process.
    """
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
) -> Verifier | None:
    """Builds the verifier and reports "ready"; reports "failed" and returns None if it cannot."""
    try:
        verifier = verifiers.build(kind, options)
    except Exception as error:  # whatever it is, the parent's message should say it
        _print_bug(error)
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return None
    connection.send(("ready", None))
    return verifier


def _answer(verifier: Any, image: np.ndarray, request: VerifierRequest) -> tuple[str, Any]:
    """Returns ("answers", one `TextResult` per text), or ("error", message).

    Args:
      verifier: a `Verifier` or `Scorer` with the methods that the request's kinds need.
      image: uint8[H, W, 3].
      request: the texts.
    """
    questions, rated, scored = (list(texts) for texts in request)
    try:
        answers = verifier.answer(image, questions) if questions else []
        results = [
            TextResult(_plain(answer.p_yes), answer.failure, _plain(answer.mass), answer.permanent)
            for answer in answers
        ]
        # Checked here too: too few of one kind and too many of another add up to the right number.
        if len(results) != len(questions):
            return "error", f"got {len(results)} answers, expected {len(questions)}"
        ratings = verifier.rate(image, rated) if rated else []
        if len(ratings) != len(rated):
            return "error", f"got {len(ratings)} ratings, expected {len(rated)}"
        results += [TextResult(_plain(rating.value), rating.failure) for rating in ratings]
        scores = verifier.score([image] * len(scored), scored) if scored else []
        if len(scores) != len(scored):
            return "error", f"got {len(scores)} scores, expected {len(scored)}"
        results += [
            TextResult(_plain(score.value), score.failure, permanent=score.permanent)
            for score in scores
        ]
        return "answers", results
    except Exception as error:  # fails this attempt only; the process and its model stay
        _print_bug(error)
        return "error", f"{type(error).__name__}: {error}"


_printed: set[str] = set()  # bugs whose traceback this process has printed


def _print_bug(error: Exception) -> None:
    """Prints the traceback of an error that is no user's, once per message: attempts repeat."""
    message = f"{type(error).__name__}: {error}"
    if not isinstance(error, UserError) and message not in _printed:
        _printed.add(message)
        traceback.print_exception(error)


def _plain(number: Any) -> float | None:
    """Converts a number to Python's, so that the parent needs no tensor library to unpickle it."""
    return None if number is None else float(number)


def _end_with_parent(parent: int) -> None:
    """Ends this process, even in the middle of an answer, soon after its parent has ended."""
    # An idle worker notices the closed pipe; a busy one would go on for as long as its model does.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
