"""Refinement, edits, answers and mixed runs, from the command to bit-exact resuming."""

import itertools
import json
import signal
import time

import pytest
import tiny_world

SRR = ("--config.task=srr",)
MIXED = (
    "--config.task=mixed",
    "--config.mixed.tasks=('rt2i', 'srr', 'ti2i', 'ti2t')",
    "--config.mixed.weights=(1.0, 1.0, 1.0, 1.0)",
    "--config.mixed.batches=3",
    "--config.train.steps=3",
)
KINDS = {"srr": SRR, "mixed": MIXED}
FAILS_AFTER = 52  # images: in the second step of the mixed run
FIRST_STEP_OF_SRR = 20  # images: in the first step of the srr run


@pytest.fixture(scope="module", params=KINDS)
def full_run(request, run, world):
    """A run without interruption, and its arguments."""
    arguments = KINDS[request.param]
    code, errors = run(world / request.param, *arguments)
    assert code == 0, errors
    return world / request.param, arguments


def test_rows(full_run, rows):
    workdir, arguments = full_run
    step_rows = rows(workdir)[1:]
    for row in step_rows:
        assert row["logp/rollout_update_max_abs_diff"] < 1e-4
        assert row.get("text/ratio_max_dev", 0.0) <= 1e-6
        assert row.get("image/ratio_max_dev", 0.0) <= 1e-6
        assert row["reward/valid_fraction"] == 1.0
    evaluated = rows(workdir)[0]
    if arguments == SRR:
        initial = [evaluated[f"eval/initial/reward/{name}"] for name in ("mean", "format")]
        assert 0.0 < initial[0] < 1.0
        assert initial[1] == 0.0  # first images come without a think text
        assert all(0.0 < row["srr/initial_reward"] < 1.0 for row in step_rows)
        assert all(0.0 <= row["srr/improved_fraction"] <= 1.0 for row in step_rows)
        return
    assert any("srr/srr/initial_reward" in row for row in step_rows)
    assert any("ti2t/reward/mean" in row for row in step_rows)
    assert all(row["update/skipped"] in (0, 1) for row in step_rows)
    assert {"rt2i/eval/reward/mean", "ti2t/eval/exact_all", "eval/reward/mean"} <= set(evaluated)
    pictures = {path.name for path in (workdir / "samples").glob("step_000000*.png")}
    assert pictures == {f"step_000000_{name}.png" for name in ("rt2i", "srr", "ti2i")}


def test_nothing_compiles_after_the_first_step_of_a_kind(full_run):
    workdir, arguments = full_run
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[1:]
    counts = [json.loads(line)["time/compilations"] for line in lines]
    if arguments == SRR:
        assert len(set(counts)) == 1
        return
    rows = [json.loads(line) for line in lines]
    names = ("rt2i", "srr", "ti2i", "ti2t")
    trained: set[str] = set()
    for before, row in itertools.pairwise(rows):
        trained |= {name for name in names if f"{name}/reward/mean" in before}
        new = {name for name in names if f"{name}/reward/mean" in row} - trained
        # A task's first batch compiles; so does the first sum of several tasks' gradients.
        grew = row["time/compilations"] > before["time/compilations"]
        assert not grew or new or len(trained) == 1


def test_the_queue_waits_in_the_checkpoint(full_run):
    """Of six initial images four are repaired after two batches."""
    workdir, _ = full_run
    path = workdir / "checkpoints" / "2" / "progress" / "metadata"
    progress = json.loads(path.read_text())
    waiting, position = len(progress["queue"]["row"]), progress["positions"]["srr"]
    assert waiting in (0, 2, 4)
    assert position > 0
    assert position % 6 == 0
    if len(progress["positions"]) == 1:
        assert (waiting, position) == (2, 6)


@pytest.mark.parametrize("full_run", ["srr"], indirect=True)
def test_interrupted_in_the_middle_of_the_queue_equals_uninterrupted(full_run, run, world, rows):
    workdir, arguments = full_run
    resumed = workdir.with_name("srr_interrupted")
    (world / "signal.json").write_text(json.dumps([signal.SIGTERM, FIRST_STEP_OF_SRR]))
    code, errors = run(resumed, *arguments, *tiny_world.INTERRUPTS)
    assert code == 75, errors
    assert rows(resumed) == rows(workdir)[:2]
    code, errors = run(resumed, *arguments, *tiny_world.INTERRUPTS)
    assert code == 0, errors
    assert rows(resumed) == rows(workdir)


