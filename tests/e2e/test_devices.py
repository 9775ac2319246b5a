"""The mesh changes where numbers are computed, not the numbers."""

import json
import os
import pathlib

import pytest
import tiny_world

TESTS = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_one_update_on_3_6_and_8_devices_equals_one_device(run_python, tmp_path):
    tiny_world.write_model(tmp_path / "model")
    path = f"{TESTS.parent}{os.pathsep}{TESTS}"
    script = str(TESTS / "e2e" / "device_numbers.py")
    process = run_python(script, str(tmp_path), devices=8, timeout=1800, PYTHONPATH=path)
    assert process.returncode == 0, process.stderr[-3000:]
    comparisons = [json.loads(line) for line in process.stdout.splitlines()]
    assert [comparison["devices"] for comparison in comparisons] == [3, 6, 8]
    for comparison in comparisons:
        assert comparison["scale"] > 1e-4
        assert comparison["whole over fsdp"] == []  # adapters, their gradient and moments are split
        assert comparison["scores"] < 1e-4
        assert comparison["ode"] < 1e-3
        assert comparison["pixels"] <= 1
        assert comparison["gradient"] < 1e-3 * comparison["scale"]
        assert comparison["metrics"] < 1e-3
        assert comparison["greedy tokens"] == 0
        assert comparison["updated"] < 1e-5  # the optimizer's eps is large, see device_numbers.py
