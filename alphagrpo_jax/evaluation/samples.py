"""Sample grids of an evaluation, and the report beside them."""

from collections.abc import Mapping

from alphagrpo_jax import tasks
from alphagrpo_jax.evaluation.metrics import (
    Evaluation,
)
from alphagrpo_jax.rewards import report
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime import metrics as metrics_lib
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.context import Run

REPORT_FILE = "report.html"  # of the newest evaluation


def write_samples(run: Run, drawn: Mapping[str, Evaluation], step: int, label: str) -> None:
    """Writes the sample grids, a report on each, and all of them as the run's newest report.

    Args:
      run: the run.
      drawn: evaluations with images, by task.
      step: updates done.
      label: of the files.
    """
    folder, several = run.workdir / "samples", run.config.task == "mixed"
    pages = {}
    for name, own in drawn.items():
        file = f"{label}_{name}" if several else label
        kept = own.captions[: run.config.log.samples]
        metrics_lib.write_samples(folder, file, own.images[: len(kept)], kept)
        pages[name] = _sample_report(run, name, own, step)
        replace_text(folder / f"{file}.html", report.to_html(pages[name]))
    if pages:
        first, *_ = pages.values()
        rows = [row for page in pages.values() for row in page.rows]
        whole = report.Report(f"{run.config.task}, step {step}", first.how, tuple(rows))
        replace_text(run.workdir / REPORT_FILE, report.to_html(whole))


def _sample_report(run: Run, name: str, own: Evaluation, step: int) -> report.Report:
    """The images of a sample grid, explained by the answers that made their rewards."""
    kept = own.captions[: run.config.log.samples]
    options = options_lib.scoring_options(run.config, tasks.TASKS[name])
    rows = report.rows(
        [f"{name} {number}" for number in range(len(kept))],
        [images_lib.data_url(image) for image in own.images[: len(kept)]],
        own.records,
        own.scores,
        options,
        thinks=[caption["think"] for caption in kept],
        exact=[caption["exact"] for caption in kept],
    )
    return report.Report(f"{name}, step {step}", report.describe(options), tuple(rows))
