"""Attention by kernels against the plain form: interpreted (splash), by its stand-in (cuDNN)."""

import functools
import importlib.util
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.bagel_7b import TOKENIZER, bagel_7b_config
from alphagrpo_jax.ops import fused_attention
from alphagrpo_jax.ops.attention import attend
from alphagrpo_jax.ops.masked import causal_mask
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer

ON_CPUS = {
    "cudnn": functools.partial(fused_attention.cudnn, implementation="xla"),
    "splash": functools.partial(fused_attention.splash, interpret=True),
}
CUDNN = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.fixture
def on_cpus(monkeypatch):
    monkeypatch.setattr("alphagrpo_jax.ops.attention.KERNELS", ON_CPUS)


def blocks(rows, length, dtype=jnp.float32, *, causal=True):
    """Queries, and keys, values and masks of two shared blocks and that of the new tokens."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(rows, length, 4, 16)), dtype)
    keys, values, masks = [], [], []
    for block_rows, slots in ((1, 5), (rows // 2, 200), (rows, length)):
        key, value = rng.normal(size=(2, block_rows, 2, slots, 16))
        keys.append(jnp.asarray(key, dtype))
        values.append(jnp.asarray(value, dtype))
        masks.append(jnp.asarray(rng.random((block_rows, 1, slots)) < 0.7))
    masks[0] = masks[0].at[:].set(False)  # the last row sees nothing before its second token
    masks[1] = masks[1].at[-1].set(False)
    valid = masks[2][:, 0].at[-1, :1].set(False).at[-1, 1:2].set(True)
    masks[2] = causal_mask(valid) if causal else jnp.ones((1, 1, length), bool)
    return query, keys, values, masks


def looks_somewhere(query, masks):
    """bool[B, T, 1], False for queries that may look nowhere: nobody reads what they get."""
    rows, length = query.shape[:2]
    looks = jnp.zeros((rows, length), bool)
    for mask in masks:
        looks |= jnp.repeat(mask.any(axis=2), rows // len(mask), axis=0)
    return looks[..., None]


def value_and_gradient(kernel, query, keys, values, masks):
    looks = looks_somewhere(query, masks)

    def total(query, keys, values):
        attended = attend(query, keys, values, masks, kernel=kernel).astype(jnp.float32)
        return jnp.where(looks, jnp.sin(attended), 0).sum(), attended

    function = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, attended), gradient = function(query, keys, values)
    assert np.isfinite(attended).all()
    return jnp.where(looks, attended, 0), gradient


@pytest.mark.parametrize("causal", [True, False], ids=["text", "image"])
@pytest.mark.parametrize("kernel", ON_CPUS)
def test_a_kernel_equals_the_plain_form(on_cpus, kernel, causal):
    arguments = blocks(4, 131, causal=causal)
    assert bool(looks_somewhere(arguments[0], arguments[3]).all()) != causal
    plain, fused = (value_and_gradient(name, *arguments) for name in ("plain", kernel))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), fused, plain)


@pytest.mark.parametrize("kernel", ON_CPUS)
def test_bfloat16_differs_by_rounding(on_cpus, kernel):
    arguments = blocks(2, 131, jnp.bfloat16)
    exact = value_and_gradient("plain", *blocks(2, 131))
    plain, fused = (value_and_gradient(name, *arguments) for name in ("plain", kernel))
    leaves = [map(np.float32, jax.tree.leaves(tree)) for tree in (fused, plain, exact)]
    for a, b, c in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, c, atol=0.03 * np.abs(c).max())
        assert np.abs(a - c).mean() <= 2 * np.abs(b - c).mean()


@pytest.mark.parametrize("kernel", ON_CPUS)
@pytest.mark.parametrize("length", [1, fused_attention.TILE - 1])
def test_a_short_query_takes_the_plain_form(on_cpus, kernel, length):
    arguments = blocks(2, length)
    plain, fused = (attend(*arguments, kernel=name) for name in ("plain", kernel))
    np.testing.assert_array_equal(fused, plain)


@pytest.mark.parametrize(
    ("length", "block"),
    [(1, 128), (128, 128), (129, 256), (514, 640), (1026, 384), (1607, 256), (2100, 384),
     (3540, 512), (4900, 640)],
)  # fmt: skip
def test_blocks_waste_little(length, block):
    assert fused_attention._block(length) == block
    assert -length % block < max(128, length / 4)


def test_rows_and_heads_are_split_over_a_mesh(run_python):
    """Also one row, which no axis of the mesh divides."""
    script = """
