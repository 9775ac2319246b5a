"""The model in a process of its own, so that requests are parsed while it computes.

Python runs one thread at a time: beside a small model, whose passes are mostly Python, the server's
own work would double the time of every question.
"""

import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.serving.batcher import GreedyReply, answer
from alphagrpo_jax.rewards.verifiers.serving.requests import ImageQuestion
from alphagrpo_jax.runtime.errors import InputError, UserError

STOP_SECONDS = 1.0  # for the process to end by itself
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the parent's affair, which ends the child


class ModelError(Exception):
    """The model failed; its process has printed the traceback."""


class ModelDiedError(Exception):
    """The model's process has ended."""


class ModelProcess:
    """A Hugging Face verifier in a child process; ends with this one.

    Attributes:
      closing: True once `close` has been called: what then dies was not at fault.
    """

    def __init__(self, folder: str | Path, options: dict[str, Any]) -> None:
        """Starts to load the verifier; `wait` waits for it.

        Args:
          folder: of the model.
          options: keyword arguments of `HFVerifier`.
        """
        # Not forked: threads of the tokenizer and of PyTorch do not survive that.
        context = multiprocessing.get_context("spawn")
        self._connection, childs_end = context.Pipe()
        arguments = (childs_end, str(folder), options)
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="model")
        self._lock, self._join_lock = threading.Lock(), threading.Lock()
        self.closing = False
        # Else its start would unblock the signals again.
        multiprocessing.resource_tracker.ensure_running()
        # The child inherits this until it ignores them: a Ctrl-C would end its imports.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._process.start()
            childs_end.close()  # else a dead child would never break the pipe
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> None:
        """Waits until the verifier is loaded.

        Raises:
          VerifierLoadError: it cannot be; of a bug the process has printed the traceback.
        """
        try:
            kind, value = self._receive()
        except ModelDiedError as error:
            raise VerifierLoadError(
                f"{error} while it loaded the verifier; -9 is mostly a lack of memory: give the "
                "machine more of it, or take a smaller model or dtype"
            ) from error
        if kind == "refused":
            raise VerifierLoadError(value)
        if kind == "failed":
            raise VerifierLoadError(f"the verifier cannot be loaded: {value}; see the traceback")

    def answer(self, questions: list[ImageQuestion]) -> Sequence[GreedyReply]:
        """Runs one pass; see `batcher.answer`.

        Raises:
          InputError: a question cannot be asked.
          ModelError, ModelDiedError: see the classes.
        """
        with self._lock:
            try:
                self._connection.send(questions)
            except OSError as error:
                raise self._died() from error
            kind, value = self._receive()
        if kind == "refused":
            raise InputError(value)
        if kind == "failed":
            raise ModelError(value)
        return value

    def close(self) -> None:
        """Ends the process, also in the middle of a pass, whose `answer` then raises."""
        self.closing = True  # before the kill, which another thread may see at once
        self._process.kill()
        self._join()

    def _receive(self) -> tuple[str, Any]:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> ModelDiedError:
        return ModelDiedError(f"the model's process ended with code {self._join()}")

    def _join(self) -> int | None:
        """Waits for the process's end; returns its exit code, or None if it does not end."""
        with self._join_lock:  # of two threads that wait for a child one never learns its code
            self._process.join(STOP_SECONDS)
            return self._process.exitcode


def _serve(connection: Connection, folder: str, options: dict[str, Any]) -> None:
    """Loads the verifier and answers until the pipe closes; the child's main function."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        verifier = HFVerifier(folder, **options)
    except Exception as error:
        connection.send(_outcome_of(error))
        return
    connection.send(("ready", None))
    while True:
        try:
            questions = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcome = "replies", answer(verifier, questions)
        except Exception as error:  # fails this pass only
            outcome = _outcome_of(error)
        connection.send(outcome)


def _outcome_of(error: Exception) -> tuple[str, str]:
    """Returns what the parent is told of an error; a bug keeps its traceback."""
    if isinstance(error, UserError):
        return "refused", str(error)
    traceback.print_exc()
    return "failed", f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """Ends this process soon after its parent, even in the middle of a pass."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
