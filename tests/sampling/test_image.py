"""Sampling images: against a loop written out, with the stochastic window anywhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world
from default_options import guidance

from alphagrpo_jax import policy
from alphagrpo_jax.config import ImageOptions
from alphagrpo_jax.flow import schedule, sde
from alphagrpo_jax.flow.guidance import is_active
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.kv_cache import GuidanceContexts
from alphagrpo_jax.sampling import image

GUIDED = guidance(text_scale=3.0, interval=(0.5, 1.0))
GRID = (2, 2)
OPTIONS = ImageOptions(
    num_points=6,
    shift=3.0,
    window=2,
    window_range=(0, 5),
    noise_level=0.7,
    sampler="sde",
    guidance=GUIDED,
)


@pytest.fixture(scope="module")
def tiny():
    return tiny_world.model()


@pytest.fixture(scope="module")
def setting(tiny):
    """Parameters, contexts of two prompts, initial noise and keys."""
    params = policy.PolicyParams(tiny.base)
    rows = [tiny.tokenizer.wrap(words) for words in ("a red circle", "two")]
    tokens, mask = tiny.tokenizer.batch(rows, 24)
    extend = jax.jit(functools.partial(policy.extend_text, tiny.model))
    ctx, _ = extend(params, kv_cache.empty(2), tokens, mask)
    contexts = GuidanceContexts(ctx, kv_cache.empty(2), ctx)
    initial = jax.random.normal(jax.random.key(0), (2, 4, tiny.config.latent_width))
    return params, contexts, initial, jax.random.split(jax.random.key(1), 2)


@pytest.fixture(scope="module")
def draw(tiny):
    return jax.jit(
        functools.partial(image.sample_image, tiny.model, grid=GRID),
        static_argnames=("options", "stochastic"),
    )


@pytest.fixture(scope="module")
def velocity(tiny):
    return jax.jit(
        functools.partial(policy.guided_velocity, tiny.model),
        static_argnames=("grid", "guidance", "active"),
    )


def written_out(velocity, params, contexts, x, start, noise, options):
    """The walk as a plain loop; returns the image and (before, after, log-prob) per window step."""
    levels = schedule.sigmas(options.num_points, shift=options.shift)
    trail = []
    for at in range(options.num_points - 1):
        sigma, sigma_next = levels[at], levels[at + 1]
        rows = jnp.full((x.shape[0],), sigma)
        active = is_active(options.guidance, sigma)
        velocity_options = {"grid": GRID, "guidance": options.guidance, "active": active}
        v = velocity(params, contexts, x, rows, **velocity_options)
        if start <= at < start + options.window:
            step = sde.sde_step(
                x, v, sigma, sigma_next, levels[1], options.noise_level, noise[:, at - start]
            )
            logp = sde.sde_log_prob(step.next, step.mean, step.std, sigma, sigma_next)
            trail.append((x, step.next, logp))
            x = step.next
        else:
            x = sde.ode_step(x, v, sigma, sigma_next)
    return x, trail


@pytest.mark.parametrize("start", [0, 2, 3])
def test_every_window_equals_the_written_out_loop(setting, draw, velocity, start):
    params, contexts, initial, keys = setting
    sample = draw(params, contexts, initial, keys, jnp.int32(start), options=OPTIONS)
    noise = jnp.stack([jax.random.normal(key, (2, *initial.shape[1:])) for key in keys])
    latents, trail = written_out(velocity, params, contexts, initial, start, noise, OPTIONS)
    np.testing.assert_allclose(sample.latents, latents, atol=1e-4)
    for j, (before, after, logp) in enumerate(trail):
        np.testing.assert_allclose(sample.before[:, j], before, atol=1e-4)
        np.testing.assert_allclose(sample.after[:, j], after, atol=1e-4)
        np.testing.assert_allclose(sample.log_prob[:, j], logp, atol=1e-4)
    assert sample.start == start


def test_all_windows_share_one_compilation(draw):
    assert draw._cache_size() == 1


def test_a_start_beyond_the_end_is_the_deterministic_walk(setting, draw, velocity):
    params, contexts, initial, keys = setting
    sample = draw(params, contexts, initial, keys, jnp.int32(6), options=OPTIONS)
    latents, _ = written_out(velocity, params, contexts, initial, 9, None, OPTIONS)
    np.testing.assert_allclose(sample.latents, latents, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "guidance"), [("sde", GUIDED), ("cps", guidance(text_scale=1.0))]
)
def test_scores_are_the_samplers_own_log_probs(tiny, setting, draw, sampler, guidance):
    params, contexts, initial, keys = setting
    options = dataclasses.replace(
        OPTIONS, sampler=sampler, guidance=guidance, window_range=(0, 4), noise_level=0.6
    )
    sample = draw(params, contexts, initial, keys, jnp.int32(1), options=options)
    score = jax.jit(
        functools.partial(image.image_log_probs, tiny.model, options=options, grid=GRID),
        static_argnames="at_once",
    )
    logp, mean = score(params, contexts, sample, at_once=False)
    for first, second in zip(
        score(params, contexts, sample, at_once=True), (logp, mean), strict=True
    ):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logp, sample.log_prob, rtol=1e-4, atol=1e-5)
    levels = image.noise_levels(options)
    for j in range(2):
        spread = np.asarray(sample.after[:, j] - mean[:, j])
        if sampler == "cps":
            expected = -np.mean(spread**2, axis=(1, 2))
        else:
            std = 0.6 * np.sqrt(levels[1 + j] / (1 - levels[1 + j]))
            dt = levels[2 + j] - levels[1 + j]
            expected = np.mean(spread**2, axis=(1, 2)) / (2 * std**2 * dt)
        np.testing.assert_allclose(logp[:, j], expected, rtol=1e-4)


def test_a_row_depends_on_its_own_inputs_only(setting, draw):
    params, contexts, initial, keys = setting
    sample = draw(params, contexts, initial, keys, jnp.int32(1), options=OPTIONS)
    order = jnp.array([1, 0])
    swapped = GuidanceContexts(
        *(kv_cache.take(ctx, order) for ctx in (contexts.gen, contexts.cfg_text, contexts.cfg_img))
    )
    permuted = draw(params, swapped, initial[order], keys[order], jnp.int32(1), options=OPTIONS)
    np.testing.assert_allclose(permuted.latents, sample.latents[order], atol=1e-5)


def test_with_sampler_ode_the_finished_image_is_noised_again(setting, draw):
    """At different levels of the range in every row; the image is that of the plain walk."""
    params, contexts, initial, keys = setting
    options = dataclasses.replace(OPTIONS, sampler="ode", window=3, window_range=(1, 5))
    sample = draw(params, contexts, initial, keys, jnp.int32(1), options=options)
    plain = draw(params, contexts, initial, keys, jnp.int32(0), options=OPTIONS, stochastic=False)
    np.testing.assert_array_equal(sample.latents, plain.latents)
    assert plain.sigma.shape == (2, 0)
    levels = np.asarray(image.noise_levels(options))[1:5]
    for row in np.asarray(sample.sigma):
        assert len(set(row.tolist())) == 3
        assert set(row.tolist()) <= set(levels.tolist())
    weight = np.asarray(sample.sigma)[..., None, None]
    expected = (1 - weight) * np.asarray(sample.latents)[:, None] + weight * sample.after
    np.testing.assert_allclose(sample.before, expected, atol=1e-6)
    noise = np.asarray(sample.after)
    assert abs(noise.mean()) < 0.2
    assert 0.8 < noise.std() < 1.2
    assert not np.allclose(noise[:, 0], noise[:, 1])
    again = draw(params, contexts, initial, keys, jnp.int32(1), options=options)
    np.testing.assert_array_equal(again.before, sample.before)


def test_the_noise_levels_of_stochastic_steps_are_kept(setting, draw):
    params, contexts, initial, keys = setting
    sample = draw(params, contexts, initial, keys, jnp.int32(2), options=OPTIONS)
    np.testing.assert_array_equal(sample.sigma, np.tile(image.noise_levels(OPTIONS)[2:4], (2, 1)))
