"""The machines that a run is planned for: their chips, and devices that a compiler accepts."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from alphagrpo_jax.planning import chips
from alphagrpo_jax.planning.chips import CHIPS, GPUS_PER_MACHINE, Chip
from alphagrpo_jax.runtime.chips import peak_of
from alphagrpo_jax.runtime.errors import UsageError

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for, and the chip that they are or stand for."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    slices: tuple[int, ...]  # of every device: parts that are joined by the slow network
    exact: bool  # the chip's own compiler; False: another one stands in
    compiler: str  # with its version, a part of the cache's key


def prepare_platform(*, tpu: bool, stand_ins: int = 1) -> None:
    """Chooses JAX's platform before it looks for devices; call it first.

    A TPU is never looked for, though its compiler may be installed: planning needs none.

    Args:
      tpu: whether a TPU topology is planned for.
      stand_ins: number of CPU devices, one for each GPU.
    """
    # The metadata of a TPU machine would be asked for, and a lock file be waited for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    cuda = not tpu and any(importlib.util.find_spec(name) for name in CUDA_PLUGINS)
    with contextlib.suppress(RuntimeError):  # JAX has started already, as in tests
        jax.config.update("jax_platforms", "cuda,cpu" if cuda else "cpu")
        jax.config.update("jax_num_cpu_devices", stand_ins)


def tpu_target(topology: str, slices: int) -> Target:
    """Returns a TPU topology, such as v5p:4x4x4, several of which may be joined.

    Raises:
      UsageError: an unknown chip or topology, or no TPU compiler.
    """
    expected = "expected e.g. v5p:4x4x4 or v6e:8x8"
    match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", topology)
    if match is None:
        raise UsageError(f"--topology: got {topology!r}, {expected}")
    chip = _chip(match[1], "tpu", "--topology")
    sizes = [int(size) for size in match[2].split("x")]
    if len(sizes) != chip.axes or min(sizes) < 1:
        raise UsageError(
            f"--topology: got {topology!r}, but {chip.name} has {chip.axes} axes; {expected}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "--topology: the TPU compiler is not installed; pip install -c constraints.txt "
            "'.[plan]' brings libtpu (no TPU is needed)"
        )
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        description = topologies.get_topology_desc(topology, platform="tpu", **options)
    except Exception as error:  # libtpu has no class of its own for this
        raise UsageError(
            f"--topology: the TPU compiler knows no {topology} ({_first_line(error)}); sizes are "
            "those of slices that can be rented, e.g. v5p:2x2x1, v5p:4x4x4, v6e:4x4, v6e:8x8"
        ) from error
    devices = tuple(description.devices)
    if len(devices) != math.prod(sizes) * slices:
        raise UsageError(
            f"--topology: {topology} has {len(devices)} devices instead of one per chip; take "
            "another one"
        )
    name = topology if slices == 1 else f"{slices} slices of {topology}"
    return Target(
        name,
        chip,
        devices,
        tuple(getattr(device, "slice_index", 0) or 0 for device in devices),
        exact=True,
        compiler=f"libtpu {importlib.metadata.version('libtpu')}",
    )


def split_chips(words: str) -> tuple[str, int]:
    """Splits NAME:NUMBER.

    Raises:
      UsageError: it is something else.
    """
    match = re.fullmatch(r"([\w-]+):([1-9]\d{0,4})", words)
    if match is None:
        raise UsageError(
            f"--chips: got {words!r}, expected NAME:NUMBER, e.g. h200:8 or a100-80g:56"
        )
    return match[1], int(match[2])


def gpu_target(words: str) -> Target:
    """Returns a number of GPUs, such as h200:8: by their compiler where JAX sees one.

    Raises:
      UsageError: an unknown chip, or no number.
    """
    name, count = split_chips(words)
    chip = _chip(name, "gpu", "--chips")
    machines = tuple(index // GPUS_PER_MACHINE for index in range(count))
    devices = _gpu_devices(count)
    # Another kind of card has another compiler's choices: its numbers would not be exact.
    if devices and peak_of(devices[0].device_kind) == peak_of(chip.kind):
        kind = devices[0].device_kind
        return Target(words, chip, devices, machines, exact=True, compiler=f"XLA for {kind}")
    devices = tuple(_cpu_devices(count))
    return Target(words, chip, devices, machines, exact=False, compiler="XLA for CPUs")


def _gpu_devices(count: int) -> tuple[Any, ...]:
    """Returns descriptions of so many GPUs like the local one; none where JAX sees none."""
    try:
        local = jax.devices("gpu")
    except RuntimeError:
        return ()
    if len(local) >= count:
        return tuple(local[:count])
    try:
        machine = min(count, GPUS_PER_MACHINE)
        topology = f"1x{-(-count // machine)}x{machine}"  # slices, machines, GPUs
        description = topologies.get_topology_desc("", platform="cuda", topology=topology)
    except Exception:  # a plugin that compiles for what is there alone
        return ()
    return tuple(description.devices[:count]) if len(description.devices) >= count else ()


def _cpu_devices(count: int) -> list[Any]:
    """Returns so many CPU devices to stand in."""
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(
            f"--chips: {count} devices are needed, but JAX has started with {len(devices)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _chip(name: str, platform: str, flag: str) -> Chip:
    chip = CHIPS.get(name)
    if chip is None or chip.platform != platform:
        right_flag = "--chips" if platform == "tpu" else "--topology"
        hint = f"; {name} belongs to {right_flag}" if chip else ""
        raise UsageError(f"{flag}: unknown chip {name!r}, known: {chips.names(platform)}{hint}")
    return chip


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
