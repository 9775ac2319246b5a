"""The study: statistics on numbers made by hand, what is refused, and the whole over fake policies.

No image is generated here.
"""

import json
import pathlib

import numpy as np
import pytest

from alphagrpo_jax import config_checks, inference
from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.runtime.metrics import METRICS
from alphagrpo_jax.studies import bootstrap, rt2i, verdicts
from alphagrpo_jax.training.run_folder import CONFIG_FILE, DONE_FILE

CONFIG = config_checks.read_config()
MODEL = verdicts.model_digest(CONFIG.model.path)
GROUPS = ["plain/count"] * 4 + ["plain/relation"] * 2 + ["implied"] * 4
CLUSTERS = list("aabbcdeeff")


def bools(text: str) -> np.ndarray:
    return np.array([mark == "1" for mark in text], bool)


def test_records_of_a_group_share_clusters():
    records, groups = rt2i.study_records()
    clusters: dict[str, set[str]] = {}
    for record, group in zip(records, groups, strict=True):
        clusters.setdefault(group, set()).add(bootstrap.cluster(record))
    assert clusters["heldout_riddles"] == {"a frog", "lavender", "a coin", "tricycle wheels"}
    assert all(
        10 < len(clusters[group]) < groups.count(group) for group in clusters if "held" not in group
    )


def gain(value: float) -> bootstrap.Gain:
    return bootstrap.Gain(value, np.full(bootstrap.RESAMPLES, value))


def test_bars():
    gains = {"all": gain(0.1 + 0.05), "implied": gain(0.29), "plain": gain(-0.03)}
    gains |= {"plain/count": gain(-0.06), "plain/relation": gain(0.1)}
    rows = rt2i.bars(gains, {"implied": gain(0.2)})
    assert [(row["bar"], row["value"], row["met"]) for row in rows] == [
        ("gain on all >= 0.15", 0.15, True),
        ("gain on implied >= 0.3", 0.29, False),
        ("gain on plain >= -0.03", -0.03, True),
        ("least gain on a plain type >= -0.05", -0.06, False),
        ("gain over greedy on implied >= 0.15", 0.2, True),
    ]


def test_summary_has_the_noise_floor():
    untrained = {
        rt2i.UNTRAINED: bools("1100100000"),
        rt2i.GREEDY: bools("1100100001"),
        rt2i.AGAIN: bools("1100101000"),
    }
    summary = rt2i.summary(bools("1110101100")[None], untrained, GROUPS, CLUSTERS)
    assert summary["noise_floor"]["implied"]["gain"] == 0.25
    assert summary["noise_floor"]["plain"] == {"gain": 0.0, "interval_95": [0.0, 0.0]}
    implied = summary["groups"]["implied"]
    assert (implied["prompts"], implied["clusters"]) == (4, 2)
    assert (implied["trained"], implied["gain"], implied["gain_over_greedy"]) == ([0.5], 0.5, 0.25)
    assert implied["interval_95"] == [0.0, 1.0]
    assert implied["gain_over_greedy_interval_95"] == [-0.5, 1.0]
    assert "prompts" not in summary["groups"]["all"]
    json.dumps(summary)


def test_training_is_told_from_first_to_last_evaluation():
    rows = [{"step": 0, "eval/reward/mean": 0.8}, {"step": 1}, {"step": 2, "eval/reward/mean": 0.9}]
    assert rt2i.training_metrics(rows) == {"eval/reward/mean": [0.8, 0.9]}


def write_run(folder: pathlib.Path, digest: str = "d" * 64) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(config_lib.to_json(CONFIG))
    (folder / DONE_FILE).write_text("2\n")
    rows = [
        {"step": 0, "eval/reward/mean": 0.8, "eval/reward_minus_exact": 0.2},
        {"step": 1, "state/digest": "c" * 64},
        {"step": 2, "eval/reward/mean": 0.9, "state/digest": digest},
    ]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_finished_runs_are_read(tmp_path: pathlib.Path):
    run = rt2i.read_finished_run(write_run(tmp_path / "seed0"), CONFIG, MODEL)
    assert (run.name, run.step, run.digest) == ("seed0", 2, "d" * 64)


