"""Decides all sharding: the mesh, and two tables that say how every array lies on it.

`PARAM_AXES` gives each parameter path its logical axes, `AXIS_RULES` each logical axis its mesh
axes. Both are strict: a path that no row matches, or a mesh axis used twice in one array, is an
error. What a configuration changes is only the mesh's shape; an axis of size 1 is no sharding.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alphagrpo_jax.runtime.errors import UsageError

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes
AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "rank": (),
    "split_rank": ("fsdp",),  # an adapter's rank where its other dimension is not over fsdp
    "length": (),
    "none": (),
}

_ATTENTION_IN = r"(q|k|v)_proj(_moe_gen)?"
_MLP = r"mlp(_moe_gen)?"

# (regex over the "/"-joined path, logical axes of the trailing dimensions). First match wins.
# Kernels are [in, out]; the axes are aligned to the right, leading ones (scanned layers) are
# not sharded.
PARAM_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (rf"layers/.*{_ATTENTION_IN}/kernel$", ("embed", "heads")),
    (rf"layers/.*{_ATTENTION_IN}/bias$", ("heads",)),
    (r"layers/.*(o_proj|out_proj)(_moe_gen)?/kernel$", ("heads", "embed")),
    (rf"layers/.*{_MLP}/(gate_proj|up_proj|fc1)/kernel$", ("embed", "mlp")),
    (rf"layers/.*{_MLP}/fc1/bias$", ("mlp",)),
    (rf"layers/.*{_MLP}/(down_proj|fc2)/kernel$", ("mlp", "embed")),
    (rf"layers/.*{_ATTENTION_IN}/a$", ("embed", "rank")),
    (rf"layers/.*{_ATTENTION_IN}/b$", ("split_rank", "heads")),
    (r"layers/.*o_proj(_moe_gen)?/a$", ("heads", "split_rank")),
    (r"layers/.*o_proj(_moe_gen)?/b$", ("rank", "embed")),
    (rf"layers/.*{_MLP}/(gate_proj|up_proj)/a$", ("embed", "rank")),
    (rf"layers/.*{_MLP}/(gate_proj|up_proj)/b$", ("split_rank", "mlp")),
    (rf"layers/.*{_MLP}/down_proj/a$", ("mlp", "split_rank")),
    (rf"layers/.*{_MLP}/down_proj/b$", ("rank", "embed")),
    (r"embed_tokens(/embedding)?$", ("vocab", "embed")),
    (r"lm_head/kernel$", ("embed", "vocab")),
    (r"(^|/)(vae|vae_model)/", ()),
    (r"(norm|layernorm|layer_norm)\w*/(scale|bias|weight)$", ()),
    (r"(bias|scale|pos_embed|position_embedding|embedding)$", ()),
    (r"(vae2llm|llm2vae|time_embedder|connector|patch_embedding)", ()),
)


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh, axes ("data", "fsdp", "tensor"), all of type Auto.

    A mesh axis may take a part of a physical axis of a TPU torus. With several slices, "data"
    crosses the slow network between them, and "fsdp" and "tensor" stay within a slice.

    Args:
      data, fsdp, tensor: sizes; one of them may be -1 (what is left).
      devices: default `jax.devices()`.
    Raises:
      UsageError: the product is not the device count, more than one size is -1, or a slice would
        be shared by parts of "data" that are no whole number.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    got = f"mesh data={data} fsdp={fsdp} tensor={tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UsageError(f"{got}: sizes must be positive, at most one of them -1")
    if -1 in sizes:
        given_sizes = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // given_sizes)
    if math.prod(sizes) != len(devices):
        raise UsageError(
            f"{got} needs {math.prod(sizes)} devices, but there are {len(devices)}; set "
            "mesh.data, mesh.fsdp and mesh.tensor so that their product is the device count"
        )
    return Mesh(
        _arranged(sizes, devices, got), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def _arranged(sizes: list[int], devices: list[Any], got: str) -> np.ndarray:
    """Arranges devices so that neighbors in the mesh are neighbors in the machine.

    Args:
      sizes: of the three axes, with the device count as their product.
      devices: of the mesh.
      got: begins the error message.
    Raises:
      UsageError: "data" does not divide over the slices.
    """
    # Of GPUs each node may count as a slice, but the order of the devices keeps the inner axes
    # within a node, and "fsdp" over nodes is slow rather than wrong.
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = sizes
    if data % slices:
        raise UsageError(
            f"{got}: {slices} slices of {len(devices) // slices} devices need mesh.data in "
            f"multiples of {slices}; got mesh.data={data}; keep mesh.fsdp x mesh.tensor at most "
            f"{len(devices) // slices} and a divisor of it, so that they stay within a slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def partition_spec(axes: Sequence[str | None], *, where: str = "array") -> PartitionSpec:
    """Translates logical axes to a PartitionSpec by `AXIS_RULES`.

    Raises:
      ValueError: an unknown logical axis, or a mesh axis used twice.
    """
    entries: list[Any] = []
    used: list[str] = []
    for axis in axes:
        if axis is not None and axis not in AXIS_RULES:
            raise ValueError(f"{where}: unknown logical axis {axis!r}; known: {list(AXIS_RULES)}")
        names = () if axis is None else AXIS_RULES[axis]
        used.extend(names)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    if len(set(used)) != len(used):
        raise ValueError(f"{where}: logical axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*entries)


def path_name(path: tuple[Any, ...]) -> str:
    """Writes a key path of `jax.tree_util` as "a/b/c"."""
    return "/".join(
        str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
        for entry in path
    )


def param_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of one parameter by `PARAM_AXES`; dimensions that the mesh does not
    divide stay whole.

    Raises:
      ValueError: no row matches a parameter of two or more dimensions, or a row names more axes
        than the array has.
    """
    axes = next((axes for pattern, axes in PARAM_AXES if re.search(pattern, path)), None)
    if axes is None:
        raise ValueError(
            f"no row of PARAM_AXES matches parameter {path} of shape {tuple(shape)}; add one in "
            "runtime/sharding.py"
        )
    if len(axes) > len(shape):
        raise ValueError(f"{path}: axes {axes} for an array of shape {tuple(shape)}")
    spec = partition_spec([None] * (len(shape) - len(axes)) + list(axes), where=path)
    fitted = [
        entry if size % _ways(entry, mesh) == 0 else None
        for entry, size in zip(spec, shape, strict=True)
    ]
    return PartitionSpec(*fitted)


