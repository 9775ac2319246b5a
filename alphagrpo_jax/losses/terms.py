"""The inputs of the losses, and the arithmetic that they share.

Conventions: an image log-prob is a mean over the latent (see `flow.sde`); a text log-prob is one
token's. Every loss returns its micro-batch's *share* of the update's loss: sums divided by the
totals of the whole update, which the caller passes in. Shares of micro-batches therefore add up to
the same loss and the same gradient however the update is cut; metrics add up too, or their largest
counts, by the table of `runtime.metric_reductions`. Invalid trajectories (`valid` false) count
nowhere.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]  # float32[] each


class TextTerms(NamedTuple):
    """Inputs of the text loss: B trajectories with T scored tokens."""

    new_logp: jax.Array  # float32[B, T], differentiated
    old_logp: jax.Array  # float32[B, T]
    mask: jax.Array  # bool[B, T], the texts' tokens
    advantage: jax.Array  # float32[B]
    entropy: jax.Array  # float32[B, T], for the metrics only
    ref_logp: jax.Array | None = None  # float32[B, T], needed if text_beta > 0
    selected: jax.Array | None = None  # bool[B, T], tokens whose policy loss is trained; None: all


class ImageTerms(NamedTuple):
    """Inputs of the image loss: B trajectories with J stochastic steps."""

    new_logp: jax.Array  # float32[B, J], differentiated
    old_logp: jax.Array  # float32[B, J]
    advantage: jax.Array  # float32[B]
    kl: jax.Array | None = None  # float32[B, J] from `gaussian_kl`, needed if image_beta > 0


class MatchingTerms(NamedTuple):
    """Inputs of the losses that match velocities: B finished images, noised again J times each."""

    velocity: jax.Array  # float32[B, J, M, C], differentiated
    target: jax.Array  # float32[B, J, M, C], noise minus finished image
    sigma: jax.Array  # float32[B, J], noise levels
    advantage: jax.Array  # float32[B]
    old_velocity: jax.Array  # float32[B, J, M, C], of the policy before the update
    average_velocity: jax.Array  # float32[B, J, M, C], of the moving average of policies
    ref_velocity: jax.Array | None = None  # float32[B, J, M, C], needed if image_beta > 0


def check_matching(image: MatchingTerms, valid: jax.Array, *, image_beta: float) -> None:
    """Refuses terms that do not fit each other.

    Raises:
      ValueError: `image_beta` without reference velocities.
    """
    if image_beta and image.ref_velocity is None:
        raise ValueError(
            f"got image_beta={image_beta} without ref_velocity; pass the reference velocities"
        )
    chex.assert_rank([image.velocity, image.sigma, image.advantage, valid], [4, 2, 1, 1])
    velocities = [image.velocity, image.target, image.old_velocity, image.average_velocity]
    velocities += [] if image.ref_velocity is None else [image.ref_velocity]
    chex.assert_equal_shape(velocities)
    chex.assert_equal_shape([image.advantage, valid])
    chex.assert_shape(image.sigma, image.velocity.shape[:2])
    chex.assert_type(
        [*velocities, image.sigma, valid], [jnp.float32] * (len(velocities) + 1) + [bool]
    )


def clipped_advantage(advantage: jax.Array, valid: jax.Array, limit: float) -> jax.Array:
    """Bounds the advantages of valid trajectories by +-limit; those of the others are 0."""
    return jnp.clip(jnp.where(valid, advantage, 0.0), -limit, limit)


def squared_gap(first: jax.Array, second: jax.Array) -> jax.Array:
    """Computes the mean squared difference over the latents float32[B, J, M, C]: float32[B, J]."""
    return jnp.mean(jnp.square(first - second), axis=(2, 3))


def masked_difference(a: jax.Array, b: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `a - b` where the mask holds, else 0, so that padding never meets an exponential."""
    return jnp.where(mask, a - b, 0.0)


def clipped_surrogate(
    log_ratio: jax.Array, advantage: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """Computes PPO's pessimistic surrogate as a loss, and where clipping took the gradient.

    `max(-rho A, -clip(rho, 1 - low, 1 + high) A)` with `rho = exp(log_ratio)` (arXiv 1707.06347,
    eq. 7).
    """
    ratio = jnp.exp(log_ratio)
    plain = -ratio * advantage
    bounded = -jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantage
    return jnp.maximum(plain, bounded), (bounded > plain).astype(jnp.float32)


def share_of_mean(terms: jax.Array, mask: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides the sum of the masked terms by the update's denominator (at least 1)."""
    total = jnp.sum(jnp.where(mask, terms, 0.0))
    return total / jnp.maximum(jnp.asarray(denominator, jnp.float32), 1.0)


def matching_share(
    terms: jax.Array,
    image: MatchingTerms,
    valid: jax.Array,
    trajectories_total: jax.Array,
    *,
    image_beta: float,
) -> tuple[jax.Array, Metrics]:
    """Averages the terms of a loss that matches velocities, and adds the distance to a reference.

    Args:
      terms: float32[B, J].
      image: for the reference and the metrics.
      valid: bool[B].
      trajectories_total: float32[].
      image_beta: weight of `mean((v - v_ref)^2)`.
    Returns:
      (float32[] share, metrics): `loss/image`; `image/target_error`, the mean of
      `(v - target)^2`; `image/average_gap`, that of `(v - v_avg)^2`; and `image/kl`, that of
      `(v - v_ref)^2`, where a reference is given.
    """
    steps = jnp.broadcast_to(valid[:, None], terms.shape)
    denominator = trajectories_total * terms.shape[1]

    def mean(values: jax.Array) -> jax.Array:
        return share_of_mean(values, steps, denominator)

    loss = mean(terms)
    metrics = {
        "image/target_error": mean(squared_gap(image.velocity, image.target)),
        "image/average_gap": mean(squared_gap(image.velocity, image.average_velocity)),
    }
    if image.ref_velocity is not None:
        distance = mean(squared_gap(image.velocity, image.ref_velocity))
        if image_beta:
            loss += image_beta * distance
        metrics["image/kl"] = distance
    return loss, jax.lax.stop_gradient(metrics | {"loss/image": loss})
