"""Rows go to Weights & Biases only where a project is set; the package is a stand-in here."""

import math
import sys
import types

import numpy as np
import pytest

from alphagrpo_jax.runtime import metrics
from alphagrpo_jax.runtime.errors import MissingFileError
from alphagrpo_jax.runtime.wandb_writer import WandbWriter


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `calls` holds what was asked of it."""
    calls = []
    page = types.SimpleNamespace(
        define_metric=lambda *names, **options: calls.append(("define_metric", names, options)),
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish",)),
    )

    def init(**options):
        calls.append(("init", options))
        return page

    module = types.SimpleNamespace(init=init, Image=lambda path: ("image", path), calls=calls)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_rows_and_grids_are_sent_to_one_page(wandb, tmp_path):
    folder = tmp_path / "first_run"
    folder.mkdir()
    metrics.write_samples(
        folder / "samples", "step_000002_srr", np.zeros((1, 8, 8, 3), np.uint8), [{}]
    )
    for row in (
        {"reward/mean": 0.5, "state/digest": "ab", "loss/total": math.nan, "none": None},
        {"eval/reward/mean": 0.75},
    ):
        writer = WandbWriter("project", folder, {"task": "srr"}, enabled=True)
        writer.write(2, row)
        writer.close()
    starts = [options for name, *options in wandb.calls if name == "init"]
    assert starts[0] == starts[1]  # the same id: the page is continued
    assert starts[0][0]["project"] == "project"
    assert starts[0][0]["name"] == "first_run"
    assert starts[0][0]["resume"] == "allow"
    assert starts[0][0]["config"] == {"task": "srr"}
    rows = [row for name, *row in wandb.calls if name == "log"]
    assert rows[0] == [{"reward/mean": 0.5, "step": 2}]
    picture = ("image", str(folder / "samples" / "step_000002_srr.png"))
    assert rows[1] == [{"eval/reward/mean": 0.75, "samples/srr": picture, "step": 2}]
    assert wandb.calls.count(("finish",)) == 2


@pytest.mark.parametrize(("project", "enabled"), [("", True), ("project", False)])
def test_nothing_is_imported_without_a_project_or_on_other_processes(
    monkeypatch, tmp_path, project, enabled
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    writer = WandbWriter(project, tmp_path, {}, enabled=enabled)
    writer.write(1, {"reward/mean": 0.5})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingFileError, match=r"log.wandb='p' needs the package wandb .*pip"):
        WandbWriter("p", tmp_path, {}, enabled=True)
