"""Pictures of runs, from synthetic ones."""

import json
import pathlib
import re
import sys

import numpy as np
import pytest
from PIL import Image

from alphagrpo_jax.runtime.metrics import METRICS, write_samples
from alphagrpo_jax.studies import curves

PROMPTS = [f"prompt {i} about a rather long list of shapes and colours" for i in range(7)]


def write_run(folder: pathlib.Path, *, steps: int = 20, gain: float = 0.01) -> pathlib.Path:
    """A run with evaluations every 10 steps; its first reward is missing."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(steps + 1):
        row = {"step": step}
        if step:
            row["reward/mean"] = None if step == 1 else 0.5 + gain * step
        if step % 10 == 0:
            row["eval/reward/mean"] = 0.5 + gain * step
            for name in ("plain", "implied", "plain/count", "plain/relation"):
                row[f"eval/exact_all/{name}"] = 0.3 + gain * step
        rows.append(row)
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_drawings(folder: pathlib.Path, name: str, images: np.ndarray, exact: list) -> None:
    captions = [
        {"prompt": prompt, "think": None, "reward": 0.5, "exact": right}
        for prompt, right in zip(PROMPTS, exact, strict=True)
    ]
    write_samples(folder / "samples", name, images, captions)
    height, width = images.shape[1:3]
    (folder / "config.json").write_text(json.dumps({"model": {"height": height, "width": width}}))


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["curves", *map(str, arguments)])
    return curves.main()


def test_curve_takes_the_steps_of_all_runs(tmp_path):
    runs = [
        curves.read_run(write_run(tmp_path / "a", steps=20)),
        curves.read_run(write_run(tmp_path / "b", steps=30, gain=0.02)),
    ]
    curve = curves.curve(runs, "eval/exact_all/plain")
    assert curve.steps.tolist() == [0, 10, 20]
    np.testing.assert_allclose(curve.values, [[0.3, 0.4, 0.5], [0.3, 0.5, 0.7]])
    assert curves.curve(runs, "reward/mean").steps.tolist() == list(range(2, 21))
    with pytest.raises(ValueError, match="no step at which all 2 runs have eval/other"):
        curves.curve(runs, "eval/other")


def test_smoothing_averages_what_is_there():
    values = np.array([[1.0, 2.0, 6.0, 3.0], [0.0, 0.0, 3.0, 0.0]])
    expected = [[1.5, 3.0, 11 / 3, 4.5], [0.0, 1.0, 1.0, 1.5]]
    np.testing.assert_allclose(curves.smooth(values, 3), expected)
    np.testing.assert_allclose(curves.smooth(values[:, :1], 9), values[:, :1])


@pytest.mark.parametrize("size", [(48, 32), (100, 100)])
def test_a_sample_grid_is_cut_into_the_images_it_was_made_of(tmp_path, size):
    images = np.random.default_rng(0).integers(0, 256, (7, *size, 3), np.uint8)
    write_drawings(tmp_path, "step_000000", images, [True] * 7)
    tiles, captions = curves.read_samples(tmp_path, "step_000000")
    np.testing.assert_array_equal(tiles, images)
    assert [caption["prompt"] for caption in captions] == PROMPTS


def test_pictures_are_drawn(tmp_path, monkeypatch):
    run, run2 = write_run(tmp_path / "a"), write_run(tmp_path / "b", gain=0.02)
    images = np.random.default_rng(0).integers(0, 256, (7, 48, 48, 3), np.uint8)
    write_drawings(run, "step_000000", images, [True, False, None] + [True] * 4)
    write_drawings(run, "step_000020", images, [True] * 7)
    out, out2 = tmp_path / "docs" / "curves.png", tmp_path / "docs" / "samples.png"
    runs = ("--run", run, "--run", run2, "--out", out)
    command(monkeypatch, *runs, "--samples", run, "--out2", out2, "--prompts", 5)
    for path in (out, out2):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert picture.std() > 10
    assert command(monkeypatch, "--run", run, "--out", out) == 0  # one seed


def test_missing_files_are_named(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    wanted = ("--samples", run, "--out2", tmp_path / "samples.png")

    def check_refused(message: str, *arguments: object) -> None:
        assert command(monkeypatch, *arguments) == 1
        assert re.search(message, capsys.readouterr().err)

    nowhere = ("--run", tmp_path / "nowhere", "--out", tmp_path / "curves.png")
    check_refused(f"error: .*nowhere/{METRICS} does not exist", *nowhere)
    check_refused(r"error: .*samples has no step_\*.png after", *wanted)
    images = np.zeros((7, 48, 48, 3), np.uint8)
    write_drawings(run, "step_000020", images, [True] * 7)
    check_refused(r"error: .*step_000000.png does not exist", *wanted)
    write_drawings(run, "step_000000", images[:, :40], [True] * 7)
    check_refused(r"pixels, expected .* for 7 images of 40x48", *wanted)


@pytest.mark.parametrize("arguments", [(), ("--run", "a"), ("--samples", "a", "--out", "b")])
def test_incomplete_commands_are_refused(monkeypatch, arguments):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *arguments)
