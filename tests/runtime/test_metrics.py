"""The log of a run: never a step twice, nothing lost, nothing half."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from alphagrpo_jax.runtime import metrics


def rows(folder):
    return [json.loads(line) for line in (folder / metrics.METRICS).read_text().splitlines()]


def test_rows_are_appended_and_numbers_that_are_not_finite_become_null(tmp_path):
    log = metrics.MetricsLog(tmp_path, last_step=0)
    log.write(0, {"b": 1.5, "a": math.nan})
    log.write(1, {"digest": "ab", "n": np.float32(2)})
    assert rows(tmp_path) == [
        {"step": 0, "a": None, "b": 1.5},
        {"step": 1, "digest": "ab", "n": 2.0},
    ]
    assert log.has(1)
    with pytest.raises(ValueError, match="metrics of step 1 after those of 1"):
        log.write(1, {})


def test_rows_behind_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    log = metrics.MetricsLog(tmp_path, last_step=0)
    for step in range(4):
        log.write(step, {"a": step})
    with (tmp_path / metrics.METRICS).open("a") as file:
        file.write('{"step": 4, "a"')
    again = metrics.MetricsLog(tmp_path, last_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert not again.has(3)
    again.write(3, {"a": 30})
    assert rows(tmp_path)[-1] == {"step": 3, "a": 30}


def test_a_row_can_owe_its_evaluation(tmp_path):
    log = metrics.MetricsLog(tmp_path, last_step=0)
    log.write(0, {"a": 1})
    log.write(1, {"b": math.nan, metrics.PENDING: 1})
    again = metrics.MetricsLog(tmp_path, last_step=1)
    assert [again.owes(step) for step in range(3)] == [False, True, False]
    again.complete(1, {"eval/a": 2.0})
    assert rows(tmp_path) == [{"step": 0, "a": 1}, {"step": 1, "b": None, "eval/a": 2.0}]
    assert not again.owes(1)
    with pytest.raises(ValueError, match="step 1 owes no evaluation"):
        again.complete(1, {"eval/a": 3.0})


def test_other_processes_write_nothing(tmp_path):
    log = metrics.MetricsLog(tmp_path, last_step=0, writes=False)
    log.write(0, {"a": 1})
    assert log.has(0)
    assert not (tmp_path / metrics.METRICS).exists()


def test_samples_are_a_grid_with_captions(tmp_path):
    images = np.zeros((3, 48, 48, 3), np.uint8)
    metrics.write_samples(tmp_path, "step_000012", images, [{"prompt": "p"}] * 3)
    width = 2 * (48 + 2) + 2
    assert Image.open(tmp_path / "step_000012.png").size == (2 * width, 2 * width)
    assert json.loads((tmp_path / "step_000012.json").read_text()) == [{"prompt": "p"}] * 3


def test_training_imports_torch_with_tensorboard_only(run_python):
    program = "import sys, alphagrpo_jax.train; print('torch' in sys.modules)"
    assert run_python("-c", program).stdout.strip() == "False"
