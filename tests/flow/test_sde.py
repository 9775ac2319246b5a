import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax.flow import schedule, sde

GOLDEN = pathlib.Path(__file__).parent.parent / "data" / "golden_a" / "expected.npz"


def latents(seed, shape=(2, 3, 4)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_ode_step_by_hand():
    x, v = jnp.full((1, 1, 2), 2.0), jnp.array([[[1.0, -4.0]]])
    np.testing.assert_allclose(sde.ode_step(x, v, 0.75, 0.5), [[[1.75, 3.0]]])


def test_ode_walks_a_straight_flow_from_noise_to_image():
    noise, image = latents(0), latents(1)
    x = jnp.asarray(noise)
    points = schedule.sigmas(7)
    for sigma, sigma_next in itertools.pairwise(points):
        x = sde.ode_step(x, noise - image, sigma, sigma_next)
    np.testing.assert_allclose(x, image, atol=1e-6)


def test_sde_std_by_hand():
    assert sde.sde_std(0.5, 0.9, 0.7) == pytest.approx(0.7)  # sigma / (1 - sigma) = 1
    assert sde.sde_std(0.8, 0.9, 0.7) == pytest.approx(1.4)
    # at sigma = 1 the denominator is 1 - sigma_1
    assert sde.sde_std(1.0, 0.9, 0.7) == pytest.approx(0.7 / math.sqrt(0.1), rel=1e-6)


def test_sde_mean_by_hand():
    # sigma 0.5, next 0.25, a 0.7: std^2 = 0.49, dt = -0.25
    # x factor 1 + 0.49 / 1 * -0.25 = 0.8775; v factor (1 + 0.49 * 0.5) * -0.25 = -0.31125
    x, v = jnp.full((1, 1, 1), 2.0), jnp.full((1, 1, 1), 4.0)
    mean, std = sde.sde_mean_std(x, v, 0.5, 0.25, 0.9, 0.7)
    assert mean.item() == pytest.approx(2 * 0.8775 - 4 * 0.31125, rel=1e-6)
    assert std == pytest.approx(0.7)
    step = sde.sde_step(x, v, 0.5, 0.25, 0.9, 0.7, jnp.full((1, 1, 1), -1.0))
    assert step.next.item() == pytest.approx(mean.item() - 0.7 * 0.5, rel=1e-6)


def test_sde_log_prob_by_hand_and_per_sample():
    mean = jnp.zeros((2, 1, 2))
    next_x = jnp.array([[[1.0, 3.0]], [[0.0, 0.0]]])
    # mean square 5 and 0; variance 0.5^2 * 0.25
    got = sde.sde_log_prob(next_x, mean, jnp.float32(0.5), 0.75, 0.5)
    np.testing.assert_allclose(got, [-5 / (2 * 0.25 * 0.25), 0.0], rtol=1e-6)


@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_sde_step_has_the_statistics_of_its_closed_form(noise_level):
    samples = 40_000
    x = jnp.broadcast_to(jnp.array([0.3, -1.2]), (samples, 1, 2))
    v = jnp.broadcast_to(jnp.array([0.5, 2.0]), (samples, 1, 2))
    noise = jax.random.normal(jax.random.key(0), x.shape)
    step = sde.sde_step(x, v, 0.6, 0.5, 0.9, noise_level, noise)
    std = noise_level * math.sqrt(0.6 / 0.4)
    drift = np.array([0.3, -1.2]) * (1 - std**2 / 1.2 * 0.1)
    drift = drift - np.array([0.5, 2.0]) * (1 + std**2 * 0.4 / 1.2) * 0.1
    spread = std * math.sqrt(0.1)
    np.testing.assert_allclose(step.next.mean((0, 1)), drift, atol=5 * spread / math.sqrt(samples))
    np.testing.assert_allclose(step.next.std((0, 1)), spread, rtol=0.02)
    # the expected log-prob of a sample is -1/2, since constants are left out
    log_prob = sde.sde_log_prob(step.next, step.mean, step.std, 0.6, 0.5)
    assert log_prob.mean() == pytest.approx(-0.5, abs=0.02)


def test_sde_keeps_the_marginal_of_a_gaussian_flow():
    # If x_0 ~ N(0, 1) then x_sigma ~ N(0, (1 - s)^2 + s^2) and E[v | x] is linear in x: many small
    # stochastic steps must end at the variance of x_0.
    samples, points = 20_000, np.linspace(0.9, 0.1, 161).astype(np.float32)
    key, first = jax.random.split(jax.random.key(1))
    x = jax.random.normal(first, (samples, 1, 1)) * math.sqrt(0.1**2 + 0.9**2)

    def body(x, inputs):
        sigma, sigma_next, key = inputs
        velocity = x * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)
        noise = jax.random.normal(key, x.shape)
        return sde.sde_step(x, velocity, sigma, sigma_next, 0.95, 0.7, noise).next, None

    x, _ = jax.lax.scan(body, x, (points[:-1], points[1:], jax.random.split(key, 160)))
    assert x.var().item() == pytest.approx(0.9**2 + 0.1**2, rel=0.05)


