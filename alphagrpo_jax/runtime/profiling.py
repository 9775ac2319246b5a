"""Writes a profiler's trace of some steps of a run, for TensorBoard and XProf."""

import os
import pathlib
import re
from typing import NamedTuple

import jax

from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.runtime.metrics import notify

FOLDER = "profile"  # inside the run's folder


class ProfiledSteps(NamedTuple):
    """Updates that are traced."""

    first: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "ProfiledSteps":
        """Reads START:COUNT.

        Raises:
          UsageError: it is something else, or not positive.
        """
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", text, re.ASCII):
            raise UsageError(
                f"--profile={text}: expected START:COUNT, the first update that is traced and the "
                "number of updates, e.g. --profile=3:2 (the first ones compile)"
            )
        return cls(*map(int, text.split(":")))


class StepProfiler:
    """Traces the chosen steps; does nothing without any."""

    def __init__(self, steps: ProfiledSteps | None, folder: str | os.PathLike) -> None:
        """Prepares.

        Args:
          steps: which; None for none.
          folder: the run's.
        """
        self.folder = pathlib.Path(folder) / FOLDER
        self._steps, self._traces, self._has_traced = steps, False, False

    def begin(self, step: int) -> None:
        """Starts or ends the trace where a step begins; called for every step."""
        if self._steps is None:
            return
        is_inside = self._steps.first <= step < self._steps.first + self._steps.count
        if is_inside and not self._traces:
            jax.profiler.start_trace(str(self.folder))
            self._traces = self._has_traced = True
        elif not is_inside:
            self._end()

    def close(self) -> None:
        """Ends the trace, if one is being written, and says where it is or why there is none."""
        self._end()
        if self._steps is not None and not self._has_traced:
            notify(
                f"--profile={self._steps.first}:{self._steps.count}: no trace was written, for "
                "this start did none of these updates"
            )

    def _end(self) -> None:
        if self._traces:
            self._traces = False
            jax.profiler.stop_trace()
            notify(f"the profiler's trace is in {self.folder}; show it by tensorboard or xprof")
