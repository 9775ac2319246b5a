"""The run folder: configuration, checkpoints' content, resuming, and the mark of a finished run."""

import contextlib
import copy
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import prompts
from alphagrpo_jax.config import Config
from alphagrpo_jax.config_checks import from_saved
from alphagrpo_jax.models.bagel_weights import weights_digest
from alphagrpo_jax.rewards.workers.pool import PoolError
from alphagrpo_jax.runtime import checkpoint, distributed
from alphagrpo_jax.runtime.errors import InputError, MissingFileError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import METRICS, PENDING, notify, read_rows
from alphagrpo_jax.runtime.paths import model_folder
from alphagrpo_jax.runtime.stopping import StoppedError
from alphagrpo_jax.training.checks import TrainingError
from alphagrpo_jax.types import DataPosition, InitialImageQueue, TrainState

CONFIG_FILE, DONE_FILE, WEIGHTS_FILE = "config.json", "DONE", "weights.sha256"
UNMENDED = ".unmended"  # behind a file's name: digest of what no mend of questions changes


def payload(state: TrainState, position: DataPosition) -> dict[str, Any]:
    """Returns the arrays of a checkpoint: the train state, and the images that wait in queues."""
    key = jax.random.key_data(state.key)
    arrays = {"trainable": state.trainable, "opt_state": state.opt_state, "key": key}
    return arrays if position.queue is None else arrays | {"queue": position.queue.image}


def progress(
    step: int, position: DataPosition, data: Mapping[str, prompts.TaskData]
) -> dict[str, Any]:
    """Returns the numbers of a checkpoint: steps done, position in the data, its digests."""
    queue = {} if position.queue is None else {"queue": position.queue.progress()}
    return {"step": step, "positions": position.positions} | queue | fingerprint(data)


