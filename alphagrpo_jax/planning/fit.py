"""Adds up what a stage needs on a chip, how long it takes at least, and what to change."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.planning.chips import Chip
from alphagrpo_jax.planning.compiling import Compiled
from alphagrpo_jax.planning.model import abstract_state, device_bytes, placed
from alphagrpo_jax.planning.stages import EVALUATION, PlanStage
from alphagrpo_jax.runtime.sharding import MESH_AXES
from alphagrpo_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class StageNeeds:
    """Adds up what one stage needs."""

    stage: PlanStage
    compiled: Compiled
    held_bytes: float  # results of other stages that are alive

    @property
    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes per device at the stage's peak: what is alive, its results, its temporaries."""
        compiled = self.compiled
        padding = max(0.0, compiled.argument_bytes - compiled.parameter_bytes)
        results = max(0.0, compiled.output_bytes - compiled.alias_bytes)
        kinds = dict(self.stage.alive)
        if self.held_bytes:
            kinds["residuals"] = self.held_bytes
        return kinds | {
            "padding": padding,
            "results": results,
            "temporaries": compiled.temporary_bytes,
        }

    @property
    def peak(self) -> float:
        """Bytes per device; infinity where a compiler refused the stage without a number."""
        return sum(self.bytes_by_kind.values())

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs of the program by the least of the model's arithmetic; None: not counted."""
        least = self.stage.minimum.flops
        return self.compiled.flops / least if least else None

    @property
    def token_bytes_ratio(self) -> float | None:
        """Bytes that a token of a text moves by those it must read; None: no text, or no number."""
        least, moved = self.stage.minimum.token_bytes, self.compiled.step_memory_traffic
        return moved / least if least and moved else None


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds of a call, by what would bind it."""

    arithmetic: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The largest of the three: they may overlap."""
        return max(self.arithmetic, self.memory, self.links)

    @property
    def bound(self) -> str:
        """Names what binds."""
        return max(("arithmetic", "memory", "links"), key=lambda name: getattr(self, name))


def roofline(compiled: Compiled, chip: Chip) -> Roofline:
    """Computes the least seconds of one call on a chip."""
    inside = compiled.collective_bytes - compiled.network_bytes
    return Roofline(
        arithmetic=compiled.flops / chip.flops,
        memory=compiled.memory_traffic / chip.memory_rate,
        links=inside / chip.link_rate + compiled.network_bytes / chip.network_rate,
    )


def iteration_seconds(needs: Sequence[StageNeeds], chip: Chip) -> dict[str, float]:
    """Adds up the rooflines of an iteration by part of the run; an evaluation stands beside it."""
    parts: dict[str, float] = {}
    for entry in needs:
        part = entry.stage.part
        seconds = entry.stage.calls * roofline(entry.compiled, chip).seconds
        parts[part] = parts.get(part, 0.0) + seconds
    return parts


def without_evaluation(parts: dict[str, float]) -> float:
    """Returns the seconds of an iteration."""
    return sum(seconds for part, seconds in parts.items() if part != EVALUATION)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Says what an iteration at the roofline comes to."""

    images_per_second: float  # of all chips
    arithmetic_seconds: float  # of the model's arithmetic at the chips' peak
    seconds: float  # at the roofline

    @property
    def share(self) -> float:
        """Share of the arithmetic's roof."""
        return self.arithmetic_seconds / self.seconds


def speed(needs: Sequence[StageNeeds], chip: Chip, images: float) -> Speed | None:
    """Computes the speed of an iteration at the roofline.

    Args:
      needs: of all stages; evaluations do not count.
      chip: of all devices.
      images: of an iteration.
    Returns:
      None where a compiler refused a stage, so that its time is not known.
    """
    training = [entry for entry in needs if entry.stage.part != EVALUATION]
    seconds = without_evaluation(iteration_seconds(training, chip))
    if not seconds or any(entry.compiled.too_large for entry in training):
        return None
    flops = sum(entry.stage.calls * entry.stage.minimum.model_flops for entry in training)
    return Speed(images / seconds, flops / chip.flops, seconds)


