"""The study of refinement: its sums by hand, and that nothing is measured twice."""

import json

import numpy as np
import pytest

from alphagrpo_jax.inference import TaskOutput
from alphagrpo_jax.shapes import image_records, scenes
from alphagrpo_jax.studies import bootstrap, measure, rt2i, srr, srr_summary

EMPTY = scenes.render(scenes.Scene((), "white"))


def records_of(*kinds):
    return [
        {"kind": kind, "type": "count", "combination": f"c{at}", "riddles": [f"r{at}"]}
        for at, kind in enumerate(kinds)
    ]


def judged(**changes):
    plain = {name: [1.0, 0.5, 0.5, 1.0] for name in srr_summary.JUDGED}
    return plain | {"edit": [1.0, 0.5]} | changes


def test_measures_by_hand():
    outcomes = srr_summary.outcomes(
        judged(
            first=[0.5, 1.0, 0.25, 1.0],
            refined=[1.0, 1.0, 0.5, 0.75],
            own_first=[0.0, 1.0, 1.0, 1.0],
            own_refined=[0.5, 0.0, 1.0, 1.0],
        )
    )
    expected = {
        "first": [0, 1, 0, 1], "refined": [1, 1, 0, 0], "gain": [1, 0, 0, -1],
        "improved": [1, 0, 1, 0], "kept": [0, 1, 0, 0], "spoilt": [0, 0, 0, 1],
        "own_first": [0, 1, 1, 1], "own_refined": [0, 0, 1, 1], "own_gain": [0, -1, 0, 0],
        "own_improved": [1, 0, 0, 0], "own_spoilt": [0, 1, 0, 0], "edit": [1, 0],
    }  # fmt: skip
    assert {name: values.tolist() for name, values in outcomes.items()} == expected
    assert tuple(outcomes) == srr_summary.COLUMNS


def test_kinds_weigh_alike_and_gains_are_paired():
    records = records_of("plain", "plain", "plain", "implied")
    edits = [{"facts": {"total": 1}}, {"facts": {"total": 2}}]
    runs = {
        "untrained": [srr_summary.outcomes(judged())],
        "new": [
            srr_summary.outcomes(judged(refined=[1.0, 0.5, 0.5, 0.5])),
            srr_summary.outcomes(judged(refined=[1.0, 1.0, 0.5, 0.5], edit=[1.0, 1.0])),
        ],
    }
    summary = srr_summary.summary(runs, records, edits)
    assert summary["prompts"] == {"plain/count": 3, "implied": 1}
    policy = summary["policies"]["new"]
    assert policy["plain"]["refined"] == [0.3333, 0.6667]
    assert policy["implied"]["refined"] == [0.0, 0.0]
    assert policy["all"]["refined"] == [0.1667, 0.3333]
    assert "edit" not in policy["plain"]
    gain = summary["gains"]["new - untrained"]
    assert gain["plain"]["refined"]["gain"] == 0.1667  # (0 + 1/3) / 2
    assert gain["implied"]["refined"] == {"gain": -1.0, "interval_95": [-1.0, -1.0]}
    assert gain["all"]["edit"] == {"gain": 0.25, "interval_95": [0.0, 1.0]}
    table = srr_summary.table(summary)
    assert "| new, all | 0.667 (0.667, 0.667) | 0.250 (0.167, 0.333) |" in table
    assert "| new - untrained, implied | -1.000 (-1.000 to -1.000) |" in table


def test_runs_of_two_names_are_paired_in_order():
    records = records_of("plain", "implied")
    high, low = (srr_summary.outcomes(judged(refined=[x, x], own_refined=[x, x], first=[0.5, 0.5],
                own_first=[0.5, 0.5], edit=[x])) for x in (1.0, 0.5))  # fmt: skip
    edits = [{"facts": {}}]
    paired = srr_summary.gains([high, low], [high, low], records, edits)
    crossed = srr_summary.gains([high, low], [low, high], records, edits)
    for kind, name in (("all", "refined"), ("plain", "improved"), ("all", "edit")):
        assert paired[kind][name].interval == [0.0, 0.0]
        assert crossed[kind][name].interval == [-1.0, 1.0]
        assert crossed[kind][name].value == 0.0
    mean = srr_summary.gains([high], [low, high], records, edits)  # numbers differ
    assert mean["all"]["refined"].value == 0.5


def test_the_whole_command_measures_nothing_twice(monkeypatch, tmp_path, capsys):
    """A policy that changes nothing, and generates empty images."""
    calls = []

    def idle(policy_, task, texts, images=None, **_):
        calls.append(task.name)
        return TaskOutput(np.stack([EMPTY] * len(texts)) if images is None else images, [])

    monkeypatch.setattr(srr, "run_task", idle)
    monkeypatch.setattr(srr, "weights_digest", lambda policy: "own")
    monkeypatch.setattr(srr.inference, "from_config", lambda config: None)
    monkeypatch.setattr(srr.inference, "from_run", lambda folder: TaskOutput(None, []))
    monkeypatch.setattr(TaskOutput, "_replace", lambda self, **_: None)
    run = tmp_path / "run"
    run.mkdir()
    command = ["--out", str(tmp_path), "--run", f"srr={run}", "--per-type", "1", "--implied", "1"]
    command += ["--edits", "8"]
    assert srr.main(command) == 1
    assert "is not finished" in capsys.readouterr().err
    (run / "DONE").touch()
    assert srr.main(command) == 0
    assert calls == ["t2i", "srr", "ti2i", "srr", "t2i", "srr", "ti2i"]
    printed, summary = (
        capsys.readouterr().out,
        json.loads((tmp_path / "summary_refine.json").read_text()),
    )
    assert "| srr, all |" in printed
    assert summary["policies"]["srr"]["all"]["kept"] == [1.0]
    assert summary["policies"]["srr"]["all"]["own_first"] == [0.0]  # emptiness fulfils no prompt
    assert summary["gains"]["srr - untrained"]["all"]["spoilt"]["interval_95"] == [0.0, 0.0]
    assert srr.main(command) == 0
    assert calls[7:] == ["t2i"]  # the images to repair
    assert capsys.readouterr().out == printed
    assert srr.main([*command[:-1], "4"]) == 1
    assert "refine_untrained.json is about other edits" in capsys.readouterr().err
    (tmp_path / "refine_untrained.json").write_text("{}")
    assert srr.main(command) == 1
    assert "holds no judgements of this study" in capsys.readouterr().err


def test_the_default_numbers_are_those_of_a_study():
    assert srr.PER_PLAIN_TYPE >= rt2i.PER_PLAIN_TYPE == 300
    assert srr.IMPLIED >= rt2i.IMPLIED == 800
    records = measure.heldout_records(2, 3)
    groups = [srr_summary.prompt_group(record) for record in records]
    assert groups.count("implied") == 3
    assert groups.count("plain/relation") == 2
    assert all(bootstrap.cluster(record) for record in records)
    assert all(record["facts"] for record in image_records.records("edit", "heldout", 2))


@pytest.mark.parametrize("text", ["srr", "=x", "srr=", "untrained=x"])
def test_wrong_usage(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        srr.main(["--out", str(tmp_path), "--run", text])
    assert stopped.value.code == 2
    assert "expected NAME=FOLDER" in capsys.readouterr().err
