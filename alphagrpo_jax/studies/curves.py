"""Plots runs: learning curves, and generated images before and after training.

    python -m alphagrpo_jax.studies.curves --run runs/seed0 --run runs/seed1 --out docs/curves.png
    python -m alphagrpo_jax.studies.curves --samples runs/seed0 --out2 docs/samples.png

Runs are seeds of one configuration. Thick lines are means over the runs, at the steps that all runs
have reached; thin lines are single runs, bands reach from the worst run to the best. Takes seconds.
"""

import argparse
import json
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("Agg")  # before pyplot is imported: no window, no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError, MissingFileError
from alphagrpo_jax.runtime.metrics import METRICS, read_rows

WINDOW = 9  # steps that the reward is averaged over
BEFORE = "step_000000"
GAP = 2  # pixels between the images of a sample grid, before enlargement
COLUMNS = 4  # of prompts in the figure of samples
WRAP = 36  # characters of a caption's line
BLUE, ORANGE, GRAY = "#2b6cb0", "#dd6b20", "#4a5568"
# Mark and color by the exact checker's verdict; None: not judged.
MARKS = {True: (" ✓", "#2f855a"), False: (" ✗", "#c53030"), None: ("", GRAY)}


class Curve(NamedTuple):
    """One metric of several runs."""

    steps: np.ndarray  # int[S], those that all runs have
    values: np.ndarray  # float[R, S]