@pytest.mark.parametrize("full_run", ["mixed"], indirect=True)
def test_a_process_killed_behind_its_checkpoint_and_resumed_equals_uninterrupted(
    full_run, start, run, rows
):
    """SIGKILL as soon as the checkpoint of the second step is there."""
    workdir, arguments = full_run
    resumed = workdir.with_name("mixed_resumed")
    saved = resumed / "checkpoints" / "2"
    process = start(resumed, *arguments)
    while process.poll() is None and not saved.exists():  # a folder takes its name when whole
        time.sleep(0.05)
    process.kill()
    _, errors = process.communicate(timeout=1800)
    assert saved.exists(), errors
    assert process.returncode == -signal.SIGKILL, errors
    code, errors = run(resumed, *arguments)
    assert code == 0, errors
    assert rows(resumed) == rows(workdir)


@pytest.mark.parametrize("full_run", ["mixed"], indirect=True)
def test_an_error_leaves_the_queue_as_it_was_before_the_step(full_run, run, world, rows):
    workdir, arguments = full_run
    failed, limit = workdir.with_name(f"{workdir.name}_failed"), world / "tires_after"
    limit.write_text(str(FAILS_AFTER))
    code, errors = run(failed, *arguments, *tiny_world.TIRES)
    limit.unlink()
    assert code == 1, errors
    assert "step 2" in errors
    assert [path.name for path in (failed / "checkpoints").iterdir()] == ["1"]
    code, errors = run(failed, *arguments, *tiny_world.TIRES)
    assert code == 0, errors
    assert rows(failed) == rows(workdir)


def test_own_initial_images(run, world, rows):
    flags = ("--config.srr.source=record", "--config.train.steps=1")
    data = ("--config.data.train=edits.jsonl", "--config.data.heldout=edits.jsonl")
    code, errors = run(world / "own", *SRR, *flags, *data)
    assert code == 0, errors
    first, row = rows(world / "own")
    assert 0.0 < row["srr/initial_reward"] < 1.0
    assert 0.0 < first["eval/initial/reward/mean"] < 1.0  # of the records' own


def test_judged_reflections_and_the_papers_rectification(run, world, rows):
    options = (
        "--config.srr.reflection_format=verifier",
        "--config.reward.isolate=True",
        "--config.srr.rectification=paper",
        "--config.srr.choice=softmax",
        "--config.srr.queue_prompts=5",  # no multiple of a micro-batch or of a step's prompts
        "--config.advantage.baseline=anchor",
        "--config.train.steps=1",
    )
    code, errors = run(world / "judged", *SRR, *options)
    assert code == 0, errors
    row = rows(world / "judged")[1]
    assert 0.0 <= row["reward/reflection"] <= 1.0


def test_equal_rewards_are_no_improvement_and_skip_the_update(run, world, rows):
    constant = ("--config.verifier.path=tiny_verifiers:Constant", "--config.train.steps=1")
    code, errors = run(world / "equal", *SRR, *constant)
    assert code == 0, errors
    row = rows(world / "equal")[1]
    assert row["update/skipped"] == 1
    assert row["srr/improved_fraction"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*SRR, "--config.srr.queue_prompts=1"), 2, "expected at least train.prompts_per_step=2"),
        ((*SRR, "--config.srr.source=record"), 1, "records have no readable image"),
        (("--config.advantage.baseline=anchor",), 2, "which only refining tasks have"),
        (("--config.task=ti2i", "--config.data.edit_train="), 2, "needs data.edit_train"),
        (("--config.task=ti2t", "--config.data.answer_train=train.jsonl"), 1, "field 'answer'"),
        (("--config.task=ti2i", "--config.data.edit_train=answers.jsonl"), 1, "is missing"),
        ((*MIXED, "--config.mixed.weights=(1.0,)"), 2, "mixed.weights"),
    ],
)
def test_bad_input(arguments, code, message, run, world):
    got, errors = run(world / "refused", *arguments)
    assert got == code, errors
    assert message in errors
    assert "Traceback" not in errors


def test_a_missing_image_is_named_with_its_record(run, world):
    lines = (world / "edits.jsonl").read_text().splitlines()
    broken = json.loads(lines[1]) | {"image": "nowhere.png"}
    (world / "gone.jsonl").write_text("\n".join([lines[0], json.dumps(broken)]) + "\n")
    code, errors = run(
        world / "refused", "--config.task=ti2i", "--config.data.edit_train=gone.jsonl"
    )
    assert code == 1
    assert "gone.jsonl:2: " in errors
    assert "nowhere.png" in errors
