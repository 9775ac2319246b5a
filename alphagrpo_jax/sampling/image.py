"""Samples images: ODE steps down the schedule, a short window of which may be stochastic."""

import functools
from itertools import groupby

import chex
import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import policy
from alphagrpo_jax.config import ImageOptions
from alphagrpo_jax.flow import schedule, sde
from alphagrpo_jax.flow.guidance import is_active
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import GuidanceContexts
from alphagrpo_jax.types import ImageSample


def noise_levels(options: ImageOptions) -> np.ndarray:
    """Returns the noise levels of the options' schedule, float32[num_points] from 1 to 0."""
    return schedule.sigmas(options.num_points, shift=options.shift)


def sample_image(
    model: Bagel,
    params: policy.PolicyParams,
    contexts: GuidanceContexts,
    initial: jax.Array,
    noise_keys: jax.Array,
    start: jax.Array,
    *,
    options: ImageOptions,
    grid: tuple[int, int],
    stochastic: bool = True,
) -> ImageSample:
    """Samples one image per row; steps start .. start + J - 1 are stochastic, the others ODE.

    With sampler "ode" all steps are ODE, and the finished image is noised again at J levels.
    The start is traced, so that every window runs through the same compiled code. Row i's image
    depends on its own contexts, initial noise and key only.

    Args:
      model, params: the policy.
      contexts: of B rows, merged.
      initial: float32[B, M, C] noise.
      noise_keys: typed key[B], for the stochastic steps, or levels and noise of "ode".
      start: int32[].
      options: static.
      grid: latent token rows and columns, static.
      stochastic: static; False: all steps are ODE and none is trained (J = 0); start and keys are
        not used.
    """
    chex.assert_rank([initial, noise_keys, start], [3, 1, 0])
    chex.assert_type(initial, jnp.float32)
    levels = noise_levels(options)
    window = options.window if stochastic and options.sampler != "ode" else 0
    shape = (max(window, 1), *initial.shape[1:])
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(noise_keys)

    def step(x: jax.Array, at: jax.Array, *, guided: bool) -> tuple[jax.Array, tuple]:
        sigma, sigma_next = jnp.asarray(levels)[at], jnp.asarray(levels)[at + 1]
        v = _velocity(model, params, contexts, x, sigma, options, grid, guided=guided)
        after = sde.ode_step(x, v, sigma, sigma_next)
        if not window:
            return after, ()
        step_noise = jnp.take(noise, jnp.clip(at - start, 0, window - 1), axis=1)
        mean, std = transition(x, v, sigma, sigma_next, options=options)
        scale = std * jnp.sqrt(sigma - sigma_next) if options.sampler == "sde" else std
        in_window = (at >= start) & (at < start + window)
        after = jnp.where(in_window, mean + scale * step_noise, after)
        return after, (x, after, log_prob(after, mean, std, sigma, sigma_next, options=options))

    x, trails, at = initial, [], 0
    # One scan per stretch of steps with and without guidance: only there are branches evaluated.
    for guided, stretch in groupby(levels[:-1], key=functools.partial(is_active, options.guidance)):
        count = len(list(stretch))
        steps = jnp.arange(at, at + count, dtype=jnp.int32)
        x, trail = jax.lax.scan(functools.partial(step, guided=guided), x, steps)
        trails.append(trail)
        at += count
    if not window:
        count = options.window if stochastic else 0
        return noised_again(x, noise_keys, start, count=count, options=options)
    before, after, logp = (
        jnp.moveaxis(
            jax.lax.dynamic_slice_in_dim(jnp.concatenate(arrays), start, window, axis=0), 0, 1
        )
        for arrays in zip(*trails, strict=True)
    )
    sigma = jnp.broadcast_to(
        jax.lax.dynamic_slice_in_dim(jnp.asarray(levels), start, window), logp.shape
    )
    return ImageSample(before, after, sigma, logp, start, x)


