"""When a run warns."""

import pathlib

import pytest
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.training.checks import early_decay


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
