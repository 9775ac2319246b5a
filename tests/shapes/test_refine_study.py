"""The study of refinement: its sums by hand, and that nothing is measured twice."""

import numpy as np
import pytest

from alphagrpo_jax.inference import Performed
from alphagrpo_jax.shapes import image_records, measure, refine_study, scenes


def test_figures_by_hand():
    found = refine_study.figures(
        [0.5, 1.0, 0.25, 1.0], {"refined": [1.0, 1.0, 0.5, 0.75], "edit": [1.0, 0.5]}
    )
    assert found == {
        "first": 0.5, "refined": 0.5, "gain": 0.0,
        "improved": 0.5, "kept": 0.25, "spoilt": 0.25, "edit": 0.5,
    }  # fmt: skip


def test_the_table_shows_single_runs_beside_their_mean():
    row = dict.fromkeys(refine_study.COLUMNS, 0.25)
    shown = refine_study.table({"untrained": [row], "srr": [row, row | {"edit": 0.75}]})
    assert "| untrained | 0.250 |" in shown
    assert "0.500 (0.250, 0.750) |" in shown


def test_a_policy_that_changes_nothing(monkeypatch, tmp_path):
    def idle(policy_, task, asked, images=None, **_):
        if images is None:
            images = np.stack([scenes.render(scenes.Scene((), "white"))] * len(asked))
        return Performed(images, [])

    monkeypatch.setattr(refine_study, "perform", idle)
    monkeypatch.setattr(refine_study, "weights_digest", lambda policy: "own")
    records, edits = measure.heldout_records(1, 1), image_records.records("edit", "heldout", 8)
    first = refine_study.first_images(None, records)
    path = tmp_path / "x.json"
    found = refine_study.measured(path, None, records, first, edits)
    assert found["refined"] == found["first"]
    assert refine_study.figures(found["first"], found)["kept"] == 1.0
    assert max(found["first"]) < 1.0  # an empty picture fulfils no prompt
    again = refine_study.measured(path, None, records, None, edits)  # nothing is drawn
    assert again["refined"] == found["refined"]
    with pytest.raises(ValueError, match=r"x\.json is about .* delete it to measure again"):
        refine_study.measured(path, None, records, first, edits[:4])


@pytest.mark.parametrize("text", ["srr", "=x", "srr=", "untrained=x"])
def test_wrong_usage(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        refine_study.main(["--out", str(tmp_path), "--run", text])
    assert stopped.value.code == 2
    assert "expected NAME=FOLDER" in capsys.readouterr().err