def noised_again(
    latents: jax.Array,
    keys: jax.Array,
    start: jax.Array,
    *,
    count: int,
    options: ImageOptions,
) -> ImageSample:
    """Noises finished images at `count` levels of the window's range, different ones in a row.

    Args:
      latents: float32[B, M, C].
      keys: typed key[B], of which levels and noise are made.
      start: int32[], kept with the sample.
      count: J.
      options: static.
    """
    lo, hi = options.window_range
    levels = jnp.asarray(noise_levels(options))[lo:hi]

    def of_row(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        level_key, noise_key = jax.random.split(key)
        sigma = jax.random.permutation(level_key, levels)[:count]
        return sigma, jax.random.normal(noise_key, (count, *x.shape), jnp.float32)

    sigma, noise = jax.vmap(of_row)(keys, latents)
    weight = sigma[..., None, None]
    before = (1.0 - weight) * latents[:, None] + weight * noise
    return ImageSample(before, noise, sigma, jnp.zeros_like(sigma), start, latents)


def image_log_probs(
    model: Bagel,
    params: policy.PolicyParams,
    contexts: GuidanceContexts,
    sample: ImageSample,
    *,
    options: ImageOptions,
    grid: tuple[int, int],
    at_once: bool,
) -> tuple[jax.Array, jax.Array]:
    """Computes log-probs and means of a sample's stochastic steps, guided as they were sampled.

    Args:
      model, params: the policy whose log-probs they are.
      contexts: of B rows, merged.
      sample: the images.
      options: static.
      grid: latent token rows and columns, static.
      at_once: static; all steps as rows of one pass, in place of one pass after the other.
    Returns:
      float32[B, J] log-probs; float32[B, J, M, C] means.
    """
    levels = jnp.asarray(noise_levels(options))
    lo, hi = options.window_range
    # None, decided per row on the device, only where the window may lie on both sides.
    decisions = {is_active(options.guidance, sigma) for sigma in noise_levels(options)[lo:hi]}
    guided = decisions.pop() if len(decisions) == 1 else None
    batch, steps = sample.before.shape[:2]
    at = sample.start + jnp.arange(steps, dtype=jnp.int32)

    def scores(x: jax.Array, v: jax.Array, x_next: jax.Array, at: jax.Array) -> tuple:
        sigma, sigma_next = levels[at], levels[at + 1]
        mean, std = transition(x, v, sigma, sigma_next, options=options)
        return log_prob(x_next, mean, std, sigma, sigma_next, options=options), mean

    def step(_: None, inputs: tuple) -> tuple[None, tuple]:
        x, x_next, at = inputs
        v = _velocity(model, params, contexts, x, levels[at], options, grid, guided=guided)
        return None, scores(x, v, x_next, at)

    before, after = (jnp.moveaxis(x, 1, 0) for x in (sample.before, sample.after))
    if at_once:
        shared = GuidanceContexts(
            *(
                kv_cache.repeat(ctx, steps)
                for ctx in (contexts.gen, contexts.cfg_text, contexts.cfg_img)
            )
        )
        rows = sample.before.reshape(batch * steps, *before.shape[2:])
        sigmas = jnp.tile(levels[at], batch)
        v = _velocity(model, params, shared, rows, sigmas, options, grid, guided=guided)
        v = v.reshape(sample.before.shape)
        logp, mean = jax.vmap(scores)(before, jnp.moveaxis(v, 1, 0), after, at)
    else:
        _, (logp, mean) = jax.lax.scan(step, None, (before, after, at))
    return jnp.moveaxis(logp, 0, 1), jnp.moveaxis(mean, 0, 1)


def image_velocities(
    model: Bagel,
    params: policy.PolicyParams,
    ctx: kv_cache.Context,
    sample: ImageSample,
    *,
    grid: tuple[int, int],
    at_once: bool,
) -> jax.Array:
    """Computes the velocities of a sample's latents `before`, without guidance.

    Args:
      model, params: the policy whose velocities they are.
      ctx: the context that images are conditioned on, of B rows, merged.
      sample: the images.
      grid: latent token rows and columns, static.
      at_once: static; all levels as rows of one pass, in place of one pass after the other.
    Returns:
      float32[B, J, M, C].
    """
    if at_once:
        return policy.packed_velocity(model, params, ctx, sample.before, sample.sigma, grid)

    def step(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x, sigma = inputs
        return None, policy.velocity(model, params, ctx, x, sigma, grid)

    by_level = (jnp.moveaxis(sample.before, 1, 0), jnp.moveaxis(sample.sigma, 1, 0))
    _, velocities = jax.lax.scan(step, None, by_level)
    return jnp.moveaxis(velocities, 0, 1)


def transition(
    x: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array, *, options: ImageOptions
) -> tuple[jax.Array, jax.Array]:
    """Computes mean float32[B, M, C] and std float32[] of a stochastic step of the sampler."""
    if options.sampler == "cps":
        return sde.cps_mean_std(x, v, sigma, sigma_next, options.noise_level)
    second = jnp.float32(noise_levels(options)[1])
    return sde.sde_mean_std(x, v, sigma, sigma_next, second, options.noise_level)


def log_prob(
    after: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    *,
    options: ImageOptions,
) -> jax.Array:
    """Computes the log-prob of the sampler's step, float32[B]."""
    if options.sampler == "cps":
        return sde.cps_log_prob(after, mean)
    return sde.sde_log_prob(after, mean, std, sigma, sigma_next)


def _velocity(
    model: Bagel,
    params: policy.PolicyParams,
    contexts: GuidanceContexts,
    x: jax.Array,
    sigma: jax.Array,
    options: ImageOptions,
    grid: tuple[int, int],
    *,
    guided: bool | None,
) -> jax.Array:
    """Computes the guided velocity of all rows at a noise level float32[] or float32[B]."""
    rows = jnp.broadcast_to(sigma, x.shape[:1])
    return policy.guided_velocity(
        model, params, contexts, x, rows, grid, options.guidance, active=guided
    )