import sys; sys.path.insert(0, "tests/ops")
import jax, numpy as np
from jax.sharding import NamedSharding
from alphagrpo_jax.ops import attention
from alphagrpo_jax.runtime import sharding
from test_fused_attention import ON_CPUS, blocks
attention.KERNELS.update(ON_CPUS)
mesh = sharding.make_mesh(2, 1, 2)
for rows in (2, 1):
    arguments = blocks(2, 131, causal=False)
    query, keys, values, masks = jax.tree.map(lambda x: x[:rows], arguments)
    plain = jax.jit(attention.attend)(query, keys, values, masks)
    with jax.set_mesh(mesh):
        if rows == 2:
            query = jax.device_put(query, NamedSharding(mesh, sharding.partition_spec(["batch"])))
        for kernel in ON_CPUS:
            function = jax.jit(lambda *blocks: attention.attend(
                *blocks, kernel=kernel, spec=sharding.HEADS_SPEC))
            fused = function(query, keys, values, masks)
            np.testing.assert_allclose(fused, plain, atol=2e-5)
            print(fused.sharding.spec)
"""
    result = run_python("-c", script, devices=4)
    assert result.returncode == 0, result.stderr
    first, *_ = result.stdout.splitlines()
    assert "data" in first
    assert "tensor" in first


def test_cudnn_is_called_as_it_can_be(monkeypatch):
    """Lowered for a GPU that is not there: even lengths, one mask for all heads, no scores."""
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{CUDNN}.check_compute_capability", lambda capability: True)
    monkeypatch.setattr(f"{CUDNN}.is_cuda_compute_capability_equal", lambda capability: False)

    def total(query, keys, values, masks):
        attended = attend(query, keys, values, masks, kernel="cudnn", spec=sharding.HEADS_SPEC)
        return attended.astype(jnp.float32).sum()

    with jax.set_mesh(sharding.make_mesh(1, 1, 1, jax.devices()[:1])):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*blocks(2, 131, jnp.bfloat16))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    query, key = "tensor<2x132x4x16xbf16>", "tensor<2x336x2x16xbf16>"
    forward, backward = re.findall(r"@__cudnn\$(\w+)\(.* : \((.*)\) -> \((.*)\)", text)
    assert (forward[0], backward[0]) == ("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward")
    assert forward[1].split(", ") == [query, key, key, "tensor<2x1x132x336xbf16>"]
    assert "tensor<2x2x336x16xbf16>" in backward[2]
    assert "336xf32" not in text


# ------------------------------------------------------- memory at the sizes of BAGEL-7B-MoT
ROWS, HEADS, CACHED, TEXT, IMAGE = 1, 28, 1000, 512, 1026


def float32_sizes(jaxpr) -> Iterator[int]:
    """Elements of every float32 array that a traced function computes, inner functions included."""
    for equation in jaxpr.eqns:
        yield from (
            variable.aval.size
            for variable in equation.outvars
            if variable.aval.dtype == jnp.float32
        )
        for value in equation.params.values():
            for candidate in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(candidate, "jaxpr", candidate)
                if hasattr(inner, "eqns"):
                    yield from float32_sizes(inner)


def model_at_7b(kernel: str):
    """BAGEL-7B-MoT without weights, and their shapes."""
    config = bagel_7b_config(Tokenizer.from_folder(resolve(TOKENIZER)))
    model = Bagel(config, dtype=jnp.bfloat16, remat="full", attention_kernel=kernel)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    return model, jax.tree.map(lambda leaf: shape(leaf.shape), base_shapes(model))


def gradient_at_7b(kernel: str, kind: str):
    """The gradient of a text's or an image's pass by its context, traced; nothing is allocated."""
    model, base = model_at_7b(kernel)
    config, llm = model.config, model.config.llm
    stack = jax.ShapeDtypeStruct(
        (llm.num_hidden_layers, ROWS, llm.num_key_value_heads, CACHED, llm.head_dim), jnp.bfloat16
    )
    valid = jax.ShapeDtypeStruct((ROWS, CACHED), bool)
    assert llm.num_attention_heads == HEADS

    def loss(keys, values, valid, base):
        params = policy.PolicyParams(base)
        segment = kv_cache.Segment(keys, values, valid)
        context = kv_cache.Context((segment,), jnp.zeros(ROWS, jnp.int32))
        if kind == "image":
            latents = jnp.zeros((ROWS, IMAGE - 2, config.latent_width))
            sigma = jnp.ones(ROWS)
            return policy.velocity(model, params, context, latents, sigma, (32, 32)).sum()
        tokens = jnp.zeros((ROWS, TEXT), jnp.int32)
        _, hidden = policy.extend_text(model, params, context, tokens, tokens == 0)
        return hidden.astype(jnp.float32).sum()

    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(stack, stack, valid, base).jaxpr


@pytest.mark.parametrize(("kind", "length"), [("text", TEXT), ("image", IMAGE)])
@pytest.mark.parametrize("kernel", ["plain", *fused_attention.KERNELS])
def test_no_float32_array_has_the_size_of_all_scores(monkeypatch, kernel, kind, length):
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)  # tracing asks for it
    largest = max(float32_sizes(gradient_at_7b(kernel, kind)))
    scores = ROWS * HEADS * length * (CACHED + length)
    assert (largest >= scores) == (kernel == "plain")
    if kernel != "plain":
        assert largest < scores / 10


@pytest.mark.parametrize("kernel", ["plain", *fused_attention.KERNELS])
def test_the_vit_keeps_no_scores_either(monkeypatch, kernel):
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)
    model, base = model_at_7b(kernel)
    side = 70
    patches = jax.ShapeDtypeStruct((ROWS, side**2, model.config.patch_width), jnp.bfloat16)

    def embed(base, patches):
        return policy.embed_patches(model, policy.PolicyParams(base), patches, (side, side))

    largest = max(float32_sizes(jax.make_jaxpr(embed)(base, patches).jaxpr))
    scores = ROWS * model.config.vit.num_attention_heads * side**4
    assert (largest >= scores) == (kernel == "plain")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_compiler_of_tpus_takes_the_splash_kernel(run_python):
    """On four v5p, rows and heads split, in less memory than half of the scores."""
    script = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from alphagrpo_jax.ops.attention import attend
from alphagrpo_jax.planning.targets import tpu_target
from alphagrpo_jax.runtime import sharding
mesh = sharding.make_mesh(2, 1, 2, tpu_target("v5p:2x2x1", 1).devices)
def placed(shape, axes, dtype=jnp.bfloat16):
    place = NamedSharding(mesh, sharding.partition_spec(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
def loss(query, keys, values, masks):
    attended = attend(query, keys, values, masks, kernel="splash", spec=sharding.HEADS_SPEC)
    return attended.astype(jnp.float32).sum()
query = placed((4, 512, 28, 128), ["batch", None, "heads"])
keys = [placed((4, 4, slots, 128), ["batch", "heads"]) for slots in (1000, 512)]
masks = [placed((4, 1, 1000), ["batch"], bool), placed((4, 512, 512), ["batch"], bool)]
with jax.set_mesh(mesh):
    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = function.lower(query, keys, keys, masks).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    scores = 4 * 2 * 14 * 512 * 1512  # bytes of a device's share
    assert int(result.stdout) < scores / 2
