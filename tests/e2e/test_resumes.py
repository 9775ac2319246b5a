"""What may differ when a run is continued, by the command in processes of its own."""

import shutil

import pytest
import tiny_world

from alphagrpo_jax.models.bagel_weights import save_model

STEPS = ("--config.eval.every=0", "--config.checkpoint.every=1")


@pytest.fixture(scope="module")
def begun(run, world):
    """A run of one update on one device."""
    code, errors = run(world / "begun", *STEPS, "--config.train.steps=1")
    assert code == 0, errors
    return world / "begun"


@pytest.mark.slow
def test_another_micro_batch_and_device_count_continue_with_one_notice(
    begun, world, run_process, rows
):
    workdir = shutil.copytree(begun, world / "wider")
    moved = shutil.copytree(world / "model", world / "moved")
    changes = (
        "--config.train.steps=2",
        "--config.train.micro_batch=2",
        "--config.rollout.micro_batch=2",
        "--config.model.remat=full",
        f"--config.model.path={moved}",
    )
    code, errors = run_process(workdir, *STEPS, *changes, devices=2)
    assert code == 0, errors
    assert errors.count("notice: the run goes on with other values") == 1
    for line in (
        "mesh.data: the run has 1, this start 2",
        f"model.path: the run has 'model', this start '{moved}'",
        "model.remat: the run has 'none', this start 'full'",
        "rollout.micro_batch: the run has 4, this start 2",
        "train.micro_batch: the run has 4, this start 2",
    ):
        assert f"\n  {line}\n" in errors
    before, after = rows(begun), rows(workdir)
    assert [row["step"] for row in after] == [0, 1, 2]
    assert after[1]["state/digest"] == before[1]["state/digest"]


@pytest.mark.slow
def test_other_weights_are_refused_under_the_same_and_under_another_path(begun, world, run):
    retrained = world / "retrained"
    save_model(retrained, tiny_world.model(seed=1))  # the same architecture: the same headers
    before = (begun / "metrics.jsonl").read_text()
    code, errors = run(begun, *STEPS, "--config.train.steps=2", f"--config.model.path={retrained}")
    assert code == 2
    assert "holds other weights" in errors
    assert "or use another --workdir" in errors
    (begun / "weights.sha256").write_text("0123456789abcdef\n")  # as if the files had changed since
    code, errors = run(begun, *STEPS, "--config.train.steps=2")
    assert code == 2
    assert "model.path='model' holds other weights" in errors
    assert "than the run began with (0123456789ab, then at 'model')" in errors
    assert "Traceback" not in errors
    assert (begun / "metrics.jsonl").read_text() == before
