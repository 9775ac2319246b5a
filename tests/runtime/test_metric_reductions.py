"""The table of reductions: complete, and without surprises for whoever reads a metric's name."""

import pytest

from alphagrpo_jax.runtime.metric_reductions import (
    DEFAULT,
    LARGEST_DEVIATION,
    MEAN,
    REDUCTIONS,
    is_listed,
    reduction_of,
)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_only_metrics_named_max_are_reduced_to_their_largest_value(name):
    largest = reduction_of(name) == LARGEST_DEVIATION
    assert largest == ("max" in name)
    assert largest or reduction_of(name) == MEAN


def test_families_and_the_default():
    assert reduction_of("reward/tag/Count") is REDUCTIONS["reward/tag/"]
    assert is_listed("reward/score/binary")
    assert not is_listed("reward/bonus")
    assert reduction_of("reward/bonus") is DEFAULT
    assert not is_listed("tag/Count")
