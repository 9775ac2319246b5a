"""What ends a training: a bug keeps its traceback, and what the machine refuses is one message."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alphagrpo_jax import advantage, prompts, update
from alphagrpo_jax.runtime.metrics import MetricsLog
from configs import grpo


def broken_arrays(*_, **__):
    return np.zeros(2) + np.zeros(3)


def broken_order(*_, **__):
    return list(zip([1], [], strict=True))


def full_disk(*_):
    raise OSError(28, "No space left on device", "metrics.jsonl")


BUGS = {
    # The code, for whoever has imported the function.
    "advantage": (
        (advantage.group_advantage, "__code__", broken_arrays.__code__),
        "in broken_arrays",
        "ValueError: operands could not be broadcast",
    ),
    "update": (
        (update, "_apply", broken_arrays),
        "in broken_arrays",
        "ValueError: operands could not be broadcast",
    ),
    "prompts": (
        (prompts, "order", broken_order),
        "in broken_order",
        "ValueError: zip() argument 2 is shorter",
    ),
}


@pytest.mark.parametrize("stage", sorted(BUGS))
def test_a_bug_in_a_stage_keeps_its_traceback(run, world, monkeypatch, stage):
    patch, function, message = BUGS[stage]
    monkeypatch.setattr(*patch)
    code, printed = run(world / f"bug_{stage}")
    assert code == 1, printed
    assert "Traceback (most recent call last)" in printed
    assert function in printed
    assert message in printed.splitlines()[-1]
    assert "error: " not in printed


def test_a_full_disk_is_one_message(run, world, monkeypatch):
    monkeypatch.setattr(MetricsLog, "write", full_disk)
    code, printed = run(world / "full")
    assert code == 1, printed
    assert "error: [Errno 28] No space left on device: 'metrics.jsonl'; the run's folder" in printed
    assert "run the same command again: it continues from the last checkpoint" in printed
    assert "Traceback" not in printed


def test_a_record_that_nobody_can_answer_costs_no_update(run, world, rows):
    path = world / "unicorn.jsonl"
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    row = prompts.order(4, 1, size=len(lines), seed=grpo.get_config().seed)[0]  # first in step 3
    bad = json.loads(lines[row])
    bad["semantic_questions"][0]["question"] = "Is it a unicorn?"
    command = (
        "--config.verifier.path=tiny_verifiers:NoUnicorns",
        f"--config.data.train={path}",
        "--config.checkpoint.every=100",
    )
    path.write_text("".join([*lines[:row], json.dumps(bad) + "\n", *lines[row + 1 :]]))
    code, printed = run(world / "mended", *command)
    assert code == 1, printed
    assert f"{path}:{row + 1}: the prompt {bad['prompt']!r} can never have a reward" in printed
    assert "no verifier can answer 'Is it a unicorn?': unicorns do not exist. Mend" in printed
    assert "Traceback" not in printed
    path.write_text("".join(lines))
    code, printed = run(world / "mended", *command)
    assert code == 0, printed
    assert "has other questions, captions or facts than at step 2" in printed
    code, printed = run(world / "never_bad", *command)
    assert code == 0, printed
    assert rows(world / "mended") == rows(world / "never_bad")


def test_a_save_that_fails_in_the_background_ends_the_run_and_costs_no_older_one(
    run, world, monkeypatch
):
    workdir, written = world / "unsaved", []

    def fail_once(manager, step):
        if step == 2 and not written:
            written.append(step)
            raise OSError(28, "No space left on device")
        return finalize(manager, step)

    finalize = ocp.CheckpointManager._finalize_checkpoint
    monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", fail_once)
    arguments = ("--config.checkpoint.every=1", "--config.eval.every=0")
    code, printed = run(workdir, *arguments)
    assert code == 1, printed
    assert "error: step 2: the checkpoint could not be written" in printed
    assert "run the same command again" in printed
    assert "Traceback" not in printed
    code, printed = run(workdir, *arguments)
    assert code == 0, printed
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "4"}


@pytest.mark.slow
def test_too_little_memory_names_the_stage_and_the_plan_and_costs_no_update(
    run, world, monkeypatch, rows
):
    """A device that runs out of memory in the second update, as XLA says it."""
    step, calls = update._gradient, []

    def out_of_memory(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9876543210 bytes.\nBufferAssignment:"
            )
        return step(*arguments)

    flags = ("--config.train.steps=3", "--config.train.micro_batch=2", "--config.eval.every=0")
    with monkeypatch.context() as patch:
        patch.setattr(update, "_gradient", out_of_memory)
        code, printed = run(world / "small", *flags)
    assert code == 1
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "too little memory: the stage update (step) needs" in line
    assert "python -m alphagrpo_jax.plan --config=" in line
    assert " --config.train.micro_batch=2 --config.train.steps=3 --chips=NAME:1" in line
    assert (world / "small" / "checkpoints" / "1").is_dir()
    code, printed = run(world / "small", *flags)
    assert code == 0, printed
    assert [row["step"] for row in rows(world / "small")] == [0, 1, 2, 3]
