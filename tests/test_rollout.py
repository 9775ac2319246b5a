"""What a batch of trajectories holds on the devices, and until when."""

import jax.numpy as jnp

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
