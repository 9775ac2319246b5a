"""What a run's folder says about the run: its configuration, place, and whether it is done."""

import json
import pathlib
from typing import Any

import jax

from alphagrpo_jax import build
from alphagrpo_jax import config as config_lib
from alphagrpo_jax.config import Config
from alphagrpo_jax.runtime import checkpoint, distributed
from alphagrpo_jax.runtime.metrics import replace_text
from alphagrpo_jax.types import TrainState

CONFIG_FILE, DONE_FILE = "config.json", "DONE"


def payload(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of the train state, as plain arrays."""
    key = jax.random.key_data(state.key)
    return {"trainable": state.trainable, "opt_state": state.opt_state, "key": key}


def fingerprint(data: build.Data) -> dict[str, str]:
    """The contents of the prompt files, which a resumed run must find again."""
    return {"data.train": data.train.digest, "data.heldout": data.heldout.digest}


def restore(
    saves: checkpoint.Checkpoints, state: TrainState, data: build.Data
) -> tuple[TrainState, int, int]:
    """The newest checkpoint's state, steps done and place in the data; the given state if none.

    Raises:
      CheckpointError: the prompts are not those of the run, or the checkpoint is damaged.
    """
    latest = saves.latest()
    if latest is None:
        return state, 0, 0
    progress = saves.progress(latest)
    for name, value in fingerprint(data).items():
        if progress.get(name) != value:
            raise checkpoint.CheckpointError(
                f"the file {name} is not the one that this run was started with (sha256 {value}, "
                f"expected {progress.get(name)}); put the old file back or use another --workdir"
            )
    arrays = saves.state(latest, payload(state))
    key = jax.random.wrap_key_data(arrays.pop("key"))
    return TrainState(key=key, **arrays), progress["step"], progress["position"]


def check_folder(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a folder that holds a run of another configuration.

    Raises:
      ConfigError: fields that may not change differ.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        config_lib.check_resumable(config, json.loads(path.read_text()))


def exists(workdir: pathlib.Path) -> bool:
    """Whether the folder holds a run."""
    return (workdir / CONFIG_FILE).exists()


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
