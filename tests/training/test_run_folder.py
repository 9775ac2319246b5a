"""What a stop or an error that ends a run leaves behind."""

import threading

import jax
import jax.numpy as jnp
import pytest

from alphagrpo_jax.rewards.workers.pool import PoolError
from alphagrpo_jax.runtime.checkpoint import CheckpointError
from alphagrpo_jax.runtime.stopping import StoppedError
from alphagrpo_jax.training import run_folder
from alphagrpo_jax.training.checks import TrainingError
from alphagrpo_jax.types import DataPosition, TrainState


class Saves:
    """Checkpoints in memory."""

    def __init__(self, *, full: bool = False) -> None:
        self.kept, self.full, self.lock = {}, full, threading.RLock()

    def latest(self) -> int | None:
        return max(self.kept, default=None)

    def save(self, step, state, progress) -> None:
        if self.full:
            raise CheckpointError("the disk is full")
        self.kept[step] = (state, progress)


def state(value: float) -> TrainState:
    return TrainState({"a": jnp.full(2, value)}, (), jax.random.key(0))


def stopped_by(error: Exception, saves: Saves, act) -> dict[int, dict]:
    """The rows that are written when `act(emergency)` is followed by an error."""
    rows = {}

    def run() -> None:
        emergency = run_folder.EmergencyCheckpoint(saves, {}, rows.__setitem__)
        with emergency.on_error():
            act(emergency)
            raise error

    with pytest.raises(type(error)):
        run()
    return rows


@pytest.mark.parametrize("error", [TrainingError("x"), PoolError("x"), StoppedError()], ids=type)
def test_the_newest_point_is_saved_with_its_place(error):
    saves, position = Saves(), DataPosition({"rt2i": 16}, None)

    def act(emergency):
        emergency.hold(state(1.0), 2, position)
        position.positions["rt2i"] += 8  # the step that fails has taken its prompts

    assert stopped_by(error, saves, act) == {}
    arrays, progress = saves.kept[2]
    assert arrays["trainable"]["a"].tolist() == [1.0, 1.0]
    assert progress["positions"] == {"rt2i": 16}


def test_a_row_waits_for_its_evaluation():
    saves, row = Saves(), {"loss/total": 0.5}
    rows = stopped_by(
        TrainingError("x"),
        saves,
        lambda emergency: emergency.hold(state(1.0), 3, DataPosition({}, None), row),
    )
    assert rows == {3: {"loss/total": 0.5, "eval/pending": 1}}
    assert list(saves.kept) == [3]


def test_nothing_is_saved_where_nothing_can_be():
    position = DataPosition({}, None)

    def in_the_update(emergency):
        snapshot = state(1.0)
        emergency.hold(snapshot, 2, position)
        snapshot.trainable["a"].delete()

    for error, act in (
        (TrainingError("x"), in_the_update),  # its memory is given away
        (
            TrainingError("x"),
            lambda emergency: emergency.hold(state(1.0), 0, position),
        ),  # nothing done yet
        (RuntimeError("a defect"), lambda emergency: emergency.hold(state(1.0), 2, position)),
    ):
        saves = Saves()
        assert stopped_by(error, saves, act) == {}
        assert saves.kept == {}


def test_a_full_disk_does_not_hide_the_error(capsys):
    saves = Saves(full=True)
    stopped_by(
        TrainingError("x"),
        saves,
        lambda emergency: emergency.hold(state(1.0), 2, DataPosition({}, None)),
    )
    assert "since the last checkpoint are lost: the disk is full" in capsys.readouterr().err
