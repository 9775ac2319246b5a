"""One sampling step: deterministic (ODE), Flow-SDE, or Flow-CPS, with transition log-probs.

All arithmetic is float32 whatever the model's dtype. A log-prob here is the *mean* over a sample's
latent elements (M x C), and leaves out the normalizing constants, which are equal for all policies.
`sigma` arguments are float32[] (one level for the batch) or float32[B].
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class StochasticStep(NamedTuple):
    """Sample, mean and spread of a stochastic step."""

    next: jax.Array  # float32[B, M, C]
    mean: jax.Array  # float32[B, M, C]
    std: jax.Array  # float32[] or float32[B], as the sigma given


def ode_step(x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
    """Takes an Euler step of the probability flow: `x + v (sigma_next - sigma)`.

    Args:
      x: float[B, M, C] latents at `sigma`.
      v: float[B, M, C] velocity there.
      sigma, sigma_next: float32[] or float32[B] noise levels, `sigma_next < sigma`.
    Returns:
      float32[B, M, C] latents at `sigma_next`.
    """
    x, v = _latents(x, v)
    return x + v * _per_row(jnp.float32(sigma_next) - jnp.float32(sigma))


def sde_std(sigma: jax.Array, sigma_1: jax.Array, noise_level: float) -> jax.Array:
    """Computes Flow-SDE's diffusion coefficient `a sqrt(sigma / (1 - sigma))` (Flow-GRPO, eq. 9).

    At `sigma = 1` the denominator takes the schedule's second point `sigma_1` in place of sigma.

    Args:
      sigma: float32[] or float32[B], in (0, 1].
      sigma_1: float32[], the schedule's second point.
      noise_level: `a`, 0.7 by default in AlphaGRPO.
    Returns:
      float32 of the shape of `sigma`.
    """
    sigma = jnp.asarray(sigma, jnp.float32)
    below_one = jnp.where(sigma >= 1.0, jnp.asarray(sigma_1, jnp.float32), sigma)
    return noise_level * jnp.sqrt(sigma / (1.0 - below_one))


def sde_mean_std(
    x: jax.Array,
    v: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    sigma_1: jax.Array,
    noise_level: float,
) -> tuple[jax.Array, jax.Array]:
    """Computes mean and diffusion coefficient of a Flow-SDE transition (Flow-GRPO, eq. 9).

    With `dt = sigma_next - sigma < 0`:
    `mean = x (1 + std^2 / (2 sigma) dt) + v (1 + std^2 (1 - sigma) / (2 sigma)) dt`.

    Args:
      x, v: float[B, M, C] latents and velocity at `sigma`.
      sigma, sigma_next: float32[] or float32[B].
      sigma_1: float32[], the schedule's second point.
      noise_level: `a`.
    Returns:
      mean float32[B, M, C]; std float32 of sigma's shape. The transition's standard deviation is
      `std sqrt(-dt)`.
    """
    x, v = _latents(x, v)
    sigma = jnp.asarray(sigma, jnp.float32)
    dt = jnp.asarray(sigma_next, jnp.float32) - sigma
    std = sde_std(sigma, sigma_1, noise_level)
    x_factor = 1.0 + jnp.square(std) / (2.0 * sigma) * dt
    v_factor = (1.0 + jnp.square(std) * (1.0 - sigma) / (2.0 * sigma)) * dt
    return x * _per_row(x_factor) + v * _per_row(v_factor), std


def sde_step(
    x: jax.Array,
    v: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    sigma_1: jax.Array,
    noise_level: float,
    noise: jax.Array,
) -> StochasticStep:
    """Samples a Flow-SDE step `next = mean + std sqrt(-dt) noise`, see `sde_mean_std`.

    Args:
      x, v, noise: float[B, M, C]; `noise` is standard normal.
      sigma, sigma_next, sigma_1, noise_level: as in `sde_mean_std`.
    """
    chex.assert_equal_shape([x, v, noise])
    mean, std = sde_mean_std(x, v, sigma, sigma_next, sigma_1, noise_level)
    scale = std * jnp.sqrt(jnp.float32(sigma) - jnp.float32(sigma_next))
    return StochasticStep(mean + _per_row(scale) * noise.astype(jnp.float32), mean, std)


def sde_log_prob(
    next_x: jax.Array, mean: jax.Array, std: jax.Array, sigma: jax.Array, sigma_next: jax.Array
) -> jax.Array:
    """Computes the log-prob of a Flow-SDE step: `mean of -(next - mean)^2 / (2 std^2 (-dt))`.

    Args:
      next_x: float[B, M, C] the latents that were sampled (a constant of the loss).
      mean: float32[B, M, C], std float32[] or float32[B]: of the policy that is scored.
      sigma, sigma_next: float32[] or float32[B].
    Returns:
      float32[B].
    """
    next_x, mean = _latents(next_x, mean)
    variance = jnp.square(std) * (jnp.float32(sigma) - jnp.float32(sigma_next))
    return -jnp.mean(jnp.square(next_x - mean), axis=(1, 2)) / (2.0 * variance)


def cps_mean_std(
    x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array, noise_level: float
) -> tuple[jax.Array, jax.Array]:
    """Computes mean and standard deviation of a Flow-CPS (coefficients-preserving) transition.

    With `s' = sigma_next`: `std = s' sin(a pi / 2)`, `x0 = x - sigma v`, `x1 = x + (1 - sigma) v`,
    `mean = (1 - s') x0 + sqrt(s'^2 - std^2) x1` (Flow-CPS, arXiv 2509.05952).

    Args:
      x, v: float[B, M, C] latents and velocity at `sigma`.
      sigma, sigma_next: float32[] or float32[B].
      noise_level: `a` in [0, 1].
    Returns:
      mean float32[B, M, C]; std float32 of the sigmas' shape (0 at `sigma_next = 0`).
    """
    x, v = _latents(x, v)
    sigma = jnp.asarray(sigma, jnp.float32)
    sigma_next = jnp.asarray(sigma_next, jnp.float32)
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    x0 = x - _per_row(sigma) * v
    x1 = x + _per_row(1.0 - sigma) * v
    x1_factor = jnp.sqrt(jnp.square(sigma_next) - jnp.square(std))
    return _per_row(1.0 - sigma_next) * x0 + _per_row(x1_factor) * x1, std


def cps_step(
    x: jax.Array,
    v: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    noise_level: float,
    noise: jax.Array,
) -> StochasticStep:
    """Samples a Flow-CPS step `next = mean + std noise`, see `cps_mean_std`.

    Args:
      x, v, noise: float[B, M, C]; `noise` is standard normal.
      sigma, sigma_next, noise_level: as in `cps_mean_std`.
    """
    chex.assert_equal_shape([x, v, noise])
    mean, std = cps_mean_std(x, v, sigma, sigma_next, noise_level)
    return StochasticStep(mean + _per_row(std) * noise.astype(jnp.float32), mean, std)


def cps_log_prob(next_x: jax.Array, mean: jax.Array) -> jax.Array:
    """Computes the log-prob of a Flow-CPS step, without its variance: `mean of -(next - mean)^2`.

    Args:
      next_x, mean: float[B, M, C].
    Returns:
      float32[B].
    """
    next_x, mean = _latents(next_x, mean)
    return -jnp.mean(jnp.square(next_x - mean), axis=(1, 2))


def _latents(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays in float32, after checking that all are [B, M, C]."""
    chex.assert_rank(list(arrays), 3)
    chex.assert_equal_shape(list(arrays))
    return tuple(array.astype(jnp.float32) for array in arrays)


def _per_row(scalar: jax.Array) -> jax.Array:
    """Returns a factor of shape [] as it is, one of shape [B] as [B, 1, 1]."""
    chex.assert_rank(scalar, {0, 1})
    return scalar if scalar.ndim == 0 else scalar[:, None, None]
