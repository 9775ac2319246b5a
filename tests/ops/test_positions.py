"""Rotary embedding, position tables and timestep features against hand-computed numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax.ops.posembed import (
    grid_ids,
    interpolated_grid_ids,
    sincos_table,
    timestep_features,
)
from alphagrpo_jax.ops.rope import rotary, rotate


def test_rotation_by_hand():
    positions = jnp.array([[0, 2]], jnp.int32)
    cos, sin = rotary(positions, 4, 100.0)
    # frequencies 1 and 100^(-1/2) = 0.1
    np.testing.assert_allclose(cos[0, 1], np.cos([2.0, 0.2]), rtol=1e-6)
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4).repeat(2, axis=1)
    turned = rotate(x, cos, sin)
    np.testing.assert_allclose(turned[0, 0, 0], [1, 2, 3, 4])
    c, s = np.cos([2.0, 0.2]), np.sin([2.0, 0.2])
    expected = [c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + s[0], 4 * c[1] + 2 * s[1]]
    np.testing.assert_allclose(turned[0, 1, 0], expected, rtol=1e-5)


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [
            rotate(x, *rotary(jnp.array([[at]], jnp.int32), 8, 1e4))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float(jnp.vdot(*turned))

    assert score(3, 1) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(12, 11), abs=1e-3)


def test_table_encodes_the_column_first():
    table = sincos_table(8, 5).reshape(5, 5, 8)
    frequencies = 10000.0 ** -np.array([0.0, 0.5])
    for row, col in ((0, 0), (1, 3), (4, 2)):
        encodings = [[np.sin(at * frequencies), np.cos(at * frequencies)] for at in (col, row)]
        np.testing.assert_allclose(table[row, col], np.ravel(encodings), rtol=1e-6, atol=1e-7)


def test_ids_of_a_grid():
    np.testing.assert_array_equal(grid_ids((2, 3), 10), [0, 1, 2, 10, 11, 12])
    # two tokens per side stretched over a table of four: rows and columns 0 and 2
    np.testing.assert_array_equal(interpolated_grid_ids((2, 2), 4), [0, 2, 8, 10])
    np.testing.assert_array_equal(interpolated_grid_ids((4, 4), 4), grid_ids((4, 4), 4))


def test_a_grid_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match=r"2 x 5 tokens exceeds the position table of 4 x 4"):
        grid_ids((2, 5), 4)


def test_timestep_features():
    features = np.asarray(timestep_features(jnp.array([0.0, 0.75])))
    np.testing.assert_allclose(features[0], np.repeat([1.0, 0.0], 128))
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(features[1, :128], np.cos(0.75 * frequencies), atol=1e-6)
    np.testing.assert_allclose(features[1, 128:], np.sin(0.75 * frequencies), atol=1e-6)
