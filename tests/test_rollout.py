"""What a batch of trajectories holds on the devices, and until when."""

import jax.numpy as jnp
import pytest

from alphagrpo_jax import rollout
from alphagrpo_jax.types import Rollout, RolloutBatch, TextSample


def test_released_trajectories_hold_no_memory():
    tokens = jnp.zeros((2, 3), jnp.int32)
    flags, numbers = jnp.ones((2, 3), bool), jnp.zeros((2, 2))
    sample = TextSample(tokens, flags, flags[:, 1:], numbers, flags[:, 0])
    trajectories = Rollout((), jnp.arange(2), (None,), (sample,), ())
    batch = RolloutBatch(None, trajectories, [], [], [], {"text/length": 3.0})
    rollout.release([batch])
    assert tokens.is_deleted()
    assert trajectories.owner.is_deleted()
    assert batch.metrics == {"text/length": 3.0}  # what lies on the host stays


def test_the_spread_of_a_groups_images_by_hand():
    """Two groups of two, a row of filling: variance 1 within, 1 + 4 over all."""
    latents = jnp.array([1.0, 3.0, 5.0, 7.0, 90.0]).reshape(5, 1, 1)
    spread = rollout._group_spread(latents, 4, 2)
    assert float(spread) == pytest.approx((1 / 5) ** 0.5)
    alike = jnp.array([1.0, 1.0, 5.0, 5.0]).reshape(4, 1, 1)
    assert float(rollout._group_spread(alike, 4, 2)) == 0.0
