"""The mesh and the two tables: strict, and complete for every parameter of the model."""

import jax
import pytest
import tiny_world
from jax.sharding import PartitionSpec

from alphagrpo_jax.models import lora
from alphagrpo_jax.runtime import sharding


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 1, 1)


def test_meshes_must_fit_the_devices():
    assert dict(sharding.make_mesh(-1, 1, 1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="needs 8 devices, but there are 1"):
        sharding.make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match="at most one of them -1"):
        sharding.make_mesh(-1, -1, 1)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("language_model/layers/self_attn/q_proj/kernel", (2, 4, 4), (None, "fsdp", "tensor")),
        ("layers/self_attn/o_proj_moe_gen/kernel", (2, 4, 4), (None, "tensor", "fsdp")),
        ("language_model/layers/mlp_moe_gen/down_proj/a", (2, 4, 4), (None, "tensor", None)),
        ("0/mu/language_model/layers/mlp/up_proj/b", (2, 4, 4), (None, None, "tensor")),
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
