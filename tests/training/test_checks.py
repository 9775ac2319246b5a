"""When a run warns."""

import pathlib

import jax.numpy as jnp
import pytest
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.training.checks import TrainingError, check_sampled, early_decay
from alphagrpo_jax.types import ImageSample, Rollout


@pytest.mark.parametrize(
    ("steps", "decay", "updates", "warns"),
    [(4, 0, 1, False), (4, 4, 1, False), (5, 4, 1, True), (4, 4, 2, True), (0, 4, 1, False)],
)
def test_a_rate_that_ends_before_the_run_is_told(steps, decay, updates, warns):
    fields = tiny_world.config(pathlib.Path())
    fields.train.steps, fields.optimizer.decay_steps = steps, decay
    fields.train.updates_per_batch = updates
    notice = early_decay(config_lib.from_config_dict(fields))
    assert bool(notice) == warns
    if warns:
        assert f"0 from applied update {decay} on" in notice


def test_images_that_are_no_numbers_stop_a_run_though_no_step_was_stochastic():
    """As with sampler "ode", whose log-probs are 0."""
    noise, zeros = jnp.ones((2, 1, 3, 4)), jnp.zeros((2, 1))
    for value in (1.0, jnp.nan):
        latents = jnp.full((2, 3, 4), value)
        sample = ImageSample(noise, noise, zeros, zeros, jnp.int32(0), latents)
        trajectories = Rollout((), jnp.arange(2), (), (), (sample,))
        if value == 1.0:
            check_sampled(trajectories, 7)
            continue
        with pytest.raises(TrainingError, match="step 7: the sampled log-probs or images are not"):
            check_sampled(trajectories, 7)