def resident_bytes(config: Config, loaded: LoadedModel, sizes: dict[str, int]) -> float:
    """Returns what weights, adapters and optimizer take per device on a mesh of other sizes."""
    axes = tuple(sizes[name] for name in MESH_AXES)
    mesh: Any = AbstractMesh(axes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded.base)
    base = placed(plain, mesh)
    state = abstract_state(config, plain, make_optimizer(config.optimizer), mesh)
    return device_bytes((base, state.trainable, state.opt_state))


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Fields to change, and the peak that follows from sizes."""

    changes: dict[str, int | str]
    peak: float
    fits: bool


def suggest(
    config: Config,
    loaded: LoadedModel,
    worst: StageNeeds,
    sizes: dict[str, int],
    limit: float,
) -> Suggestion | None:
    """Looks for changed fields under which the worst stage fits, the smallest change first.

    The peak under them is an estimate: weights, adapters and optimizer by their exact sizes on the
    other mesh, the rest by how it grows with rows and lengths.

    Returns:
      The first change that fits, else the one with the lowest peak; None if nothing would help.
    """
    now = resident_bytes(config, loaded, sizes)
    residual_bytes = worst.stage.alive.get("kept residuals", 0.0)
    candidates = []
    for rows in _smaller_rows(config, worst):
        for mesh in _meshes(loaded, sizes):
            for tokens in (config.rollout.text_tokens, config.rollout.text_tokens // 2):
                changes: dict[str, int | str] = dict(rows)
                if residual_bytes:  # costs a forward pass and no bit
                    changes["train.keep_residuals"] = False
                changes |= {
                    f"mesh.{axis}": mesh[axis]
                    for axis in ("fsdp", "tensor")
                    if mesh[axis] != sizes[axis]
                }
                if tokens != config.rollout.text_tokens:
                    changes["rollout.text_tokens"] = tokens
                resident = resident_bytes(config, loaded, mesh) + _gathered(loaded, mesh)
                beside = worst.peak - now - residual_bytes
                if rows:
                    beside -= worst.compiled.temporary_bytes * (1 - 1 / max(1, worst.stage.rows))
                if tokens != config.rollout.text_tokens:
                    beside -= worst.stage.alive.get("contexts", 0.0) / 3
                candidates.append(
                    Suggestion(changes, resident + beside, resident + beside <= limit)
                )
    candidates = [option for option in candidates if option.changes]
    fitting = [option for option in candidates if option.fits]
    if fitting:
        return min(fitting, key=lambda option: (len(option.changes), _ways(option)))
    better = [option for option in candidates if option.peak < worst.peak]
    return min(better, key=lambda option: option.peak, default=None)


def _ways(option: Suggestion) -> tuple[int, int]:
    """Prefers few ways, and "tensor" to "fsdp", under which writing text gathers the weights."""
    tensor, fsdp = (int(option.changes.get(f"mesh.{axis}", 1)) for axis in ("tensor", "fsdp"))
    return (fsdp, tensor)


def _smaller_rows(config: Config, worst: StageNeeds) -> list[dict[str, int | str]]:
    """Returns no change, and one row per device where the stage has more."""
    field = "train.micro_batch" if worst.stage.part == "update" else "rollout.micro_batch"
    options: list[dict[str, int | str]] = [{}]
    if worst.stage.rows > 1:
        options.append({field: 1})
    if config.model.remat != "full" and worst.stage.part == "update":
        options.append({"model.remat": "full"})
    return options


def _meshes(loaded: LoadedModel, sizes: dict[str, int]) -> list[dict[str, int]]:
    """Returns meshes of as many devices whose inner axes are no smaller."""
    llm, devices = loaded.config.llm, math.prod(sizes.values())
    heads = math.gcd(llm.num_attention_heads, llm.num_key_value_heads)
    meshes = []
    for tensor in range(sizes["tensor"], heads + 1):
        for fsdp in (sizes["fsdp"] * 2**power for power in range(8)):
            inner = tensor * fsdp
            if heads % tensor == 0 and devices % inner == 0 and inner % sizes["tensor"] == 0:
                meshes.append({"data": devices // inner, "fsdp": fsdp, "tensor": tensor})
    return meshes


def _gathered(loaded: LoadedModel, mesh: dict[str, int]) -> float:
    """Returns the bytes of weights that fsdp gathers at a time: two layers, or the output head."""
    if mesh["fsdp"] == 1:
        return 0.0
    layers = loaded.config.llm.num_hidden_layers
    stacked = [x for x in jax.tree.leaves(loaded.base) if x.shape and x.shape[0] == layers]
    return 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in stacked) / layers
