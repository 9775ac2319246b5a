"""What ends a training: a bug keeps its traceback, and what the machine refuses is one message."""

import json

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