def content(
    state: TrainState, step: int, position: DataPosition, data: Mapping[str, prompts.TaskData]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what a checkpoint holds: arrays, and a JSON object."""
    return payload(state, position), progress(step, position, data)


def fingerprint(data: Mapping[str, prompts.TaskData]) -> dict[str, str]:
    """Returns digests of the prompt files, which a resumed run must find again."""
    digests = {}
    for task, task_data in data.items():
        for split, prompt_set in (("train", task_data.train), ("heldout", task_data.heldout)):
            name = f"data.{split}.{task}"
            digests |= {name: prompt_set.digest, name + UNMENDED: prompt_set.unmended}
    return digests


def restore(
    saves: checkpoint.Checkpoints,
    state: TrainState,
    position: DataPosition,
    data: Mapping[str, prompts.TaskData],
) -> tuple[TrainState, int, DataPosition]:
    """Restores the newest checkpoint; returns the arguments and step 0 if there is none.

    Returns:
      Train state, steps done and position in the data.
    Raises:
      CheckpointError: the prompts are not those of the run, or the checkpoint is damaged.
    """
    latest = saves.latest()
    if latest is None:
        return state, 0, position
    saved = saves.progress(latest)
    _check_data(saved, fingerprint(data))
    arrays = saves.state(latest, payload(state, position))
    queue = position.queue
    if queue is not None:
        queue = InitialImageQueue.restored(np.asarray(arrays.pop("queue")), saved["queue"])
    key = jax.random.wrap_key_data(arrays.pop("key"))
    return TrainState(key=key, **arrays), saved["step"], DataPosition(saved["positions"], queue)


def _check_data(saved: Mapping[str, Any], current: Mapping[str, str]) -> None:
    """Refuses other prompt files than a checkpoint's; notifies of mended questions.

    Raises:
      CheckpointError: more differs than what records are judged by.
    """
    for name, digest in current.items():
        if name.endswith(UNMENDED) or saved.get(name) == digest:
            continue
        # Checkpoints of older versions lack this digest: they take the same file only.
        if saved.get(name + UNMENDED) != current[name + UNMENDED]:
            raise checkpoint.CheckpointError(
                f"the file {name} is not the one that this run was started with (sha256 {digest}, "
                f"expected {saved.get(name)}), and more differs than the fields "
                f"{', '.join(prompts.MENDABLE)}, which may be mended; put the old file back or use "
                "another --workdir"
            )
        notify(
            f"the file {name} has other questions, captions or facts than at step {saved['step']}: "
            "rewards from here on are by the new ones, and compare with earlier ones only so far"
        )


class EmergencyCheckpoint:
    """In-memory snapshot that becomes a checkpoint if a run ends between checkpoints.

    The snapshot's arrays are not copied: an update takes their memory, and from then until the
    next snapshot there is none.
    """

    def __init__(
        self,
        saves: checkpoint.Checkpoints,
        data: Mapping[str, prompts.TaskData],
        log_row: Callable[[int, Mapping[str, Any]], None],
    ) -> None:
        """Starts without a snapshot.

        Args:
          saves: the run's checkpoints.
          data: see `content`.
          log_row: writes a row of the metrics.
        """
        self._saves, self._data, self._log_row = saves, data, log_row
        self._snapshot: _Snapshot | None = None

    def hold(
        self,
        state: TrainState,
        step: int,
        position: DataPosition,
        row: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes a snapshot in place of the one before.

        Args:
          state: not copied.
          step: updates done.
          position: after these updates; copied.
          row: metrics of the last of them, if they wait for their evaluation.
        """
        # The key's numbers are read now: it takes a program, which later would wait for the device.
        arrays, numbers = content(state, step, copy.deepcopy(position), self._data)
        self._snapshot = _Snapshot(step, arrays, numbers, None if row is None else dict(row))

    @contextlib.contextmanager
    def on_error(self) -> Iterator[None]:
        """Saves the snapshot if a stop, or an error of verifiers or of training, ends the block."""
        try:
            yield
        except StoppedError:
            self._save()
            raise
        except (TrainingError, PoolError, jax.errors.JaxRuntimeError) as error:
            # Saving is collective: of several processes, all raise the same TrainingError, but any
            # other is one's own.
            if isinstance(error, TrainingError) or jax.process_count() == 1:
                try:
                    self._save()
                except (checkpoint.CheckpointError, OSError, RuntimeError) as save_error:
                    message = f"the steps since the last checkpoint are lost: {save_error}"
                    notify(message, of_process=True)
            raise

    def rescue(self) -> bool:
        """Saves the snapshot while the run's own thread is busy; called from another thread.

        Returns:
          True if nothing that is finished can be lost any more; False if it cannot be saved at
          this moment: an update has taken the arrays, or other processes would have to take part.
        """
        with self._saves.lock:
            snapshot = self._snapshot
            if snapshot is None or self._is_saved(snapshot):
                return True
            if jax.process_count() > 1:
                return False
            # Numpy's copies: the run's own thread may go on at any moment, and its update would
            # take the arrays while they are being written.
            arrays = _host_copy(snapshot.arrays)
            if arrays is None:
                return False
            self._write(snapshot._replace(arrays=arrays))
            return True

    def _save(self) -> None:
        """Saves the snapshot, if it is new and its arrays are still there."""
        with self._saves.lock:
            snapshot = self._snapshot
            if snapshot is None or self._is_saved(snapshot):
                return
            if not any(leaf.is_deleted() for leaf in _device_arrays(snapshot.arrays)):
                self._write(snapshot)

    def _is_saved(self, snapshot: "_Snapshot") -> bool:
        """Returns whether there is a checkpoint of it, or nothing to be saved."""
        return snapshot.step in (0, self._saves.latest())

    def _write(self, snapshot: "_Snapshot") -> None:
        """Writes the pending row and the checkpoint."""
        if snapshot.row is not None:
            self._log_row(snapshot.step, snapshot.row | {PENDING: 1})
        self._saves.save(snapshot.step, snapshot.arrays, snapshot.progress)


class _Snapshot(NamedTuple):
    """Content of a checkpoint that may have to be written."""

    step: int
    arrays: dict[str, Any]
    progress: dict[str, Any]
    row: dict[str, Any] | None  # waits for its evaluation


def _device_arrays(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _host_copy(tree: Any) -> Any | None:
    """Copies arrays to numpy's; returns None if an update has taken one of them."""
    try:
        return jax.tree.map(np.array, tree)
    except RuntimeError:
        if any(leaf.is_deleted() for leaf in _device_arrays(tree)):
            return None
        raise


def check_folder(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a folder that holds a run of another configuration; notifies of small differences.

    Raises:
      ConfigError: fields that may not change differ, or the weights.
      MissingFileError, WeightsError: weights that cannot be read.
    """
    path, weights_path = workdir / CONFIG_FILE, workdir / WEIGHTS_FILE
    if not path.exists() or not holds_run(workdir):
        return
    weights = saved_weights = ""
    if weights_path.exists():
        saved_weights = weights_path.read_text(encoding="utf-8").strip()
        weights = weights_digest(model_folder(config.model.path))
    notice = config_lib.check_resumable(
        config, _read_json(path), weights=weights, saved_weights=saved_weights
    )
    if notice:
        notify(notice)


def holds_run(workdir: pathlib.Path) -> bool:
    """Returns True if the folder holds anything of a run, so that it can only be continued."""
    checkpoints = (workdir / checkpoint.FOLDER).glob("[0-9]*")
    return bool(read_rows(workdir / METRICS)) or any(checkpoints)


def is_finished(workdir: pathlib.Path) -> bool:
    """Returns True if the run in this folder came to its end."""
    return (workdir / DONE_FILE).exists()


def mark_running(workdir: pathlib.Path, config: Config, weights: str) -> None:
    """Writes the configuration and the weights' digest; removes the mark of an earlier end."""
    if distributed.is_primary():
        (workdir / DONE_FILE).unlink(missing_ok=True)
        replace_text(workdir / WEIGHTS_FILE, f"{weights}\n")
        replace_text(workdir / CONFIG_FILE, config_lib.to_json(config))


def mark_finished(workdir: pathlib.Path, done: int) -> None:
    """Writes the file that marks a finished run."""
    if distributed.is_primary():
        replace_text(workdir / DONE_FILE, f"{done}\n")


def run_config(folder: str | pathlib.Path) -> Config:
    """Reads the configuration of a run that has checkpoints.

    Raises:
      FileNotFoundError: the folder is not a run's, or has no checkpoint yet.
    """
    path = pathlib.Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(f"{folder} is not a run's folder: it has no {CONFIG_FILE}")
    if not (path.parent / checkpoint.FOLDER).is_dir():
        raise MissingFileError(f"the run in {folder} has no checkpoints yet")
    return from_saved(_read_json(path))


def newest_arrays(
    folder: str | pathlib.Path, config: Config, like: Any
) -> tuple[dict[str, Any], int]:
    """Reads the newest checkpoint of a run; returns its arrays, and the updates done.

    Args:
      folder: of the run.
      config: the run's.
      like: see `Checkpoints.state`.
    Raises:
      MissingFileError: there is no checkpoint.
      CheckpointError: it cannot be read.
    """
    saves = checkpoint.Checkpoints(folder, keep=config.checkpoint.keep)
    step = saves.latest()
    if step is None:
        raise MissingFileError(f"the run in {folder} has no complete checkpoint yet")
    arrays = saves.state(step, like)
    saves.close()
    return arrays, step


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise InputError(
            f"{path} is damaged ({error}); put it back as the run wrote it, or use another folder"
        ) from error
