"""Norms against float64 numpy."""

import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.ops.norm import layer_norm, rms_norm


def test_norms_against_float64():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(2, 3, 8)), rng.normal(size=8), rng.normal(size=8)
    f32 = [jnp.asarray(a, jnp.float32) for a in (x, weight, bias)]
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(rms_norm(*f32[:2], 1e-6), rms, atol=1e-5)
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias
    np.testing.assert_allclose(layer_norm(*f32, 1e-6), normed, atol=1e-5)


def test_statistics_are_float32_for_a_bfloat16_input():
    x = jnp.full((1, 4096), 3.0, jnp.bfloat16)  # a bfloat16 sum of squares would be far off
    out = rms_norm(x, jnp.ones((4096,), jnp.float32), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0)
