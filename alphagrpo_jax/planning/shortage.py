"""Explains that a run's devices have too little memory, with the plan command of this very run."""

import dataclasses
import math
import pathlib
import shlex
import traceback
from collections.abc import Sequence
from typing import Any

import jax

from alphagrpo_jax import config_checks
from alphagrpo_jax.config import Config
from alphagrpo_jax.planning.chips import CHIPS, GIB, Chip
from alphagrpo_jax.runtime.chips import peak_of
from alphagrpo_jax.runtime.device_memory import needed_bytes
from alphagrpo_jax.runtime.errors import UserError

# Module of a run's stage -> its name for users; of an error's frames the first that is one counts.
STAGES = {
    "alphagrpo_jax.training.setup": "loading",
    "alphagrpo_jax.evaluation.heldout": "evaluation",
    "alphagrpo_jax.initial_images": "initial images",
    "alphagrpo_jax.rollout": "rollout",
    "alphagrpo_jax.reward": "reward",
    "alphagrpo_jax.update": "update",
}


class DeviceMemoryError(UserError):
    """The devices have too little memory for a stage of the run."""


def explain(
    error: BaseException, config: Config, config_file: str | pathlib.Path
) -> DeviceMemoryError:
    """Names the stage that a shortage of memory has ended, and the command that plans the run.

    Args:
      error: see `device_memory.is_shortage`.
      config: the run's, with the mesh as the user gave it.
      config_file: where its unchanged fields stand.
    """
    devices = jax.devices()
    needed = needed_bytes(str(error))
    amount = f"{needed / GIB:.1f} GiB" if needed and math.isfinite(needed) else "more"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
    return DeviceMemoryError(
        f"too little memory: the stage {stage_of(error)} needs {amount} on a device of the "
        f"{len(devices)} ({devices[0].device_kind}): {reason[:200]}; this command says what every "
        "stage needs and which fields to change so that it fits: "
        + plan_command(config, config_file, devices)
    )


def stage_of(error: BaseException) -> str:
    """Returns the stage of a run in which an error was raised, with the function in brackets."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if name := STAGES.get(frame.f_globals.get("__name__", "")):
            return f"{name} ({frame.f_code.co_name})"
    return "start"


def plan_command(config: Config, config_file: str | pathlib.Path, devices: Sequence[Any]) -> str:
    """Writes the plan command of a run on its devices, as a shell takes it."""
    fields = _changes(config, config_checks.read_config(config_file))
    changes = [f"--config.{key}={value}" for key, value in fields.items()]
    words = ["python", "-m", "alphagrpo_jax.plan", f"--config={config_file}", *changes]
    return shlex.join([*words, *machine_flags(devices)])


def _changes(config: Config, base: Config) -> dict[str, str]:
    """Returns the fields that differ from those of the configuration's file, as flags take them."""
    now, then = (config_checks.flatten(dataclasses.asdict(fields)) for fields in (config, base))
    return {key: str(value) for key, value in sorted(now.items()) if value != then[key]}


def machine_flags(devices: Sequence[Any]) -> list[str]:
    """Returns the flags that name these devices; with NAME where they are not known."""
    chip = _chip_of(devices[0])
    if chip is None or chip.platform == "gpu":
        return [f"--chips={chip.name if chip else 'NAME'}:{len(devices)}"]
    slices = {getattr(device, "slice_index", 0) for device in devices}
    coordinates = [device.coords for device in devices]
    sides = [max(along) - min(along) + 1 for along in zip(*coordinates, strict=True)]
    flags = [f"--topology={chip.name}:{'x'.join(map(str, sides[: chip.axes]))}"]
    return flags + ([f"--slices={len(slices)}"] if len(slices) > 1 else [])


def _chip_of(device: Any) -> Chip | None:
    """Returns the planned chip of a device, None if there is none."""
    peak = peak_of(device.device_kind)
    rates = None if peak is None else (peak.flops, peak.memory_rate)
    return next((chip for chip in CHIPS.values() if (chip.flops, chip.memory_rate) == rates), None)
