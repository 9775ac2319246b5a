"""Saving, restoring, digests, and the checks at the start of a run."""

import json
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alphagrpo_jax.runtime import checkpoint
from alphagrpo_jax.runtime.checkpoint import CheckpointError, Checkpoints


def state(value=1.0):
    trainable = {"layer": {"a": jnp.full((2, 3), value), "b": jnp.arange(4.0)}}
    return {
        "trainable": trainable,
        "opt_state": optax.adamw(1e-3).init(trainable),
        "key": jax.random.key_data(jax.random.key(3)),
    }


def test_a_checkpoint_gives_back_every_array_and_the_place(tmp_path):
    saves = Checkpoints(tmp_path, keep=2)
    assert saves.latest() is None
    saves.save(4, state(), {"step": 4, "position": 32})
    reopened = Checkpoints(tmp_path, keep=2)
    assert reopened.latest() == 4
    assert reopened.progress(4) == {"step": 4, "position": 32}
    restored = reopened.state(4, state(0.0))
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state()), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_old_checkpoints_go(tmp_path):
    saves = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        saves.save(step, state(), {"step": step})
    names = {path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert names == {"2", "3"}


def test_another_structure_is_an_explained_error(tmp_path):
    saves = Checkpoints(tmp_path, keep=1)
    saves.save(1, state(), {"step": 1})
    with pytest.raises(CheckpointError, match="checkpoint 1 cannot be restored"):
        saves.state(1, {"trainable": {"else": jnp.zeros(7)}})


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Error writing 'a/0'"), CheckpointError),
        (OSError(28, "No space left on device"), CheckpointError),
        (ValueError("operands could not be broadcast"), ValueError),
    ],
    ids=["tensorstore", "full disk", "bug"],
)
def test_a_failed_write_is_explained_and_a_bug_is_not(tmp_path, monkeypatch, error, raised):
    def save(*_, **__):
        raise error

    saves = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(saves._manager, "save", save)
    with pytest.raises(raised) as caught:
        saves.save(1, state(), {"step": 1})
    assert type(caught.value) is raised


def test_digest_sees_every_part_and_not_the_order(tmp_path):
    progress = {"step": 1, "position": 8}
    base = checkpoint.digest(state(), progress)
    reverse = dict(reversed(state().items())), dict(reversed(progress.items()))
    assert base == checkpoint.digest(*reverse)
    assert base != checkpoint.digest(state(1.0 + 1e-7), progress)
    assert base != checkpoint.digest(state(), progress | {"position": 9})
    assert len(base) == 64


def test_a_folder_that_cannot_be_made_is_an_explained_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.check_writable(tmp_path / "file" / "run", state_bytes=0)


def test_too_little_room_is_an_explained_error(tmp_path):
    with pytest.raises(CheckpointError, match="MB free"):
        checkpoint.check_writable(tmp_path, state_bytes=1 << 60)
    checkpoint.check_writable(tmp_path, state_bytes=10)
    assert list(tmp_path.iterdir()) == []


def large_state(value=1.0):
    return {"trainable": {"layer": {"a": jnp.full((1 << 20,), value)}}}


def test_a_save_that_does_not_wait_keeps_its_content_while_an_update_takes_the_memory(tmp_path):
    saves, arrays = Checkpoints(tmp_path, keep=1), large_state()
    digest = checkpoint.digest(arrays, {"step": 1})
    saves.save(1, arrays, {"step": 1}, wait=False)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    updated = jax.block_until_ready(update(arrays))
    saves.wait()
    restored = Checkpoints(tmp_path, keep=1).state(1, updated)
    assert checkpoint.digest(restored, {"step": 1}) == digest
    assert checkpoint.digest(updated, {"step": 1}) != digest


def test_a_save_that_does_not_wait_has_the_place_of_its_step(tmp_path, monkeypatch):
    saves, moved = Checkpoints(tmp_path, keep=1), threading.Event()
    dumps = json.dumps

    def late(*args, **options):  # as on a slow disk: the text is made once the run has gone on
        if threading.current_thread() is not threading.main_thread():
            moved.wait(60)
        return dumps(*args, **options)

    progress = {"positions": {"rt2i": 3}}
    monkeypatch.setattr(json, "dumps", late)
    saves.save(1, state(), progress, wait=False)
    progress["positions"]["rt2i"] = 4
    moved.set()
    saves.wait()
    assert saves.progress(1) == {"positions": {"rt2i": 3}}


@pytest.fixture
def failing_saves(tmp_path, monkeypatch):
    """Checkpoints whose newest save, of step 2, has failed in the background."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    saves = Checkpoints(tmp_path, keep=2)
    saves.save(1, state(), {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(saves._manager, "_finalize_checkpoint", fail)
        saves.save(2, state(), {"step": 2}, wait=False)
        while saves._manager.is_saving_in_progress():
            time.sleep(0.01)
    return saves


@pytest.mark.parametrize("tell", ["check", "wait", "latest", "close"])
def test_a_save_that_failed_in_the_background_is_told_once(failing_saves, tell):
    with pytest.raises(CheckpointError, match="step 2: the checkpoint could not be written"):
        getattr(failing_saves, tell)()
    failing_saves.check()
    assert failing_saves.latest() == 1


def test_the_next_save_tells_of_the_failed_one_before(failing_saves):
    with pytest.raises(CheckpointError, match="step 2: the checkpoint could not be written"):
        failing_saves.save(3, state(), {"step": 3}, wait=False)


def test_looking_for_failures_does_not_wait(tmp_path, monkeypatch):
    saves, finish = Checkpoints(tmp_path, keep=1), threading.Event()
    finalize = saves._manager._finalize_checkpoint
    monkeypatch.setattr(
        saves._manager, "_finalize_checkpoint", lambda step: (finish.wait(60), finalize(step))
    )
    saves.save(1, state(), {"step": 1}, wait=False)
    saves.check()
    assert not finish.is_set()
    finish.set()
    assert saves.latest() == 1


KILLED_IN_A_SAVE = """
import os, signal, sys
import jax.numpy as jnp
from alphagrpo_jax.runtime.checkpoint import Checkpoints

saves = Checkpoints(sys.argv[1], keep=2)
for step in (1, 2):
    saves.save(step, {"a": jnp.full((1 << 24,), float(step))}, {"step": step}, wait=step == 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_a_whole_checkpoint(run_python, tmp_path):
    result = run_python("-c", KILLED_IN_A_SAVE, str(tmp_path))
    assert result.returncode == -signal.SIGKILL, result.stderr
    saves = Checkpoints(tmp_path, keep=2)
    step = saves.latest()
    assert step in (1, 2)  # by how far the second save had come
    assert saves.progress(step) == {"step": step}
    restored = saves.state(step, {"a": jnp.zeros((1 << 24,))})["a"]
    assert (np.asarray(restored) == step).all()
    saves.save(3, {"a": jnp.full((1 << 24,), 3.0)}, {"step": 3})
    assert saves.latest() == 3
