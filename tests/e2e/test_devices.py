"""The mesh changes where numbers are computed, not the numbers."""

import json
import os
import pathlib

import pytest
import tiny_world

TESTS = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_one_update_on_eight_devices_equals_one_device(run_python, tmp_path):
    tiny_world.write_model(tmp_path / "model")
    path = f"{TESTS.parent}{os.pathsep}{TESTS}"
    script = str(TESTS / "e2e" / "device_numbers.py")
    done = run_python(script, str(tmp_path), devices=8, timeout=1800, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["scale"] > 1e-4
    assert found["scores"] < 1e-4
    assert found["ode"] < 1e-3
    assert found["gradient"] < 1e-3 * found["scale"]
    assert found["metrics"] < 1e-3
    assert found["greedy tokens"] == 0
    assert found["updated"] < 1e-5  # the optimizer's eps is large, see device_numbers.py
