"""The table of reductions: complete, and without surprises for whoever reads a metric's name."""

import math

import pytest

from alphagrpo_jax.runtime.metric_reductions import (
    DEFAULT,
    LARGEST_DEVIATION,
    MEAN,
    REDUCTIONS,
    is_listed,
    merge_batches,
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


def test_metrics_of_a_mixed_update():
    largest = "text/ratio_max_dev"
    batches = [{"a": 1.0, largest: 1.0}, {"a": 3.0, largest: 5.0}, {"a": 8.0, "c": 2.0}]
    names = ["rt2i", "srr", "rt2i"]
    assert merge_batches(batches, names, by_task=True) == {
        "a": 4.0, largest: 5.0, "c": 2.0, "rt2i/a": 4.5, f"rt2i/{largest}": 1.0, "rt2i/c": 2.0,
        "srr/a": 3.0, f"srr/{largest}": 5.0,
    }  # fmt: skip
    assert merge_batches(batches[:1], ["rt2i"], by_task=False) == batches[0]


def test_unknown_values_do_not_count():
    batches = [{"a": float("nan"), "b": float("nan")}, {"a": 2.0, "b": float("nan")}]
    merged = merge_batches(batches, ["rt2i"] * 2, by_task=False)
    assert merged["a"] == 2.0
    assert math.isnan(merged["b"])
