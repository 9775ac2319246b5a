"""Writes what a run leaves for people: metrics.jsonl, TensorBoard events, sample grids."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.results import breakdown

METRICS = "metrics.jsonl"
SAMPLES = "samples"  # the folder of the sample grids, inside the run's
REPORT = "report.html"  # of the newest evaluation
PENDING = "eval/pending"  # in a row whose evaluation failed and is still to be done


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
        """Returns whether the row of a step is there."""
        return any(row["step"] == step for row in self.rows)

    def is_pending(self, step: int) -> bool:
        """Returns whether the evaluation of a step's row is still to be done."""
        return any(row["step"] == step and PENDING in row for row in self.rows)

    def complete(self, step: int, values: Mapping[str, float | str]) -> None:
        """Adds its pending evaluation to the last row.

        Raises:
          ValueError: the last row is another one, or its evaluation is not pending.
        """
        if not self.is_pending(step) or self.rows[-1]["step"] != step:
            raise ValueError(f"step {step} has no pending evaluation, or rows of later steps exist")
        before = {key: value for key, value in self.rows[-1].items() if key != PENDING}
        self.rows[-1] = _row(step, before | dict(values))
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
    """TensorBoard events: the numbers of the rows, the sample grids, the configuration.

    Does nothing where it is switched off.
    """

    def __init__(self, folder: str | os.PathLike, *, enabled: bool, step: int) -> None:
        """Opens an event file.

        Args:
          folder: of the run.
          enabled: whether anything is written.
          step: steps done before; what an earlier process wrote of later ones is hidden.
        """
        self._folder = pathlib.Path(folder)
        self._writer = None
        if enabled:
            import tensorboardX  # only here: it imports torch, which takes seconds

            self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)

    def write_config(self, step: int, config: Mapping[str, Any]) -> None:
        """Adds the configuration as a text."""
        if self._writer is None:
            return
        lines = json.dumps(config, indent=2, sort_keys=True).splitlines()
        # TensorBoard reads Markdown: four spaces make a line code.
        self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), step)
        self._writer.flush()

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Adds the numbers of a row, and the step's sample grids where it has an evaluation."""
        if self._writer is None:
            return
        for key, value in values.items():
            if not isinstance(value, str) and math.isfinite(value):
                self._writer.add_scalar(key, value, step)
        if breakdown(values):
            for path in sorted((self._folder / SAMPLES).glob(f"{sample_label(step)}*.png")):
                task = path.stem.removeprefix(sample_label(step)).removeprefix("_")
                with Image.open(path) as image:
                    grid = np.asarray(image.convert("RGB"))
                tag = f"{SAMPLES}/{task}" if task else SAMPLES
                self._writer.add_image(tag, grid, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        if self._writer is not None:
            self._writer.close()


def sample_label(step: int) -> str:
    """Returns how the names of the sample grids after this many updates begin."""
    return f"step_{step:06d}"


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


def _row(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as it is written: the step first, the metrics sorted by name."""
    metrics = {key: _plain(value) for key, value in sorted(values.items()) if key != "step"}
    return {"step": step} | metrics


def _plain(value: Any) -> float | int | str | None:
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def notify(message: str, *, of_process: bool = False) -> None:
    """Prints a notice for whoever watches the run; one of the run is printed by process 0 alone.

    Args:
      message: the notice.
      of_process: it is about this process, so that it is printed by whichever it is.
    """
    if of_process or distributed.is_primary():
        print(message, file=sys.stderr, flush=True)
