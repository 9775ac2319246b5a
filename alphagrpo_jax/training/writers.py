"""Writes the rows of a run to metrics.jsonl, TensorBoard, W&B and the console."""

import os
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.config import LogOptions
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.console import Console
from alphagrpo_jax.runtime.metrics import MetricsLog, TensorBoardWriter
from alphagrpo_jax.runtime.wandb_writer import WandbWriter


class Writers:
    """Writes a run's rows to metrics.jsonl, to TensorBoard, to W&B and on the console."""

    def __init__(
        self,
        log: MetricsLog,
        folder: str | os.PathLike,
        console: Console,
        *,
        config: Mapping[str, Any],
        options: LogOptions,
        step: int,
        total: int,
    ) -> None:
        """Opens the writers; only the primary process writes.

        Args:
          log: the run's rows.
          folder: of the run.
          console: shows the rows to whoever watches.
          config: the run's, as nested dicts; TensorBoard and W&B show it.
          options: who gets rows beside metrics.jsonl.
          step: steps done before.
          total: steps of the run.
        """
        self._log, self._console, self._total = log, console, total
        is_primary = distributed.is_primary()
        enabled = options.tensorboard and is_primary
        self._board = TensorBoardWriter(folder, enabled=enabled, step=step)
        self._board.write_config(step, config)
        self._wandb = WandbWriter(options.wandb, folder, config, enabled=is_primary)

    def log_row(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes a row, or completes one whose evaluation was pending."""
        (self._log.complete if self._log.is_pending(step) else self._log.write)(step, row)
        self._board.write(step, row)
        self._wandb.write(step, row)
        self._console.progress(step, self._total, row)

    def close(self) -> None:
        """Ends the event file and W&B's run."""
        self._board.close()
        self._wandb.close()