def test_runs_that_do_not_fit_are_refused(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="not a run's folder"):
        rt2i.read_finished_run(tmp_path / "nothing", CONFIG, MODEL)
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"with model {MODEL}, expected 0123"):
        rt2i.read_finished_run(run, CONFIG, "0123")
    (run / METRICS).write_text(json.dumps({"step": 0}) + "\n")
    with pytest.raises(ValueError, match="has no state/digest"):
        rt2i.read_finished_run(run, CONFIG, MODEL)
    (run / DONE_FILE).unlink()
    with pytest.raises(ValueError, match="not finished"):
        rt2i.read_finished_run(run, CONFIG, MODEL)


def test_another_checkpoint_than_the_last_state_is_refused(monkeypatch):
    policy = inference.Policy(CONFIG, None, None, step=1)
    monkeypatch.setattr(inference, "from_run", lambda folder: policy)
    run = rt2i.FinishedRun(pathlib.Path("runs/x"), 2, "d", [])
    with pytest.raises(ValueError, match="is of step 1, expected 2"):
        rt2i.final_policy(run, CONFIG)
    without_config = policy._replace(config=None)
    monkeypatch.setattr(inference, "from_run", lambda folder: without_config)
    assert rt2i.final_policy(run._replace(step=1), CONFIG).config is CONFIG


def test_the_command(tmp_path: pathlib.Path, monkeypatch, capsys):
    judged = []

    def judge(policy, records, *, temperature, seed):
        judged.append((policy, temperature, seed))
        return bools("1111111100") if policy != "untrained" else bools("1111110000")

    plain, implied = {"kind": "plain", "combination": "x"}, {"kind": "implied", "riddles": ["r"]}
    monkeypatch.setattr(rt2i, "study_records", lambda: ([plain] * 6 + [implied] * 4, GROUPS))
    monkeypatch.setattr(rt2i, "judge_policy", judge)
    monkeypatch.setattr(inference, "from_config", lambda config: "untrained")
    monkeypatch.setattr(rt2i, "final_policy", lambda run, config: run.name)
    runs = [write_run(tmp_path / "runs" / name) for name in ("seed0", "seed1")]
    flags = ["--out", str(tmp_path / "out"), *(f"--run={run}" for run in runs)]
    assert rt2i.main(flags) == 0
    seeds, temperature = (rt2i.SEED, rt2i.OTHER_SEED), CONFIG.eval.temperature
    assert judged == [
        ("untrained", temperature, seeds[0]),
        ("untrained", 0.0, seeds[0]),
        ("untrained", temperature, seeds[1]),
        ("seed0", temperature, seeds[0]),
        ("seed1", temperature, seeds[0]),
    ]
    summary = json.loads((tmp_path / "out" / "summary_default.json").read_text())
    assert summary["groups"]["all"]["gain"] == 0.25
    assert summary["training"]["seed1"] == {
        "eval/reward/mean": [0.8, 0.9],
        "eval/reward_minus_exact": [0.2, 0.2],
    }
    judged.clear()
    assert rt2i.main(flags) == 0
    assert not judged
    # A run that was trained on is another policy.
    rows = (runs[0] / METRICS).read_text()
    (runs[0] / METRICS).write_text(rows.replace("d" * 64, "e" * 64))
    capsys.readouterr()
    assert rt2i.main(flags) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "other state: got" in message


def test_wrong_folders_end_with_one_message(tmp_path: pathlib.Path, capsys):
    assert rt2i.main(["--out", str(tmp_path), "--run", str(tmp_path / "none")]) == 1
    assert "not a run's folder" in capsys.readouterr().err
    twice = [str(write_run(tmp_path / parent / "seed0")) for parent in "ab"]
    assert rt2i.main(["--out", str(tmp_path), "--run", twice[0], "--run", twice[1]]) == 1
    assert "several --run folders named ['seed0']" in capsys.readouterr().err
    flags = ["--out", str(tmp_path), "--run", twice[0], "--config", str(tmp_path / "none.py")]
    assert rt2i.main(flags) == 1
    assert "no configuration file" in capsys.readouterr().err
