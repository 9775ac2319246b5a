"""The last words of a run: numbers, places, and commands that exist."""

import dataclasses
import pathlib
import shlex

import pytest
import tiny_world

from alphagrpo_jax import config_checks, decompose, generate
from alphagrpo_jax.prompts import PromptSet, TaskData
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.training.closing import closing_words, generate_command, result_lines

ROWS = [
    {"step": 0, "eval/reward/mean": 0.884, "eval/exact_all": 0.571, "eval/exact_all/plain": 0.95},
    {"step": 1, "reward/mean": 0.5},
    {"step": 2, "eval/reward/mean": 0.951, "eval/exact_all": 0.832, "eval/exact_all/plain": 0.98},
]


@pytest.fixture
def config():
    fields = tiny_world.get_config()
    return config_checks.from_config_dict(fields)


def data(prompt):
    record = parse_record(tiny_world.record(prompt))
    prompts = PromptSet(TASKS["rt2i"], (record,), (), pathlib.Path(), "")
    return {"rt2i": TaskData(prompts, prompts)}


def test_before_and_after():
    assert result_lines(ROWS) == [
        "  held-out  before     after",
        "  exact      0.571 ->  0.832",
        "    plain    0.950 ->  0.980",
        "  reward     0.884 ->  0.951",
    ]
    assert result_lines(ROWS[:2]) == []
    mixed = [row | {"srr/eval/exact_all": 0.5} for row in ROWS if row["step"] != 1]
    assert result_lines(mixed)[2] == "    srr      0.500 ->  0.500"


def test_places_and_next_commands(tmp_path, config):
    workdir = tmp_path / "a run"
    workdir.mkdir()
    (workdir / "report.html").write_text("")
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, tensorboard=True))
    text = closing_words(config, workdir, ROWS, data("it's red"), 605.2)
    assert "10 min 5 s" in text
    assert f"{workdir / 'report.html'}: curves" in text
    assert "step_000000 to step_000002" in text
    assert f"tensorboard --logdir '{workdir}'" in text
    commands = [line.strip() for line in text.splitlines() if "python -m" in line]
    first, second = (shlex.split(command) for command in commands)
    options = generate.parse_flags(first[3:])
    assert (options.checkpoint, options.prompt) == (str(workdir), "it's red")
    assert second[:3] == ["python", "-m", "alphagrpo_jax.decompose"]
    assert decompose.parse_flags(second[3:]).llm.startswith("openai:")
    assert "--config.data.train=mine.jsonl" in text


def test_what_is_switched_off_is_not_named(tmp_path, config):
    text = closing_words(config, tmp_path, ROWS, data("red"), 1.0)
    assert "tensorboard" not in text
    assert "report.html" not in text


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_has_a_command(name):
    command = shlex.split(generate_command(TASKS[name], "runs/x", "make it red"))
    assert generate.parse_flags(command[3:]).checkpoint == "runs/x"
