"""The model in a process of its own, so that requests are parsed while it computes.

Python runs one thread at a time: beside a small model, whose passes are mostly Python, the server's
own work would double the time of every question.
"""

import multiprocessing
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


class ModelError(Exception):
    """The model failed; its process has printed the traceback."""


class ModelDiedError(Exception):
    """The model's process has ended."""


class ModelProcess:
    """A Hugging Face verifier in a child process; ends with this one."""

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
        self._process.start()
        childs_end.close()  # else a dead child would never break the pipe
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Waits until the verifier is loaded.

        Raises:
          VerifierLoadError: it cannot be.
          ModelError, ModelDiedError: see the classes.
        """
        kind, value = self._receive()
        if kind == "refused":
            raise VerifierLoadError(value)
        if kind == "failed":
            raise ModelError(value)

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
        """Ends the process, also in the middle of a pass."""
        self._process.kill()
        self._process.join(STOP_SECONDS)

    def _receive(self) -> tuple[str, Any]:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> ModelDiedError:
        self._process.join(STOP_SECONDS)
        return ModelDiedError(f"the model's process ended with code {self._process.exitcode}")


def _serve(connection: Connection, folder: str, options: dict[str, Any]) -> None:
    """Loads the verifier and answers until the pipe closes; the child's main function."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's affair, which ends this process
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
