"""Takes SIGTERM and SIGINT as a request to stop at the next good moment."""

import os
import signal
from typing import Any


class StoppedError(Exception):
    """A stop was asked for during the evaluation before the first step."""


class StopFlag:
    """Set by SIGTERM or SIGINT; the loop looks at it after every step."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not `print`: it may be what the signal has interrupted.
        os.write(2, f"\nstopping after this step ({signal.Signals(number).name})\n".encode())
