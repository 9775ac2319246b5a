"""Takes SIGTERM and SIGINT as a request to stop, which ends what waits or takes too long."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

LOOK_SECONDS = 0.2  # longest wait of work that can be ended before it looks for a stop again


class StoppedError(Exception):
    """A requested stop has ended what was under way; nothing that was finished is lost."""


class StopRequest:
    """A request to stop, which work looks at; it leaves a grace to what is nearly finished.

    Thread-safe.

    Attributes:
      requested: True once a stop is requested.
    """

    def __init__(self, *, grace_seconds: float = math.inf) -> None:
        """Begins without a request.

        Args:
          grace_seconds: from the request on, until work that is under way has to end.
        """
        self.requested = False
        self._grace_seconds = grace_seconds
        self._ends = math.inf  # time.monotonic() at which work under way has to end
        self._without_grace = 0  # blocks of `at_once` that the main thread is in

    def request(self) -> None:
        """Requests a stop."""
        if not self.requested:
            self._ends = time.monotonic() + self._grace_seconds
            self.requested = True

    def hurry(self) -> None:
        """Requests a stop without a grace."""
        self._ends = -math.inf
        self.requested = True

    @property
    def overdue(self) -> bool:
        """True once a stop is requested and its grace is over."""
        return self.requested and (bool(self._without_grace) or time.monotonic() >= self._ends)

    def check(self) -> None:
        """Ends the work that calls it once a stop is overdue.

        Raises:
          StoppedError: it is.
        """
        if self.overdue:
            raise StoppedError

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Gives the block no grace: it is done again in any case."""
        self._without_grace += 1
        try:
            yield
        finally:
            self._without_grace -= 1


class StopFlag(StopRequest):
    """Requested by SIGTERM or SIGINT; the loop looks at it after every step."""

    def __init__(self) -> None:
        super().__init__()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request()
        # Not `print`: it may be what the signal has interrupted.
        os.write(2, f"\nstopping after this step ({signal.Signals(number).name})\n".encode())