def curve(runs: Sequence[Sequence[dict]], name: str) -> Curve:
    """Collects the values of a metric at the steps where every run has it.

    Args:
      runs: rows of metrics, per run.
      name: of the metric.
    Raises:
      InputError: there is no such step.
    """
    by_step = [{r["step"]: r[name] for r in rows if r.get(name) is not None} for rows in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        raise InputError(
            f"there is no step at which all {len(runs)} runs have {name}; give runs of one "
            "configuration that have been evaluated"
        )
    values = [[run_values[step] for step in steps] for run_values in by_step]
    return Curve(np.array(steps), np.array(values, np.float64))


def smooth(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Computes centered means over `window` values of float[R, S], over fewer at the ends."""
    weights = np.ones(window)
    counts = np.convolve(np.ones(values.shape[1]), weights)
    sums = np.stack([np.convolve(row, weights) for row in values])
    first = window // 2
    return (sums / counts)[:, first : first + values.shape[1]]


def read_run(folder: pathlib.Path) -> list[dict]:
    """Reads the metrics rows of a run.

    Raises:
      MissingFileError: the run has none.
    """
    rows = read_rows(folder / METRICS)
    if not rows:
        raise MissingFileError(f"{folder / METRICS} does not exist or has no rows; give a run")
    return rows


def draw_curves(runs: Sequence[Sequence[dict]], out: pathlib.Path) -> None:
    """Plots reward, exact scores, and exact scores by type of plain prompt, side by side."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    _plot_reward(left, runs)
    for name, color in (("plain", BLUE), ("implied", ORANGE)):
        _plot_seeds(middle, curve(runs, f"eval/exact_all/{name}"), color, name, marker="o")
    middle.set_title("held-out prompts drawn right")
    _plot_types(right, runs)
    for axes in (left, middle, right):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    for axes in (middle, right):
        axes.set_ylim(0, 1)
    _write(figure, out)


def _plot_reward(axes: Axes, runs: Sequence[Sequence[dict]]) -> None:
    training = curve(runs, "reward/mean")
    smoothed = Curve(training.steps, smooth(training.values))
    _plot_seeds(axes, smoothed, GRAY, f"training, mean of {WINDOW} updates")
    held_out = curve(runs, "eval/reward/mean")
    axes.plot(held_out.steps, held_out.values.mean(0), "o", color="black", label="held out")
    axes.plot(held_out.steps, held_out.values.T, ".", color="black", alpha=0.4)
    axes.set_title("reward")


def _plot_types(axes: Axes, runs: Sequence[Sequence[dict]]) -> None:
    prefix = "eval/exact_all/plain/"
    names = sorted({key for rows in runs for row in rows for key in row if key.startswith(prefix)})
    for index, name in enumerate(names):
        steps, values = curve(runs, name)
        label = name.removeprefix(prefix)
        axes.plot(steps, values.mean(0), marker="o", color=f"C{index}", label=label)
    axes.set_title("plain ones by type")


def _plot_seeds(axes: Axes, runs: Curve, color: str, label: str, marker: str = "") -> None:
    steps, values = runs
    if len(values) > 1:
        axes.plot(steps, values.T, color=color, alpha=0.35, linewidth=0.7)
        low, high = values.min(0), values.max(0)
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(steps, values.mean(0), marker=marker, color=color, linewidth=2, label=label)


def read_samples(run: pathlib.Path, name: str) -> tuple[np.ndarray, list[dict]]:
    """Reads a sample grid of a run and cuts it into its images.

    Returns:
      uint8[N, H, W, 3] and the caption of each image.
    Raises:
      MissingFileError: a file is missing.
      InputError: the size of the grid does not fit its captions and the run's size of images.
    """
    config, grid = run / "config.json", run / "samples" / f"{name}.png"
    text = grid.with_suffix(".json")
    for path in (config, grid, text):
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; give the folder of a run with samples")
    captions = json.loads(text.read_text())
    model = json.loads(config.read_text())["model"]
    height, width = model["height"], model["width"]
    columns = int(np.ceil(np.sqrt(len(captions))))
    rows, scale = -(-len(captions) // columns), max(1, 96 // height)
    pixels = np.asarray(Image.open(grid).convert("RGB"))
    expected = [scale * (n * (side + GAP) + GAP) for n, side in ((rows, height), (columns, width))]
    if list(pixels.shape[:2]) != expected:
        raise InputError(
            f"{grid} has {list(pixels.shape[:2])} pixels, expected {expected} for "
            f"{len(captions)} images of {height}x{width}"
        )
    pixels = pixels[::scale, ::scale][GAP:, GAP:]
    tiles = pixels.reshape(rows, height + GAP, columns, width + GAP, 3)
    tiles = tiles.swapaxes(1, 2)[:, :, :height, :width]
    return tiles.reshape(-1, height, width, 3)[: len(captions)], captions


def last_samples(run: pathlib.Path) -> str:
    """Finds the name of a run's last sample grid.

    Raises:
      MissingFileError: there is none after the first.
    """
    names = sorted(path.stem for path in (run / "samples").glob("step_*.png"))
    if names[-1:] in ([], [BEFORE]):
        raise MissingFileError(
            f"{run / 'samples'} has no step_*.png after {BEFORE}.png; let the run go on to an "
            "evaluation"
        )
    return names[-1]


def draw_samples(run: pathlib.Path, count: int, out: pathlib.Path) -> None:
    """Plots a run's first held-out prompts, each with its image before and after training.

    Args:
      run: the run's folder.
      count: number of prompts.
      out: the file to write.
    Raises:
      MissingFileError, InputError: see `read_samples`; or the two grids have different prompts.
    """
    last = last_samples(run)
    (before, old), (after, new) = (read_samples(run, name) for name in (BEFORE, last))
    if [caption["prompt"] for caption in old] != [caption["prompt"] for caption in new]:
        raise InputError(f"{BEFORE} and {last} of {run} show different prompts")
    titles = [textwrap.wrap(caption["prompt"], WRAP) for caption in new[:count]]
    lines = max(map(len, titles))
    rows = -(-len(titles) // COLUMNS)
    figure = plt.figure(figsize=(3.1 * COLUMNS, (1.8 + 0.15 * lines) * rows), layout="constrained")
    cells = figure.subfigures(rows, COLUMNS, squeeze=False).flat
    for i, (title, cell) in enumerate(zip(titles, cells, strict=False)):
        padding = [""] * (lines - len(title))  # makes all images equally large
        cell.suptitle("\n".join([*padding, *title]), fontsize=9)
        left, right = cell.subplots(1, 2)
        _show(left, before[i], "before", exact=old[i]["exact"])
        _show(right, after[i], f"update {int(last.removeprefix('step_'))}", exact=new[i]["exact"])
    _write(figure, out)


def _show(axes: Axes, image: np.ndarray, label: str, *, exact: bool | None) -> None:
    mark, color = MARKS[exact]
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(label + mark, color=color, fontsize=9)
    axes.spines[:].set(color=color, linewidth=2)


def _write(figure: Figure, out: pathlib.Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata={"Software": None})
    plt.close(figure)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--out", type=pathlib.Path, help="picture of the curves")
    parser.add_argument("--samples", type=pathlib.Path, help="run whose drawings are shown")
    parser.add_argument("--out2", type=pathlib.Path, help="picture of the drawings")
    parser.add_argument(
        "--prompts", type=cli.COUNT, default=16, help="drawings shown: the first ones"
    )
    args = parser.parse_args(arguments)
    if bool(args.run) != bool(args.out) or bool(args.samples) != bool(args.out2):
        parser.error("--run goes with --out, --samples with --out2")
    if not args.run and not args.samples:
        parser.error("nothing to draw: give --run and --out, or --samples and --out2, or all")
    return args


def run(options: argparse.Namespace) -> None:
    """Draws the pictures that the flags ask for."""
    if options.run:
        draw_curves([read_run(folder) for folder in options.run], options.out)
    if options.samples:
        draw_samples(options.samples, options.prompts, options.out2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
