"""Asks a language model at a limited rate, again after failures, and stops when told to."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence

import pydantic
import tenacity

from alphagrpo_jax.rewards.verifiers.chat.base import LanguageModel, LanguageModelError, Message
from alphagrpo_jax.runtime.backoff import Backoff

BACKOFF_SECONDS = 1.0  # before the second try of a call; doubles, with jitter of +-50%
MAX_BACKOFF_SECONDS = 60.0
NAP_SECONDS = 0.25  # longest sleep before looking for a stop again


class StopRequestedError(Exception):
    """The command is to stop; the prompt in flight is given up and does not count as failed."""


class Pace:
    """Spaces requests of all threads evenly, so many per minute."""

    def __init__(
        self,
        per_minute: float,
        *,
        stopped: Callable[[], bool] = lambda: False,
        overdue: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Sets the rate.

        Args:
          per_minute: requests; 0 is no limit.
          stopped: asked while waiting; True ends the wait.
          overdue: asked during a request; True abandons it.
          clock: seconds, monotonic.
          sleep: called with seconds.
        """
        self._distance = 60.0 / per_minute if per_minute else 0.0
        self._stopped, self._overdue = stopped, overdue
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = clock()

    def wait(self) -> None:
        """Waits until one more request may begin.

        Raises:
          StopRequestedError: a stop was asked for meanwhile.
        """
        with self._lock:
            begin = max(self._next, self._clock())
            self._next = begin + self._distance
        self.pause(begin - self._clock())

    def pause(self, seconds: float) -> None:
        """Sleeps, in short naps.

        Raises:
          StopRequestedError: a stop was asked for.
        """
        end = self._clock() + seconds
        while not self._stopped():
            remaining = end - self._clock()
            if remaining <= 0:
                return
            self._sleep(min(remaining, NAP_SECONDS))
        raise StopRequestedError

    def request(self, ask: Callable[[], str]) -> str:
        """Returns what a request returns, unless a stop is overdue before.

        Raises:
          StopRequestedError: it is; the request goes on, on a thread that nobody waits for.
        """
        reply: concurrent.futures.Future[str] = concurrent.futures.Future()

        def answer() -> None:
            try:
                reply.set_result(ask())
            except BaseException as error:  # whatever it is, it belongs to who asked
                reply.set_exception(error)

        threading.Thread(target=answer, daemon=True, name="request").start()
        while not concurrent.futures.wait([reply], timeout=NAP_SECONDS).done:
            if self._overdue():
                raise StopRequestedError
        return reply.result()


class PatientModel:
    """Asks a language model at a pace, and again after failures that may pass."""

    def __init__(self, model: LanguageModel, pace: Pace, *, tries: int = 5) -> None:
        """Wraps a model.

        Args:
          model: asked from many threads at once.
          pace: every single request waits for it, repeated ones too.
          tries: of one call, at most.
        """
        self._model, self._pace = model, pace
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_retryable),
            stop=tenacity.stop_after_attempt(tries),
            wait=Backoff(BACKOFF_SECONDS, longest_seconds=MAX_BACKOFF_SECONDS),
            sleep=pace.pause,  # looks for a stop again and again
            reraise=True,
        )

    def complete(
        self, messages: Sequence[Message], form: type[pydantic.BaseModel] | None = None
    ) -> str:
        """Continues a chat, see `LanguageModel`.

        Raises:
          LanguageModelError: of the last try.
          StopRequestedError: a stop was asked for.
        """
        return self._retrying(self._attempt, messages, form)

    def _attempt(self, messages: Sequence[Message], form: type[pydantic.BaseModel] | None) -> str:
        self._pace.wait()
        return self._pace.request(lambda: self._model.complete(messages, form))


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, LanguageModelError) and error.retryable
