"""What a run's folder says about the run: its configuration, place, and whether it is done."""

import contextlib
import copy
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import prompts
from alphagrpo_jax.config import Config
from alphagrpo_jax.config_checks import from_saved
from alphagrpo_jax.rewards.workers.pool import PoolError
from alphagrpo_jax.runtime import checkpoint, distributed
from alphagrpo_jax.runtime.errors import InputError, MissingFileError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import METRICS, PENDING, read_rows
from alphagrpo_jax.training.checks import TrainingError
from alphagrpo_jax.types import DataPosition, InitialImageQueue, TrainState

CONFIG_FILE, DONE_FILE = "config.json", "DONE"


def payload(state: TrainState, place: DataPosition) -> dict[str, Any]:
    """The arrays of a checkpoint: the train state, and the images that wait in queues."""
    key = jax.random.key_data(state.key)
    arrays = {"trainable": state.trainable, "opt_state": state.opt_state, "key": key}
    return arrays if place.queue is None else arrays | {"queue": place.queue.image}


def progress(
    step: int, place: DataPosition, data: Mapping[str, prompts.TaskData]
) -> dict[str, Any]:
    """The numbers of a checkpoint: steps done, the place in the data, and what data it is."""
    queue = {} if place.queue is None else {"queue": place.queue.progress()}
    return {"step": step, "positions": place.positions} | queue | fingerprint(data)


def content(
    state: TrainState, step: int, place: DataPosition, data: Mapping[str, prompts.TaskData]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds: arrays, and a JSON object."""
    return payload(state, place), progress(step, place, data)


def fingerprint(data: Mapping[str, prompts.TaskData]) -> dict[str, str]:
    """The contents of the prompt files, which a resumed run must find again."""
    return {
        f"data.{part}.{task}": one.digest
        for task, both in data.items()
        for part, one in (("train", both.train), ("heldout", both.heldout))
    }


def restore(
    saves: checkpoint.Checkpoints,
    state: TrainState,
    place: DataPosition,
    data: Mapping[str, prompts.TaskData],
) -> tuple[TrainState, int, DataPosition]:
    """The newest checkpoint's state, steps done and place in the data; what is given if none.

    Raises:
      CheckpointError: the prompts are not those of the run, or the checkpoint is damaged.
    """
    latest = saves.latest()
    if latest is None:
        return state, 0, place
    saved = saves.progress(latest)
    for name, value in fingerprint(data).items():
        if saved.get(name) != value:
            raise checkpoint.CheckpointError(
                f"the file {name} is not the one that this run was started with (sha256 {value}, "
                f"expected {saved.get(name)}); put the old file back or use another --workdir"
            )
    arrays = saves.state(latest, payload(state, place))
    queue = place.queue
    if queue is not None:
        queue = InitialImageQueue.restored(np.asarray(arrays.pop("queue")), saved["queue"])
    key = jax.random.wrap_key_data(arrays.pop("key"))
    return TrainState(key=key, **arrays), saved["step"], DataPosition(saved["positions"], queue)


class EmergencyCheckpoint:
    """The newest point that a run can go on from, for an error that ends it between checkpoints."""

    def __init__(self) -> None:
        self._held: tuple[TrainState, int, DataPosition, dict[str, Any] | None] | None = None

    def hold(
        self,
        state: TrainState,
        done: int,
        place: DataPosition,
        row: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes a point, in place of the one before.

        Args:
          state: not copied; see `drop`.
          done: steps done.
          place: behind these steps; copied.
          row: of the last of them, if it waits for its evaluation.
        """
        self._held = (state, done, copy.deepcopy(place), None if row is None else dict(row))

    def drop(self) -> None:
        """Lets the point go, before its state's memory is given to an update."""
        self._held = None

    def save(
        self,
        saves: checkpoint.Checkpoints,
        data: Mapping[str, prompts.TaskData],
        record: Callable[[int, Mapping[str, Any]], None],
    ) -> None:
        """Writes the row that waits, marked so, and the checkpoint, where there is anything new."""
        if self._held is None or self._held[1] in (0, saves.latest()):
            return
        state, done, place, row = self._held
        if row is not None:
            record(done, row | {PENDING: 1})
        saves.save(done, *content(state, done, place, data))


@contextlib.contextmanager
def saved_on_error(
    saves: checkpoint.Checkpoints,
    data: Mapping[str, prompts.TaskData],
    record: Callable[[int, Mapping[str, Any]], None],
) -> Iterator[EmergencyCheckpoint]:
    """Where a run's updates happen: an error in there costs none that is done.

    Args:
      saves: the run's checkpoints.
      data: see `content`.
      record: writes a row of the metrics.
    """
    kept = EmergencyCheckpoint()
    try:
        yield kept
    except (TrainingError, PoolError) as error:
        # Of several processes, all raise the same TrainingError, but a PoolError is one's own.
        if isinstance(error, TrainingError) or jax.process_count() == 1:
            try:
                kept.save(saves, data, record)
            except (checkpoint.CheckpointError, OSError) as second:
                print(f"the steps since the last checkpoint are lost: {second}", file=sys.stderr)
        raise


def check_folder(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a folder that holds a run of another configuration.

    Raises:
      ConfigError: fields that may not change differ.
    """
    path = workdir / CONFIG_FILE
    if path.exists() and holds_run(workdir):
        config_lib.check_resumable(config, _read_json(path))


def holds_run(workdir: pathlib.Path) -> bool:
    """Whether anything of a run is in the folder, so that it can only be continued."""
    saved = (workdir / checkpoint.FOLDER).glob("[0-9]*")
    return bool(read_rows(workdir / METRICS)) or any(saved)


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether the run in this folder came to its end."""
    return (workdir / DONE_FILE).exists()


def mark_running(workdir: pathlib.Path, config: Config) -> None:
    """Writes the configuration, and takes back an earlier end."""
    if distributed.is_primary():
        (workdir / DONE_FILE).unlink(missing_ok=True)
        replace_text(workdir / CONFIG_FILE, config_lib.to_json(config))


def mark_finished(workdir: pathlib.Path, done: int) -> None:
    """Leaves the file that marks a finished run."""
    if distributed.is_primary():
        replace_text(workdir / DONE_FILE, f"{done}\n")


def run_config(folder: str | pathlib.Path) -> Config:
    """The configuration of a run that has checkpoints.

    Raises:
      FileNotFoundError: the folder is not a run's, or has no checkpoint yet.
    """
    path = pathlib.Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(f"{folder} is not a run's folder: it has no {CONFIG_FILE}")
    if not (path.parent / checkpoint.FOLDER).is_dir():
        raise MissingFileError(f"the run in {folder} has no checkpoints yet")
    return from_saved(_read_json(path))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise InputError(
            f"{path} is damaged ({error}); put it back as the run wrote it, or use another folder"
        ) from error
