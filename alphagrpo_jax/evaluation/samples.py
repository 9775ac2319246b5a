"""Writes the sample grids of an evaluation, and the report that explains their rewards."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from alphagrpo_jax.evaluation.metrics import Evaluation
from alphagrpo_jax.rewards import curves, report
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime import metrics as metrics_lib
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.results import changes
from alphagrpo_jax.training.context import Run


def write_samples(
    run: Run,
    evaluations: Mapping[str, Evaluation],
    step: int,
    label: str,
    row: Mapping[str, Any],
) -> None:
    """Writes the sample grids, a report on each, and all of them as the run's newest report.

    That report opens with the learning curves of the run.

    Args:
      run: the run.
      evaluations: by task; those without images have no grid.
      step: updates done.
      label: of the files.
      row: metrics of the step, which are no row of metrics.jsonl yet.
    """
    folder, mixed = run.workdir / metrics_lib.SAMPLES, run.config.task == "mixed"
    pages = {}
    for name, evaluation in evaluations.items():
        if evaluation.images is None:
            continue
        file = f"{label}_{name}" if mixed else label
        captions = evaluation.captions[: run.config.log.samples]
        images = evaluation.images[: len(captions)]
        metrics_lib.write_samples(folder, file, images, captions)
        pages[name] = _task_report(run, name, evaluation, images, step)
        replace_text(folder / f"{file}.html", report.to_html(pages[name]))
    run_rows = _rows_until(run.workdir, step, row)
    run_report = report.Report(
        f"{run.config.task}, step {step}",
        next((page.how for page in pages.values()), ""),
        tuple(image_row for page in pages.values() for image_row in page.rows),
        panels=curves.panels(run_rows),
        changes=tuple(changes(run_rows)),
    )
    replace_text(run.workdir / metrics_lib.REPORT, report.to_html(run_report))


def _rows_until(workdir: pathlib.Path, step: int, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the run's rows before a step, and that of the step completed by `row`."""
    rows = metrics_lib.read_rows(workdir / metrics_lib.METRICS)
    logged = {logged_row["step"]: logged_row for logged_row in rows if logged_row["step"] <= step}
    values = {
        key: float(value)
        for key, value in row.items()
        if not isinstance(value, str) and value is not None and math.isfinite(value)
    }
    return [
        *(logged[number] for number in logged if number < step),
        logged.get(step, {"step": step}) | values,
    ]


def _task_report(
    run: Run, name: str, evaluation: Evaluation, images: np.ndarray, step: int
) -> report.Report:
    """Explains the images of a sample grid by the answers that made their rewards."""
    captions = evaluation.captions[: len(images)]
    scoring_options = run.tasks[name].scoring
    rows = report.rows(
        [f"{name} {number}" for number in range(len(captions))],
        [images_lib.data_url(image) for image in images],
        evaluation.records,
        evaluation.rewards,
        scoring_options,
        thinks=[caption["think"] for caption in captions],
        exact=[caption["exact"] for caption in captions],
    )
    return report.Report(f"{name}, step {step}", report.describe(scoring_options), tuple(rows))
