"""The mesh and the two tables: strict, and complete for every parameter of the model."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny_world
from jax.sharding import PartitionSpec

from alphagrpo_jax.models import lora
from alphagrpo_jax.models.kv_cache import Segment
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.training.steps import row_shardings
from alphagrpo_jax.types import Piece


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 1, 1)


def test_meshes_must_fit_the_devices():
    assert dict(sharding.make_mesh(-1, 1, 1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="needs 8 devices, but there are 1"):
        sharding.make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match="at most one of them -1"):
        sharding.make_mesh(-1, -1, 1)


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """What meshes are arranged by: a chip's place in its slice."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    device_kind: str
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"


def slices_of(*shape, kind="TPU v5", count=1):
    places = [(index, place) for index in range(count) for place in np.ndindex(*shape)]
    return [FakeTpu(id, place, index, kind) for id, (index, place) in enumerate(places)]


@pytest.mark.parametrize(
    ("shape", "kind", "sizes"),
    [
        ((4, 4, 4), "TPU v5", (8, 8, 1)),  # an axis of the mesh takes a half of a physical one
        ((4, 4, 4), "TPU v5", (16, 2, 2)),
        ((4, 4, 4), "TPU v5", (1, 64, 1)),
        ((8, 8, 1), "TPU v6 lite", (4, 16, 1)),
        ((4, 4, 1), "TPU v6 lite", (2, 8, 1)),
    ],
)
def test_a_mesh_axis_may_take_a_part_of_a_physical_axis(shape, kind, sizes):
    devices = slices_of(*shape, kind=kind)
    mesh = sharding.make_mesh(*sizes, devices=devices)
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(devices)


def test_data_crosses_slices_and_the_other_axes_do_not():
    devices = slices_of(2, 4, 4, count=2)
    for sizes in ((8, 8, 1), (4, 4, 4), (2, 32, 1), (64, 1, 1)):
        mesh = sharding.make_mesh(*sizes, devices=devices)
        assert set(mesh.devices.flat) == set(devices)
        for row in mesh.devices:
            assert len({device.slice_index for device in row.flat}) == 1
    with pytest.raises(ValueError, match="2 slices of 32 devices need mesh"):
        sharding.make_mesh(1, 64, 1, devices=devices)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("language_model/layers/self_attn/q_proj/kernel", (2, 4, 4), (None, "fsdp", "tensor")),
        ("layers/self_attn/o_proj_moe_gen/kernel", (2, 4, 4), (None, "tensor", "fsdp")),
        ("language_model/layers/mlp_moe_gen/down_proj/a", (2, 4, 4), (None, "tensor", "fsdp")),
        ("0/mu/language_model/layers/mlp/up_proj/b", (2, 4, 4), (None, "fsdp", "tensor")),
        ("language_model/layers/self_attn/o_proj/a", (2, 4, 4), (None, "tensor", "fsdp")),
        ("language_model/layers/self_attn/o_proj/b", (2, 4, 4), (None, None, "fsdp")),
        ("embed_tokens/embedding", (8, 4), ("tensor", "fsdp")),
        ("language_model/layers/input_layernorm/scale", (2, 4), ()),
        ("vae/decoder/conv_in/kernel", (3, 3, 4, 4), ()),
    ],
)
def test_parameters_lie_as_the_table_says(mesh, path, shape, spec):
    padded = (*spec, *(None,) * (len(shape) - len(spec)))
    assert sharding.param_spec(path, shape, mesh) == PartitionSpec(*padded)


def test_unknown_paths_and_axes_used_twice_are_refused(mesh):
    with pytest.raises(ValueError, match="no row of PARAM_AXES matches parameter new/thing"):
        sharding.param_spec("new/thing", (2, 2), mesh)
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        sharding.partition_spec(["batch", "embed"])
    with pytest.raises(ValueError, match="unknown logical axis"):
        sharding.partition_spec(["batch", "colour"])


def test_every_parameter_of_the_model_has_a_row(mesh):
    base = tiny_world.model().base
    adapters = lora.init(jax.random.key(0), base, lora.TARGETS, rank=2)
    for tree in (base, adapters):
        count = len(jax.tree.leaves(sharding.param_shardings(tree, mesh)))
        assert count == len(jax.tree.leaves(tree))


def test_adapters_and_both_moments_are_split_over_fsdp():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.MESH_AXES)
    adapters = lora.init(jax.random.key(0), tiny_world.model().base, lora.TARGETS, rank=2)
    state = (adapters, optax.adamw(1e-3).init(adapters))
    specs = [place.spec for place in jax.tree.leaves(sharding.param_shardings(state, mesh))]
    assert all("fsdp" in spec for spec in specs if len(spec))
    assert sum("fsdp" in spec for spec in specs) == 3 * len(jax.tree.leaves(adapters))


def test_keys_and_values_are_split_by_rows_and_heads():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.MESH_AXES)
    rows, shape = ("data", "fsdp"), (2, 8, 4, 3, 5)
    by_heads = PartitionSpec(None, rows, "tensor", None, None)
    assert sharding.cache_sharding(mesh, shape).spec == by_heads
    by_rows = PartitionSpec(None, rows, None, None, None)
    assert sharding.cache_sharding(mesh, (2, 8, 1, 3, 5)).spec == by_rows
    segment = Segment(*(jax.ShapeDtypeStruct(shape, np.float32),) * 2, np.ones((8, 3), bool))
    for level in ("shared", "prompt"):  # trajectories on all devices read these rows
        piece = row_shardings(Piece((segment,), np.ones(8), level), mesh)
        assert piece.segments[0].k.spec == PartitionSpec(None, None, "tensor", None, None)
        assert piece.advance.spec == piece.segments[0].valid.spec == PartitionSpec()
