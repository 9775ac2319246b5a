"""Parameters that exist are read; a wrong one is named; stacked layers equal Linen's scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from alphagrpo_jax import policy
from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.layers import REMAT_POLICIES, Linear, matmul
from alphagrpo_jax.models.vae import Conv
from alphagrpo_jax.planning.flops import count_flops
from benchmarks import layer_scan


@pytest.mark.parametrize(
    ("layer", "kernel", "x"),
    [(Linear(3), (2, 3), (1, 2)), (Conv(3, (1, 1)), (1, 1, 2, 3), (1, 2, 2, 2))],
)
def test_a_parameter_of_another_shape_is_named(layer, kernel, x):
    params = {"kernel": jnp.zeros(kernel), "bias": jnp.zeros(2)}
    with pytest.raises(errors.ScopeParamShapeError, match=r"bias.*shape \(3,\).*\(2,\)"):
        layer.apply({"params": params}, jnp.zeros(x))
    right = layer.apply({"params": params | {"bias": jnp.ones(3)}}, jnp.zeros(x))
    assert (right == 1.0).all()


@pytest.mark.parametrize(("width", "features"), [(3, 5), (5, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_derivatives_of_a_product_are_those_of_jax(width, features, dtype):
    x = jax.random.normal(jax.random.key(0), (2, 4, width), dtype)
    kernel = jax.random.normal(jax.random.key(1), (width, features), dtype)

    def total(product, x, kernel):
        return jnp.sin(product(x, kernel).astype(jnp.float32)).sum()

    def plain(x, kernel):
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)

    def ours(x, kernel):
        return matmul(x, kernel, jnp.float32)

    expected, gradient = (
        jax.grad(functools.partial(total, product), argnums=(0, 1))(x, kernel)
        for product in (plain, ours)
    )
    assert [leaf.dtype for leaf in gradient] == [dtype, dtype]
    for first, second in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(first, np.float32), np.asarray(second, np.float32), rtol=2e-2, atol=1e-5
        )


@pytest.mark.parametrize(("remat", "products"), [("none", 4), ("dots", 4), ("full", 6)])
def test_rematerialization_of_dots_keeps_products_of_weights(remat, products):
    x, kernels = jnp.ones((3, 4)), jnp.ones((2, 4, 4))

    def layer(x, kernel):
        return jnp.sin(matmul(x, kernel, jnp.float32)), None

    policy = REMAT_POLICIES[remat]
    again = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    step = layer if remat == "none" else again
    traced = jax.jit(jax.grad(lambda x: jax.lax.scan(step, x, kernels)[0].sum())).trace(x).jaxpr
    assert count_flops(traced, while_steps=1) == products * 2 * 3 * 4 * 4


def test_a_missing_parameter_is_an_error():
    with pytest.raises(errors.ScopeParamNotFoundError):
        Linear(3).apply({"params": {"bias": jnp.zeros(3)}}, jnp.zeros((1, 2)))


@pytest.mark.parametrize(
    ("name", "remat"),
    [("text gradient", "none"), ("image gradient", "dots"), ("vit forward", "full")],
)
def test_stacked_layers_equal_linens_scan(name, remat):
    model = Bagel(layer_scan.TINY, remat=remat)
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)

    base = base_shapes(model)
    adapters = jax.eval_shape(layer_scan.adapters_of, base)
    params = policy.PolicyParams(jax.tree.map(draw, base), jax.tree.map(draw, adapters), 0.5)
    function, shape = layer_scan.cases(model)[name]
    is_text = shape.dtype == jnp.int32
    argument = jnp.asarray(rng.integers(0, 40, shape.shape)) if is_text else draw(shape)
    ours = jax.jit(functools.partial(function, model))(params, argument)
    with layer_scan.through_linen():
        linen = jax.jit(functools.partial(function, model))(params, argument)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(linen)) > 1e-3
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), ours, linen)