def _ways(entry: Any, mesh: Mesh) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a tree of parameters, adapters or optimizer state.

    Optax keeps the paths of the parameters. Scalars and typed keys are replicated.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return param_sharding(path_name(path), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def param_sharding(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns `param_spec` as a sharding; scalars are replicated."""
    return NamedSharding(mesh, param_spec(path, shape, mesh)) if shape else replicated(mesh)


# Mesh axes of rows and heads, as `ops.attention.attend` takes them.
HEADS_SPEC = partition_spec(["batch", "heads"])


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Shards rows over ("data", "fsdp"), the batch being dimension `axis`."""
    return NamedSharding(mesh, partition_spec([None] * axis + ["batch"]))


def cache_sharding(mesh: Mesh, shape: Sequence[int], *, rows: bool = True) -> NamedSharding:
    """Lays keys or values [L, B, K, S, H] over the mesh: rows, and heads where they divide.

    Args:
      mesh: the devices.
      shape: of the array.
      rows: False leaves the rows whole on every device.
    """
    heads = "heads" if shape[2] % mesh.shape["tensor"] == 0 else None
    batch = "batch" if rows else None
    return NamedSharding(mesh, partition_spec([None, batch, heads, None, None]))


def batch_ways(mesh: Mesh) -> int:
    """Returns the number of shards of the batch."""
    return math.prod(mesh.shape[name] for name in AXIS_RULES["batch"])


def constrain_rows(tree: Any) -> Any:
    """Lays the rows of arrays, dimension 0, over the mesh of `jax.set_mesh`; in jit."""
    spec = partition_spec(["batch"])
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)
