import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from default_options import guidance as guided

from alphagrpo_jax.config import Guidance
from alphagrpo_jax.flow import schedule
from alphagrpo_jax.flow.guidance import active_mask, combine, is_active

RENORMS = typing.get_args(typing.get_type_hints(Guidance)["renorm"])
EDIT = guided(image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel")


def reference(v, v_text, v_image, guidance):
    """The rule in float64, one sample at a time."""
    out = []
    for a, t, i in zip(*(np.asarray(x, np.float64) for x in (v, v_text, v_image)), strict=True):
        u = t + guidance.text_scale * (a - t)

        def norm(x):
            axis = None if guidance.renorm == "global" else -1
            return np.sqrt((x * x).sum(axis, keepdims=True))

        def add_image(u, i=i):
            return i + guidance.image_scale * (u - i) if guidance.image_scale > 1 else u

        def scale(u, a=a, norm=norm):
            return u * np.clip(norm(a) / (norm(u) + 1e-8), guidance.renorm_min, 1)

        late = guidance.renorm != "text_channel"
        out.append(scale(add_image(u)) if late else add_image(scale(u)))
    return np.stack(out)


def branches(seed=0, shape=(3, 4, 5)):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("image_scale", [1.0, 2.0])
@pytest.mark.parametrize("renorm_min", [0.0, 0.6])
def test_combine_against_float64(renorm, image_scale, renorm_min):
    guidance = guided(text_scale=4.0, image_scale=image_scale, renorm=renorm, renorm_min=renorm_min)
    v, v_text, v_image = branches()
    v_text[0] = v[0] * 1.1  # u = 0.6 v: the ratio is above 1 and is clipped
    got = jax.jit(combine, static_argnums=3)(v, v_text, v_image, guidance)
    np.testing.assert_allclose(got, reference(v, v_text, v_image, guidance), rtol=1e-5, atol=1e-5)


def test_combine_by_hand():
    # v = (3, 4), v_t = (3, 0): u = (3, 16) with s_t = 4; |v| = 5, |u| = sqrt(265)
    v, v_text = jnp.array([[[3.0, 4.0]]]), jnp.array([[[3.0, 0.0]]])
    got = combine(v, v_text, None, guided(text_scale=4.0))
    factor = 5 / np.sqrt(265)
    np.testing.assert_allclose(got, [[[3 * factor, 16 * factor]]], rtol=1e-6)
    # text_channel, then 1 + 2 (u - 1) with v_i = (1, 1)
    edit = guided(text_scale=4.0, image_scale=2.0, renorm="text_channel")
    got = combine(v, v_text, jnp.ones((1, 1, 2)), edit)
    np.testing.assert_allclose(got, [[[6 * factor - 1, 32 * factor - 1]]], rtol=1e-6)


def test_scales_of_one_need_no_branches():
    v, v_text, _ = branches()
    np.testing.assert_array_equal(combine(v, None, None, guided(text_scale=1.0)), v)
    # without text guidance the image scale is ignored too
    np.testing.assert_array_equal(combine(v, None, None, guided(text_scale=1, image_scale=3)), v)
    assert not guided(text_scale=1.0, image_scale=3.0).uses_image
    only_text = combine(v, v_text, None, dataclasses.replace(EDIT, image_scale=1.0))
    assert only_text.shape == v.shape


@pytest.mark.parametrize("renorm", RENORMS)
def test_a_sample_does_not_depend_on_its_neighbours(renorm):
    guidance = dataclasses.replace(EDIT, renorm=renorm)
    arrays = branches()
    batched = combine(*arrays, guidance)
    single = combine(*(array[1:2] for array in arrays), guidance)
    np.testing.assert_allclose(batched[1:2], single, rtol=1e-6)


def test_interval_is_open_below_and_closed_above():
    assert not is_active(guided(), 0.4)
    assert not is_active(guided(), np.float32(0.4))
    assert is_active(guided(), 0.41)
    assert is_active(guided(), 1.0)
    assert not is_active(guided(interval=(0.4, 0.9)), 0.91)
    assert is_active(guided(interval=(0.4, 0.9)), 0.9)
    assert not is_active(guided(text_scale=1.0), 0.5)
    points = schedule.sigmas(12)  # the tenth point is 0.4 exactly
    static = [is_active(guided(), sigma) for sigma in points]
    assert static == [True] * 9 + [False] * 3
    np.testing.assert_array_equal(jax.jit(functools.partial(active_mask, guided()))(points), static)


def test_defaults():
    default = guided()
    assert (default.text_scale, default.image_scale, default.interval) == (4.0, 1.0, (0.4, 1.0))
    assert (default.renorm, default.renorm_min) == ("global", 0.0)
    assert len({default, EDIT, guided()}) == 2  # hashable


@pytest.mark.parametrize("renorm", RENORMS)
def test_gradients_flow_through_all_branches_and_norms(renorm):
    guidance = guided(text_scale=3.0, image_scale=2.0, renorm=renorm)
    arrays = branches(shape=(1, 2, 3))
    weights = branches(1, shape=(1, 2, 3))[0]

    def value(*arrays):
        return jnp.sum(combine(*arrays, guidance) * weights)

    def exact(arrays):
        return (reference(*arrays, guidance) * weights).sum()

    gradients = jax.grad(value, argnums=(0, 1, 2))(*map(jnp.asarray, arrays))
    for branch, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            steps = []
            for sign in (1, -1):
                shifted = [np.asarray(array, np.float64).copy() for array in arrays]
                shifted[branch][index] += sign * 1e-5
                steps.append(exact(shifted))
            numeric = (steps[0] - steps[1]) / 2e-5
            assert gradient[index] == pytest.approx(numeric, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("renorm", RENORMS)
def test_gradient_at_zero_is_finite(renorm):
    guidance = guided(text_scale=3.0, image_scale=2.0, renorm=renorm)

    def value(v):
        return jnp.sum(combine(v, jnp.zeros_like(v), jnp.zeros_like(v), guidance))

    assert np.isfinite(jax.grad(value)(jnp.zeros((2, 3, 4)))).all()


def test_equal_branches_pass_the_whole_gradient():
    # u == v, so the ratio is exactly at the bound 1, where half a gradient would be wrong
    def value(v):
        return jnp.sum(combine(v, v, None, guided()))

    gradient = jax.grad(value)(jnp.asarray(branches()[0]))
    np.testing.assert_allclose(gradient, np.ones_like(gradient), rtol=1e-5)


def test_refuses_wrong_settings_and_shapes():
    with pytest.raises(ValueError, match=r"renorm\n  Input should be 'global',"):
        guided(renorm="none")
    with pytest.raises(ValueError, match="expected two noise levels"):
        guided(interval=(1.0, 0.4))
    v = jnp.ones((1, 2, 3))
    with pytest.raises(AssertionError):
        combine(v, jnp.ones((1, 2, 4)), None, guided())
