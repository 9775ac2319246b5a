"""Takes SIGTERM and SIGINT as a request to stop, which ends what waits or takes too long."""

import _thread
import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from alphagrpo_jax.runtime.cli import FAILED, STOPPED
from alphagrpo_jax.runtime.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_SECONDS = 0.2  # longest wait of work that can be ended before it looks for a stop again
REACT_SECONDS = 3.0  # from an overdue stop on, for the main thread to save and to end by itself

CLOSE_SECONDS = 1.0  # for the main thread's last words, if it saves and ends at the same moment
ASK_SECONDS = 1.0  # between two questions whether another process was told to stop
KILLED = 130  # exit code, as a shell's of a command that Ctrl-C has ended


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


NEVER = StopRequest()


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code, without waiting for threads that are still at work."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


class StopFlag(StopRequest):
    """Requested by SIGTERM or SIGINT; the loop looks at it after every step.

    A second SIGINT ends the grace; one without a grace left raises KeyboardInterrupt.
    """

    def __init__(self, *, grace_seconds: float = math.inf) -> None:
        super().__init__(grace_seconds=grace_seconds)
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if self.requested and number == signal.SIGINT:
            if self.overdue or not math.isfinite(self._grace_seconds):
                raise KeyboardInterrupt
            self.hurry()
        self.request()
        _write(f"stopping after this step ({signal.Signals(number).name})")


class StopSignals(StopRequest):
    """Requested by SIGTERM or SIGINT, even while the main thread compiles; a context manager.

    The second signal ends the grace. The third, if it is SIGINT, ends the process without a save.

    Python runs signal handlers on the main thread alone, between two of its instructions: not
    while that waits for a compiler or a device. So a thread of this class receives the signals, and
    another one saves and ends the process if the main thread does not react.

    Attributes:
      rescue: saves what is finished, on another thread than the main one's, and returns True; or
        returns False if it cannot at this moment. Without one there is nothing to save.
    """

    def __init__(
        self,
        *,
        grace_seconds: float,
        end_process: Callable[[int], Any] | None = None,
        announce: Callable[[], None] = lambda: None,
        announced: Callable[[], bool] | None = None,
    ) -> None:
        """Prepares; signals are received inside the context, which the main thread enters.

        Args:
          grace_seconds: see `StopRequest`.
          end_process: called with the exit code where the main thread does not react; None: never.
          announce: tells the other processes of the run of a request.
          announced: returns whether another process was told to stop; None if there are no others.
        """
        super().__init__(grace_seconds=grace_seconds)
        self.rescue: Callable[[], bool] = lambda: True
        self._end_process = end_process
        self._announce, self._announced = announce, announced
        self._count = 0  # signals received
        self._breaks_off = False
        self._began, self._closed = threading.Event(), threading.Event()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        with contextlib.ExitStack() as stack:
            self._receiver, sender = socket.socketpair()
            stack.callback(self._receiver.close)
            sender.settimeout(0.0)
            threads = [
                threading.Thread(target=self._receive, daemon=True, name="stop-signals"),
                threading.Thread(target=self._end_in_time, daemon=True, name="stop-in-time"),
            ]
            for thread in threads:
                stack.callback(thread.join)
            stack.callback(sender.close)  # ends the first thread, as the next line does the second
            stack.callback(self._began.set)
            stack.callback(self._closed.set)
            stack.callback(
                signal.set_wakeup_fd,
                signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False),
            )
            for number in SIGNALS:
                stack.callback(signal.signal, number, signal.signal(number, self._handle))
            for thread in threads:
                thread.start()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def request(self) -> None:
        """Requests a stop, of the run's other processes too."""
        super().request()
        self._began.set()

    def _handle(self, number: int, _: Any) -> None:
        """Does nothing but let Python receive the signal, until the last one breaks off."""
        if self._breaks_off:
            raise KeyboardInterrupt

    # On the thread that receives signals.

    def _receive(self) -> None:
        """Waits for signals, and for requests of other processes."""
        seconds = None if self._announced is None else ASK_SECONDS
        while True:
            if select.select([self._receiver], [], [], seconds)[0]:
                numbers = self._receiver.recv(64)
                if not numbers:
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self._take(signal.Signals(number))
            elif not self.requested and self._announced is not None and self._announced():
                self._request_with_words("told to another process")

    def _take(self, number: signal.Signals) -> None:
        """Acts on a signal."""
        self._count += 1
        if self._count == 1:
            self._request_with_words(number.name)
            self._announce()
        elif self._count == 2:
            _write("stopping now, without the step under way; finished ones are saved")
            self.hurry()
        elif number == signal.SIGINT:
            _write("ended by Ctrl-C: steps since the last checkpoint are lost")
            if self._end_process is not None:
                self._end_process(KILLED)
            self._breaks_off = True
            _thread.interrupt_main()

    def _request_with_words(self, source: str) -> None:
        grace = f", in {self._grace_seconds:g} s without it" * math.isfinite(self._grace_seconds)
        _write(f"stopping after this step ({source}){grace}; Ctrl-C again: at once")
        self.request()

    # On the thread that ends the process if the main thread does not.

    def _end_in_time(self) -> None:
        """Saves and ends the process once the main thread has let an overdue stop pass."""
        if self._end_process is None:
            return
        self._began.wait()
        overdue_since = math.inf
        while not self._closed.wait(LOOK_SECONDS):
            now = time.monotonic()
            # A block without grace may end, and with it what was overdue.
            overdue_since = min(overdue_since, now) if self.overdue else math.inf
            if now < overdue_since + REACT_SECONDS:
                continue
            code = self._rescue()
            if code is not None and not self._closed.wait(CLOSE_SECONDS):
                self._end_process(code)
                return

    def _rescue(self) -> int | None:
        """Saves; returns the exit code, or None if it cannot be done now."""
        try:
            if not self.rescue():
                return None
        except (UserError, OSError) as error:
            _write(f"error: {error}")
            return FAILED
        except Exception:  # a bug; without an end here the process would ignore its signals
            traceback.print_exc()
            return FAILED
        _write("stopped while a step was under way; the same command continues")
        return STOPPED


def _write(line: str) -> None:
    """Writes to stderr past Python's buffer, whose lock the main thread may hold."""
    os.write(2, f"\n{line}\n".encode())
