"""The log of a run: never a step twice, nothing lost, nothing half."""

import io
import json
import math
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from alphagrpo_jax.runtime import metrics


def rows(folder):
    return [json.loads(line) for line in (folder / metrics.METRICS).read_text().splitlines()]


def events_of(path):
    """The events of a TensorBoard file: records with their length before and checksums around."""
    data, position = path.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        yield event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
        position += 12 + length + 4


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


def test_the_evaluation_of_a_row_can_be_pending(tmp_path):
    log = metrics.MetricsLog(tmp_path, last_step=0)
    log.write(0, {"a": 1})
    log.write(1, {"b": math.nan, metrics.PENDING: 1})
    again = metrics.MetricsLog(tmp_path, last_step=1)
    assert [again.is_pending(step) for step in range(3)] == [False, True, False]
    again.complete(1, {"eval/a": 2.0})
    assert rows(tmp_path) == [{"step": 0, "a": 1}, {"step": 1, "b": None, "eval/a": 2.0}]
    assert not again.is_pending(1)
    with pytest.raises(ValueError, match="step 1 has no pending evaluation"):
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


def test_tensorboard_has_numbers_grids_and_the_configuration(tmp_path):
    writer = metrics.TensorBoardWriter(tmp_path, enabled=True, step=0)
    writer.write_config(0, {"task": "mixed", "train": {"steps": 2}})
    for name in ("step_000000", "step_000002_srr"):
        images = np.full((3, 48, 48, 3), 255, np.uint8)
        metrics.write_samples(tmp_path / "samples", name, images, [{}] * 3)
    writer.write(0, {"eval/reward/mean": 0.5, "state/digest": "ab", "nan": math.nan})
    writer.write(1, {"reward/mean": 0.25})
    writer.write(2, {"eval/reward/mean": 0.75})
    writer.close()
    (path,) = tmp_path.glob("events.*")
    values = {
        (value.tag, event.step): value for event in events_of(path) for value in event.summary.value
    }
    assert set(values) == {
        ("config/text_summary", 0),
        ("eval/reward/mean", 0),
        ("samples", 0),
        ("reward/mean", 1),
        ("eval/reward/mean", 2),
        ("samples/srr", 2),
    }
    assert values["reward/mean", 1].simple_value == 0.25
    text = values["config/text_summary", 0].tensor.string_val[0].decode()
    assert '      "task": "mixed",' in text.splitlines()
    grid = values["samples", 0].image
    assert grid.width == grid.height == 2 * (2 * (48 + 2) + 2)
    with Image.open(io.BytesIO(grid.encoded_image_string)) as image:
        assert image.convert("RGB").getpixel((grid.width // 4, 10)) == (255, 255, 255)


def test_training_imports_torch_with_tensorboard_only(run_python):
    program = "import sys, alphagrpo_jax.train; print('torch' in sys.modules)"
    assert run_python("-c", program).stdout.strip() == "False"