def test_cps_by_hand():
    # sigma 0.5, next 0.25, a 1/3: std = 0.125, x0 = 2 - 2 = 0, x1 = 2 + 2 = 4
    x, v = jnp.full((1, 1, 1), 2.0), jnp.full((1, 1, 1), 4.0)
    step = sde.cps_step(x, v, 0.5, 0.25, 1 / 3, jnp.full((1, 1, 1), 2.0))
    mean = math.sqrt(0.25**2 - 0.125**2) * 4
    assert step.std == pytest.approx(0.125, rel=1e-6)
    assert step.mean.item() == pytest.approx(mean, rel=1e-6)
    assert step.next.item() == pytest.approx(mean + 0.25, rel=1e-6)
    assert sde.cps_log_prob(step.next, step.mean).item() == pytest.approx(-0.0625, rel=1e-5)


def test_cps_without_noise_is_the_ode_step():
    x, v, noise = latents(0), latents(1), latents(2)
    step = sde.cps_step(x, v, 0.7, 0.4, 0.0, noise)
    np.testing.assert_allclose(step.next, sde.ode_step(x, v, 0.7, 0.4), atol=1e-6)


def test_small_steps_tend_to_the_ode():
    x, v = latents(0), latents(1)
    mean, _ = sde.sde_mean_std(x, v, 0.5, 0.5 - 1e-3, 0.9, 0.0)
    np.testing.assert_allclose(mean, sde.ode_step(x, v, 0.5, 0.5 - 1e-3), atol=1e-6)


def test_levels_per_sample_equal_one_level_each():
    x, v, noise = latents(0), latents(1), latents(2)
    sigma, sigma_next = np.float32([0.9, 0.4]), np.float32([0.7, 0.1])
    for step, log_prob in (
        (
            lambda x, v, s, n, z: sde.sde_step(x, v, s, n, 0.95, 0.7, z),
            lambda got, s, n: sde.sde_log_prob(got.next, got.mean, got.std, s, n),
        ),
        (
            lambda x, v, s, n, z: sde.cps_step(x, v, s, n, 0.7, z),
            lambda got, s, n: sde.cps_log_prob(got.next, got.mean),
        ),
    ):
        batched = jax.jit(step)(x, v, sigma, sigma_next, noise)
        for i in range(2):
            row = slice(i, i + 1)
            single = step(x[row], v[row], sigma[i], sigma_next[i], noise[row])
            np.testing.assert_allclose(batched.next[row], single.next, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                log_prob(batched, sigma, sigma_next)[i],
                log_prob(single, sigma[i], sigma_next[i])[0],
                rtol=1e-5,
            )


def test_half_precision_models_get_float32_arithmetic():
    x, v, noise = (jnp.asarray(latents(seed), jnp.bfloat16) for seed in range(3))
    step = sde.sde_step(x, v, 0.9, 0.8, 0.95, 0.7, noise)
    assert {step.next.dtype, step.mean.dtype, step.std.dtype} == {jnp.dtype("float32")}
    wide = sde.sde_step(*(a.astype(jnp.float32) for a in (x, v)), 0.9, 0.8, 0.95, 0.7, noise)
    np.testing.assert_array_equal(step.next, wide.next)


def test_log_prob_gradient_against_finite_differences():
    x, next_x, v = latents(0), latents(1), latents(2)

    def log_prob(v):
        mean, std = sde.sde_mean_std(x, v, 0.8, 0.6, 0.95, 0.7)
        return sde.sde_log_prob(next_x, mean, std, 0.8, 0.6).sum()

    gradient = np.asarray(jax.grad(log_prob)(jnp.asarray(v)))
    for index in [(0, 0, 0), (1, 2, 3)]:
        step = np.zeros_like(v)
        step[index] = 1e-2
        numeric = (log_prob(v + step) - log_prob(v - step)) / 2e-2
        assert gradient[index] == pytest.approx(float(numeric), rel=5e-3, abs=1e-4)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        sde.ode_step(latents(0), latents(1, (2, 3, 5)), 0.5, 0.4)
    with pytest.raises(AssertionError):
        sde.ode_step(latents(0)[0], latents(1)[0], 0.5, 0.4)


@pytest.mark.parametrize("step", [0, 3])
def test_steps_against_the_official_sampler(step):
    golden = np.load(GOLDEN)
    points = golden["c9.timesteps"]
    np.testing.assert_allclose(schedule.sigmas(len(points)), points, atol=1e-6)
    x, v, z = (golden[f"c9.step{step}_{name}"][None] for name in "xvz")
    sigma, sigma_next = points[step], points[step + 1]
    got = sde.sde_step(x, v, sigma, sigma_next, points[1], 0.7, z)
    log_prob = sde.sde_log_prob(got.next, got.mean, got.std, sigma, sigma_next)
    compare(golden, f"c9.step{step}_sde", got, log_prob)
    got = sde.cps_step(x, v, sigma, sigma_next, 0.7, z)
    compare(golden, f"c9.step{step}_cps", got, sde.cps_log_prob(got.next, got.mean))


def compare(golden, name, step, log_prob):
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(step.std, golden[f"{name}_std"], **close)
    np.testing.assert_allclose(step.mean[0], golden[f"{name}_mean"], **close)
    np.testing.assert_allclose(step.next[0], golden[f"{name}_next"], **close)
    np.testing.assert_allclose(log_prob[0], golden[f"{name}_logprob"], **close)
