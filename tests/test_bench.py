"""The figures of bench hang together; no figure is compared with a time."""

import json
import pathlib

import pytest
import tiny_world

from alphagrpo_jax import bench
from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.training.checks import TrainingError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    return tiny_world.write_all(tmp_path_factory.mktemp("world"))


def test_figures(world: pathlib.Path):
    config = config_lib.from_config_dict(tiny_world.config(world))
    figures = bench.measure(config, world, steps=2)
    assert figures["compilations"] > 0
    assert figures["compilations_after_first_step"] == 0
    assert sum(figures[f"share/{name}"] for name in bench.STAGES) == pytest.approx(1)
    assert figures["images_per_second"] == pytest.approx(8 / figures["seconds/draw_alone"])
    questions = 8 * 3  # trajectories, questions of each record
    assert figures["questions_per_second"] == pytest.approx(
        questions / figures["seconds/answer_alone"]
    )
    assert 0 <= figures["share/verifier_hidden"] <= 1
    table = bench.table(json.loads(json.dumps(figures)), config)
    assert "step of 8 trajectories" in table
    stages = sum(figures[f"seconds/{name}"] for name in bench.STAGES)
    assert figures["images_per_second_per_device"] == pytest.approx(8 / stages, rel=0.5)
    slower = {name: 2 * value for name, value in figures.items()}
    lines = bench.table(figures, config, slower).split("now / then\n")[1].splitlines()
    assert {"seconds/step", "share/update"} <= {line.split()[0] for line in lines}
    assert {line.split()[1] for line in lines} == {"0.500"}


def test_an_error_of_the_training_is_explained(capsys, monkeypatch):
    def fail(*_, **__):
        raise TrainingError("step 1: 100% of the samples have no reward")

    monkeypatch.setattr(bench, "measure", fail)
    assert bench.main(["--steps", "1"]) == 1
    assert capsys.readouterr().err == "error: step 1: 100% of the samples have no reward\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1\n", "has no function get_config"), ("def (", "cannot be run (invalid syntax")],
)
def test_a_file_that_is_no_configuration_is_explained(text, message, tmp_path, capsys):
    (tmp_path / "config.py").write_text(text)
    assert bench.main(["--config", str(tmp_path / "config.py")]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_configuration_is_explained(capsys):
    assert bench.main(["--config", "nowhere.py"]) == 1
    assert "no configuration file at nowhere.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "expected figures of bench"),
        ("[1]", "with seconds/step"),
        ('{"seconds/step": "a"}', "with seconds/step"),
        ('{"other": 1.0}', "with seconds/step"),
    ],
)
def test_figures_of_an_earlier_run_that_are_none_are_refused_before_the_work(
    text, message, tmp_path, capsys
):
    path = tmp_path / "earlier.json"
    if text is not None:
        path.write_text(text)
    assert bench.main(["--against", str(path)]) == 1
    assert message in capsys.readouterr().err
