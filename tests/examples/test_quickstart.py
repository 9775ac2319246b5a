"""The example of the manual runs, and its loss by hand is the library's."""

import importlib.util
import json
import math
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "quickstart.py"


def test_loss_by_hand_is_that_of_the_library():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    loss, by_hand = quickstart.loss_by_hand()
    assert math.isclose(loss, by_hand, rel_tol=1e-5)
    assert quickstart.small_config().train.steps == 3


@pytest.mark.slow
def test_quickstart_trains_scores_and_computes_a_loss(run_python, tmp_path: pathlib.Path):
    process = run_python(str(SCRIPT), str(tmp_path / "run"))
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["text/ratio_max_dev"] == rows[1]["image/ratio_max_dev"] == 0.0
    last = process.stdout.splitlines()[-1].split()
    assert math.isclose(float(last[1].rstrip(",")), float(last[4]), abs_tol=1e-6)
    assert "P(yes) = " in process.stdout
