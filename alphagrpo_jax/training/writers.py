"""Writes the rows of a run to metrics.jsonl, TensorBoard and the console."""

import os
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.console import Console
from alphagrpo_jax.runtime.metrics import MetricsLog, TensorBoardWriter


class Writers:
    """Writes a run's rows to metrics.jsonl, to TensorBoard and on the console."""

    def __init__(
        self,
        log: MetricsLog,
        folder: str | os.PathLike,
        console: Console,
        *,
        config: Mapping[str, Any],
        tensorboard: bool,
        step: int,
        total: int,
    ) -> None:
        """Opens the writers; only the primary process writes.

        Args:
          log: the run's rows.
          folder: of the run.
          console: shows the rows to whoever watches.
          config: the run's, as nested dicts; TensorBoard shows it.
          tensorboard: write TensorBoard events too.
          step: steps done before.
          total: steps of the run.
        """
        self._log, self._console, self._total = log, console, total
        enabled = tensorboard and distributed.is_primary()
        self._board = TensorBoardWriter(folder, enabled=enabled, step=step)
        self._board.write_config(step, config)

    def log_row(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes a row, or completes one whose evaluation was pending."""
        (self._log.complete if self._log.is_pending(step) else self._log.write)(step, row)
        self._board.write(step, row)
        self._console.progress(step, self._total, row)

    def close(self) -> None:
        """Ends the event file."""
        self._board.close()
