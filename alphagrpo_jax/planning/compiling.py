"""Compiles a stage, and reads from the compiler what it needs; results are cached."""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from alphagrpo_jax.planning import hlo
from alphagrpo_jax.planning.flops import count_flops
from alphagrpo_jax.planning.model import device_bytes
from alphagrpo_jax.planning.stages import PlanStage
from alphagrpo_jax.planning.targets import Target
from alphagrpo_jax.runtime.device_memory import needed_bytes
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replace_text

FORMAT = 2  # of cached results: raise it when what is read from a compiler changes


@dataclasses.dataclass
class Compiled:
    """Holds what the compiler says of a function; bytes are those of one device and one call."""

    argument_bytes: float  # of the arguments that the function uses, with padding
    parameter_bytes: float  # the same without padding
    output_bytes: float
    temporary_bytes: float
    alias_bytes: float  # of outputs that lie in arguments' memory
    memory_traffic: float  # bytes read from and written to the large memory
    collectives: dict[str, list[float]]  # kind -> number, bytes sent
    network_bytes: float  # of collectives between slices
    step_memory_traffic: float  # the same for one step of a loop of unknown length
    step_collectives: dict[str, list[float]]
    compile_seconds: float
    flops: float = 0.0  # of matrix products, per device
    cached: bool = False
    too_large: float = 0.0  # bytes that the function alone needs where the compiler refused it

    @property
    def collective_bytes(self) -> float:
        """Bytes that a device sends in one call."""
        return sum(size for _, size in self.collectives.values())

    @property
    def step_collective_bytes(self) -> float:
        """Bytes that a device sends in one step of a loop of unknown length."""
        return sum(size for _, size in self.step_collectives.values())


def default_cache() -> pathlib.Path:
    """Returns the user's cache folder of compiled stages."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser() / "alphagrpo_jax" / "plan"


def compile_stage(
    stage: PlanStage, target: Target, cache: pathlib.Path, say: Callable[[str], None]
) -> Compiled:
    """Compiles a stage for a target, unless the cache knows the same program.

    The key is the program itself, as it is handed to the compiler, beside the devices' order and
    the versions of JAX and the compiler: source, configuration and topology change it, or they do
    not matter.

    Args:
      stage: with placed shapes as its arguments.
      target: whose compiler is used.
      cache: a folder, made if need be.
      say: is told what happens, in words.

    Returns:
      What the stage needs; `too_large` is set where the compiler refused it for its memory.

    Raises:
      InputError: the compiler refused it for another reason.
    """
    traced = stage.function.trace(*stage.arguments)
    flops = count_flops(traced.jaxpr, while_steps=stage.while_steps) / len(target.devices)
    lowered = traced.lower()
    path = cache / f"{_key(lowered.as_text(), stage, target)}.json"
    if (known := _read(path)) is not None:
        return dataclasses.replace(known, flops=flops, cached=True)
    say(f"compiling {stage.part}: {stage.name} ...")
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := needed_bytes(str(error))) is None:
            raise InputError(
                f"{stage.name}: {target.compiler} does not compile this function for "
                f"{target.name}: {str(error).strip()[:500]}"
            ) from error
        result = _too_large(needed, stage)
    else:
        result = _read_compiled(compiled, stage, target)
    result.compile_seconds = time.monotonic() - start
    cache.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(dataclasses.asdict(result)) + "\n")
    return dataclasses.replace(result, flops=flops)


def stand_in(compiled: Compiled, in_float32: Compiled, stage: PlanStage) -> Compiled:
    """Puts an estimate together from what a CPU's compiler says of a function.

    Where a function computes in bfloat16, this compiler copies whole stacks of weights to float32,
    which no GPU does. The same function in float32 has no copies, and temporaries that are at most
    as large in bfloat16: the smaller of the two bounds them from above. Memory traffic is the least
    that there can be: arguments and results once per call, arguments once more with every token.

    Args:
      compiled: of the function.
      in_float32: of the same function with weights and contexts in float32.
      stage: the function's.
    """
    arguments = compiled.parameter_bytes
    return dataclasses.replace(
        compiled,
        temporary_bytes=min(compiled.temporary_bytes, in_float32.temporary_bytes),
        memory_traffic=stage.while_steps * arguments + compiled.output_bytes,
        step_memory_traffic=arguments if stage.while_steps > 1 else 0.0,
    )


def _key(program: str, stage: PlanStage, target: Target) -> str:
    """Returns the name of a program's entry in the cache."""
    devices = [getattr(device, "id", 0) for device in _mesh_devices(stage, target)]
    machine = target.name if target.exact else ""  # a CPU stands in for every chip alike
    parts = (
        str(FORMAT), jax.__version__, target.compiler, machine, repr(devices),
        str(stage.while_steps), program,
    )  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _mesh_devices(stage: PlanStage, target: Target) -> list[Any]:
    """Returns the devices in the order in which the stage's arguments lie on them."""
    for leaf in jax.tree.leaves(stage.arguments):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if mesh is not None:
            return list(mesh.devices.flat)
    return list(target.devices)


def _read(path: pathlib.Path) -> Compiled | None:
    """Reads a cached result; None where there is none, or half of one."""
    try:
        return Compiled(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _read_compiled(compiled: Any, stage: PlanStage, target: Target) -> Compiled:
    """Reads sizes and traffic from a compiled function."""
    memory = compiled.memory_analysis()
    slice_of = {device: part for device, part in zip(target.devices, target.slices, strict=True)}
    slices = [slice_of[device] for device in _mesh_devices(stage, target)]
    module = hlo.Module(compiled.as_text(), slices)
    traffic, step = module.traffic(while_steps=stage.while_steps), module.per_step()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        parameter_bytes=module.parameter_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        memory_traffic=traffic.memory,
        collectives=traffic.collectives,
        network_bytes=traffic.network,
        step_memory_traffic=step.memory,
        step_collectives=step.collectives,
        compile_seconds=0.0,
    )


def _too_large(needed: float, stage: PlanStage) -> Compiled:
    """Returns the result of a function that the compiler refused for its memory.

    The compiler's sum has the arguments in it: what is above them counts as temporaries.
    """
    arguments = device_bytes(stage.arguments)
    temporaries = max(0.0, needed - arguments)
    sizes = (arguments, arguments, 0.0, temporaries, 0.0)
    return Compiled(*sizes, 0.0, {}, 0.0, 0.0, {}, 0.0, too_large=needed)
