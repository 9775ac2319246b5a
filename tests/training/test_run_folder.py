"""What a stop or an error that ends a run leaves behind, and what it is continued with."""

import json
import threading

import jax
import jax.numpy as jnp
import pytest
import tiny_world

from alphagrpo_jax import prompts
from alphagrpo_jax.rewards.workers.pool import PoolError
from alphagrpo_jax.runtime.checkpoint import CheckpointError
from alphagrpo_jax.runtime.stopping import StoppedError
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.training import run_folder
from alphagrpo_jax.training.checks import TrainingError, UnanswerableError
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

    def progress(self, step):
        return self.kept[step][1]

    def state(self, step, template):
        return dict(self.kept[step][0])


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


ERRORS = [TrainingError("x"), UnanswerableError("x"), PoolError("x"), StoppedError()]


@pytest.mark.parametrize("error", ERRORS, ids=type)
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


def loaded(folder, lines: list[dict]) -> dict[str, prompts.TaskData]:
    """Data whose train and held-out sets are these records."""
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompt_set = prompts.load(
        path, tiny_world.tokenizer(), task=TASKS["rt2i"], bucket=24, cache=folder
    )
    return {"rt2i": prompts.TaskData(prompt_set, prompt_set)}


def test_a_run_goes_on_with_mended_questions_and_with_no_other_prompts(tmp_path, capsys):
    lines = [tiny_world.record(f"a red circle {number}") for number in range(3)]
    data, position = loaded(tmp_path, lines), DataPosition({"rt2i": 16}, None)
    arrays, numbers = run_folder.content(state(1.0), 2, position, data)

    def resume(progress: dict, current: list[dict]) -> int:
        saves = Saves()
        saves.save(2, arrays, progress)
        start = DataPosition({"rt2i": 0}, None)
        _, done, restored = run_folder.restore(saves, state(0.0), start, loaded(tmp_path, current))
        assert restored.positions == {"rt2i": 16}
        return done

    mended = json.loads(json.dumps(lines))
    mended[1]["semantic_questions"][0]["question"] = "Is it a horse?"
    mended[1]["semantic_questions"][1]["is_valid"] = False
    mended[2]["caption"] = "a circle"
    old = {name: value for name, value in numbers.items() if run_folder.UNMENDED not in name}
    assert resume(numbers, lines) == resume(old, lines) == 2
    assert capsys.readouterr().err == ""
    assert resume(numbers, mended) == 2
    assert "has other questions, captions or facts than at step 2" in capsys.readouterr().err
    other_prompt = [{**lines[0], "prompt": "a blue circle"}, *lines[1:]]
    for progress, current in (
        (old, mended),  # of an older version
        (numbers, other_prompt),
        (numbers, lines[::-1]),
        (numbers, lines[:2]),
    ):
        with pytest.raises(CheckpointError, match="put the old file back"):
            resume(progress, current)
