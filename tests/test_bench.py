"""The figures of bench hang together; no figure is compared with a time."""

import json
import pathlib

import pytest
import tiny_world

from alphagrpo_jax import bench
from alphagrpo_jax import config as config_lib


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
    asked = 8 * 3  # trajectories, questions of each record
    assert figures["questions_per_second"] == pytest.approx(asked / figures["seconds/answer_alone"])
    assert 0 <= figures["share/verifier_hidden"] <= 1
    shown = bench.table(json.loads(json.dumps(figures)), config)
    assert "step of 8 trajectories" in shown


def test_a_missing_configuration_is_explained(capsys):
    assert bench.main(["--config", "nowhere.py"]) == 1
    assert "no configuration file at nowhere.py" in capsys.readouterr().err
