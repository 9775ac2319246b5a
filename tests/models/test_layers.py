"""Parameters that exist are read; a wrong one is named."""

import jax.numpy as jnp
import pytest
from flax import errors

from alphagrpo_jax.models.layers import Linear
from alphagrpo_jax.models.vae import Conv


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


def test_a_missing_parameter_is_an_error():
    with pytest.raises(errors.ScopeParamNotFoundError):
        Linear(3).apply({"params": {"bias": jnp.zeros(3)}}, jnp.zeros((1, 2)))
