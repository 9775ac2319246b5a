"""What a run writes for people: metrics.jsonl, TensorBoard events, sample grids, a progress bar."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from PIL import Image

from alphagrpo_jax.config import LogOptions
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.files import replace_text

METRICS = "metrics.jsonl"
PENDING = "eval/pending"  # in a row whose evaluation failed and is still to be done
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class MetricsLog:
    """The rows of metrics.jsonl, one object per step, never a step twice."""

    def __init__(self, folder: str | os.PathLike, *, last_step: int, writes: bool = True) -> None:
        """Opens the log of a run that continues after `last_step`.

        Rows of later steps (done, but lost with their checkpoint) and an unfinished last line are
        dropped, by writing a new file beside the old one and renaming it.

        Args:
          folder: the run's.
          last_step: of the checkpoint that the run continues from.
          writes: False on all processes but the first.
        """
        self._writes = writes
        self._path = pathlib.Path(folder) / METRICS
        self.rows = [row for row in read_rows(self._path) if row["step"] <= last_step]
        if writes and self._path.exists():
            replace_text(self._path, "".join(_line(row) for row in self.rows))

    def has(self, step: int) -> bool:
        """Whether the row of a step is there."""
        return any(row["step"] == step for row in self.rows)

    def owes(self, step: int) -> bool:
        """Whether the evaluation of a step's row is still to be done."""
        return any(row["step"] == step and PENDING in row for row in self.rows)

    def complete(self, step: int, values: Mapping[str, float | str]) -> None:
        """Adds to the last row what it owes.

        Raises:
          ValueError: the last row is another one, or owes nothing.
        """
        if not self.owes(step) or self.rows[-1]["step"] != step:
            raise ValueError(f"step {step} owes no evaluation, or rows of later steps exist")
        kept = {key: value for key, value in self.rows[-1].items() if key != PENDING}
        self.rows[-1] = _row(step, kept | dict(values))
        if self._writes:
            replace_text(self._path, "".join(_line(row) for row in self.rows))

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Appends a row; values that are not finite become null.

        Raises:
          ValueError: a row for this step or a later one exists.
        """
        if self.rows and self.rows[-1]["step"] >= step:
            raise ValueError(f"metrics of step {step} after those of {self.rows[-1]['step']}")
        row = _row(step, values)
        self.rows.append(row)
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the complete rows of a metrics.jsonl; none if there is no file."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the process was killed while it wrote this line
    return rows


class TensorBoardWriter:
    """TensorBoard events of the same numbers; does nothing where it is switched off."""

    def __init__(self, folder: str | os.PathLike, *, enabled: bool, step: int) -> None:
        self._writer = None
        if enabled:
            import tensorboardX  # only here: it imports torch, which takes seconds

            self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Adds the numbers of a row."""
        if self._writer is None:
            return
        for key, value in values.items():
            if not isinstance(value, str) and math.isfinite(value):
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        if self._writer is not None:
            self._writer.close()


def write_samples(
    folder: str | os.PathLike, name: str, images: np.ndarray, captions: Sequence[Mapping[str, Any]]
) -> None:
    """Writes NAME.png, a grid of uint8[N, H, W, 3], and NAME.json, what each image is."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = math.ceil(math.sqrt(len(images)))
    grid = images_lib.grid(images, columns)
    scale = max(1, 96 // images.shape[1])  # small images are enlarged for the eye
    large = Image.fromarray(grid.repeat(scale, axis=0).repeat(scale, axis=1))
    large.save(folder / f"{name}.png")
    replace_text(folder / f"{name}.json", json.dumps(list(captions), indent=1) + "\n")


class Progress:
    """One line: steps, reward, exact score, seconds per stage, time left."""

    def __init__(self, *, total: int, done: int, enabled: bool) -> None:
        self._bar = tqdm.tqdm(
            total=total, initial=done, disable=not enabled, unit="step", dynamic_ncols=True
        )
        self._shown: dict[str, str] = {}

    def show(self, values: Mapping[str, float | str], *, advance: int) -> None:
        """Moves on and shows what of these is worth a glance."""
        names = {
            "reward/mean": "reward",
            "eval/exact_all": "exact",
            "eval/reward/mean": "eval reward",
            "time/rollout": "rollout s",
            "time/reward_wait": "wait s",
            "time/update": "update s",
        }
        for key, name in names.items():
            if key in values:
                self._shown[name] = f"{values[key]:.3f}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(advance)
        self._bar.refresh()

    def close(self) -> None:
        """Leaves the line as it stands."""
        self._bar.close()


class Writers:
    """Writes a run's rows to metrics.jsonl, TensorBoard and the progress line."""

    def __init__(
        self,
        options: LogOptions,
        log: MetricsLog,
        folder: str | os.PathLike,
        *,
        done: int,
        total: int,
    ) -> None:
        """Opens the writers; only the primary process writes.

        Args:
          options: which writers are on.
          log: the run's rows.
          folder: of the run.
          done: steps done before.
          total: steps of the run.
        """
        primary = distributed.is_primary()
        self._log, self._done = log, done
        self._board = TensorBoardWriter(folder, enabled=options.tensorboard and primary, step=done)
        self._progress = Progress(total=total, done=done, enabled=options.progress and primary)

    def log_row(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes a row, or completes one whose evaluation was pending."""
        (self._log.complete if self._log.owes(step) else self._log.write)(step, row)
        self._board.write(step, row)
        self._progress.show(row, advance=int(step > self._done))
        self._done = step

    def close(self) -> None:
        """Ends the event file and the progress line."""
        self._board.close()
        self._progress.close()


class Timer:
    """Adds up seconds by stage: `with timer("rollout"): ...`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.monotonic() - start

    def metrics(self) -> dict[str, float]:
        """Returns `time/STAGE`, seconds."""
        return {f"time/{stage}": seconds for stage, seconds in self._seconds.items()}


class CompileCounter:
    """Counts compilations of this process and their seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration


def _row(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Builds a row, the step first."""
    metrics = {key: _plain(value) for key, value in sorted(values.items()) if key != "step"}
    return {"step": step} | metrics


def _plain(value: Any) -> float | int | str | None:
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def notify(message: str) -> None:
    """Prints a notice for whoever watches the run."""
    print(message, file=sys.stderr, flush=True)
