"""Tells whoever watches a run on stderr what it does: phases with their times, one progress line.

On a terminal the newest line rewrites itself, and what others print goes above it. Elsewhere (a
file, a pipe) there are whole lines only, and few of them.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from absl import logging

from alphagrpo_jax.runtime.results import breakdown

TICK_SECONDS = 0.5  # between two drawings of a running phase on a terminal
PLAIN_SECONDS = 15.0  # without a terminal: before a running phase, and between steps
COMPILE_SECONDS = 1.0  # of a phase's compilations, from which on they are worth words
ERASE = "\r\x1b[K"  # back to the first column, clear to the end of the line
NO_WIDTH = 80  # columns of a terminal that does not tell


class Console:
    """Writes a run's phases and progress; a context manager, silent where it is switched off."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        compile_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Prepares a console; on a terminal it takes over `sys.stderr` between enter and exit.

        Args:
          stream: where the lines go, default `sys.stderr`.
          enabled: False on all processes but the first, and where nobody wants to watch.
          compile_seconds: returns the seconds that this process has spent compiling so far.
        """
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._started = time.monotonic()
        self._rewrites = enabled and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.compile_seconds = compile_seconds
        self._lock = threading.RLock()  # the ticker's thread draws as well
        self._drawn = False  # whether a line to be rewritten stands on the terminal
        self._column_zero = True
        self._phases: list[_Phase] = []  # the innermost last
        self._first: contextlib.ExitStack | None = None  # the first step, while it runs
        self._steps_from: tuple[int, float] | None = None  # a step and when it was done
        self._step_shown = -PLAIN_SECONDS  # when a step was last shown without a terminal
        self._redirection = contextlib.ExitStack()

    def __enter__(self) -> "Console":
        if self._rewrites:
            above = _Above(self, self._stream)
            self._redirection.enter_context(contextlib.redirect_stderr(above))
            handler = logging.get_absl_handler().python_handler  # has its stream since its import
            if handler.stream is self._stream:
                self._redirection.callback(handler.setStream, handler.setStream(above))
        return self

    def __exit__(self, *error: Any) -> None:
        self._redirection.close()
        if self._first is not None:
            self._first.__exit__(*error)
        with self._lock:
            if self._drawn or not self._column_zero:
                self._write("\n")  # the progress line stays as it was drawn last
            self._drawn = False

    @property
    def seconds(self) -> float:
        """Seconds since the console was made."""
        return time.monotonic() - self._started

    def message(self, text: str) -> None:
        """Prints lines above the progress line."""
        with self._lock:
            self._write((ERASE if self._drawn else "") + text + "\n")
            self._drawn = False

    def print_above(self, text: str) -> None:
        """Writes another's output, line by line or in pieces of a line, above the progress line."""
        with self._lock:
            self._write((ERASE if self._drawn else "") + text, always=True)
            self._drawn = False

    @contextlib.contextmanager
    def phase(self, name: str, *, lasting: bool = True) -> Iterator[None]:
        """Shows that a phase runs, for how long, and how far it is (see `count`).

        Args:
          name: of what is done, "loading the model".
          lasting: whether a line with its time stays when it is done.
        """
        phase = _Phase(name, time.monotonic(), self.compile_seconds())
        with self._lock:
            self._phases.append(phase)
            self._draw_phase()
        stopped = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(phase, stopped), daemon=True)
        if self._enabled:
            ticker.start()
        outcome = "stopped after "
        try:
            yield
            outcome = ""
        finally:
            stopped.set()
            if self._enabled:
                ticker.join()
            with self._lock:
                self._phases.remove(phase)
                if lasting or outcome:
                    self.message(phase.line(time.monotonic(), self.compile_seconds(), outcome))

    def count(self, finished: int, total: int) -> None:
        """Shows how many of its items the innermost phase has finished."""
        with self._lock:
            if self._phases:
                self._phases[-1].count = f": {finished} of {total}"
                self._draw_phase()

    def start_step(self, step: int, total: int) -> None:
        """Shows the first step of a process, which compiles, as a phase; `progress` ends it."""
        if self._first is None and self._steps_from is None:
            self._first = contextlib.ExitStack()
            self._first.enter_context(self.phase(f"step {step} of {total}, with compiling"))

    def progress(self, step: int, total: int, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics: an evaluation as a line that stays, a step as one that does not.

        Args:
          step: updates done.
          total: updates of the run.
          row: as in metrics.jsonl.
        """
        first, self._first = self._first, None
        if first is not None:
            first.close()
        line = self._step_line(step, total, row) if "time/update" in row else ""
        words = evaluation_words(row)
        with self._lock:
            now = time.monotonic()
            due = step == total or now - self._step_shown >= PLAIN_SECONDS
            if line and due and not self._rewrites:
                self.message(line)
                self._step_shown = now
            if words:
                self.message(f"{f'after step {step}' if step else 'untrained policy'}: {words}")
            if line and self._rewrites:
                self._draw(line)

    def _step_line(self, step: int, total: int, row: Mapping[str, Any]) -> str:
        """Returns a step's reward, the time left and the times of its stages in words."""
        now = time.monotonic()
        if self._steps_from is None:
            self._steps_from = (step, now)
        words = [f"reward {row['reward/mean']:.3f}"] if row.get("reward/mean") is not None else []
        since, started = self._steps_from
        if since < step < total:
            remaining = (total - step) * (now - started) / (step - since)
            words.append(f"{seconds_words(remaining)} left")
        return f"step {step} of {total}: {', '.join([*words, stage_words(row)])}"

    def _tick(self, phase: "_Phase", stopped: threading.Event) -> None:
        """Draws a running phase again and again; without a terminal ever more rarely."""
        wait = TICK_SECONDS if self._rewrites else PLAIN_SECONDS
        while not stopped.wait(wait):
            with self._lock:
                if self._phases[-1:] != [phase]:
                    continue
                if self._rewrites:
                    if self._drawn or self._column_zero:  # else another's bar is being drawn
                        self._draw_phase()
                else:
                    self.message(phase.line(time.monotonic()) + " so far")
                    wait *= 2

    def _draw_phase(self) -> None:
        if self._rewrites:
            self._draw(self._phases[-1].line(time.monotonic()))

    def _draw(self, line: str) -> None:
        """Puts a line in the place of the one that was drawn before."""
        start = ERASE if self._drawn or self._column_zero else "\n"
        self._write(start + line[: _columns(self._stream) - 1])
        self._drawn = True

    def _write(self, text: str, *, always: bool = False) -> None:
        if not (self._enabled or always):
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._enabled = self._rewrites = False  # nobody watches any more; the run goes on
        self._column_zero = text.endswith("\n")


SILENT = Console(enabled=False)


class _Phase:
    """A phase that runs."""

    def __init__(self, name: str, started: float, compile_seconds: float) -> None:
        self.name = name
        self.count = ""
        self._started, self._compile_seconds = started, compile_seconds

    def line(self, now: float, compile_seconds: float = 0.0, outcome: str = "") -> str:
        """Returns "name: 1 of 2 ... 3.1 s"."""
        line = f"{self.name}{self.count} ... {outcome}{seconds_words(now - self._started)}"
        compiling = compile_seconds - self._compile_seconds
        if compiling >= COMPILE_SECONDS:
            line += f", {seconds_words(compiling)} of it compiling"
        return line


class _Above:
    """A stand-in for `sys.stderr` while a console rewrites a line of it."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console, self._stream = console, stream

    def write(self, text: str) -> int:
        """Writes above the progress line."""
        self._console.print_above(text)
        return len(text)

    def flush(self) -> None:
        """Does nothing more: the console writes at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def seconds_words(seconds: float) -> str:
    """Returns a duration as people say it: "3.1 s", "2 min 5 s", "1 h 5 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def evaluation_words(row: Mapping[str, Any]) -> str:
    """Returns the held-out results of a row in words; empty if it has none."""
    words = []
    for label, value, by in breakdown(row):
        groups = ", ".join(f"{name} {number:.3f}" for name, number in by.items())
        words.append(f"{label} {value:.3f}" + (f" ({groups})" if groups else ""))
    return ", ".join(words)


def stage_words(row: Mapping[str, Any]) -> str:
    """Returns the seconds of a step, and of its stages, in words."""
    times = {
        "rollout": row.get("time/rollout", 0.0),
        "verifiers": row.get("time/reward_wait", 0.0),
        "update": row["time/update"],
    }
    stages = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
    return f"{seconds_words(sum(times.values()))} a step ({stages})"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or NO_WIDTH
    except (OSError, ValueError):
        return NO_WIDTH
