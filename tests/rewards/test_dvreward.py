import math

import pytest

from alphagrpo_jax.rewards.dvreward import INVALID, dvreward


def test_geometric_by_hand():
    got = dvreward([0.9, 0.7], [0.5])
    assert got.valid
    assert got.semantic == pytest.approx(0.8)
    assert got.quality == pytest.approx(0.5)
    assert got.reward == pytest.approx(math.sqrt(0.4))


def test_other_aggregates():
    assert dvreward([0.9, 0.7], [0.5], aggregate="mean").reward == pytest.approx(0.65)
    assert dvreward([0.9, 0.7], [0.5], aggregate="pooled").reward == pytest.approx(0.7)


def test_binary_scores():
    got = dvreward([0.51, 0.5, 0.0, 1.0], [0.9], score="binary")
    assert (got.semantic, got.quality) == (0.5, 1.0)
    assert got.reward == pytest.approx(math.sqrt(0.5))


def test_ends_of_the_range():
    assert dvreward([1.0, 1.0], [1.0]).reward == 1.0
    assert dvreward([0.0], [1.0]).reward == 0.0  # an honest zero
    assert dvreward([0.0], [1.0]).valid


@pytest.mark.parametrize("bad", [None, math.nan, -0.1, 1.1, math.inf])
@pytest.mark.parametrize("aggregate", ["geometric", "mean", "pooled"])
def test_a_missing_or_impossible_answer_makes_the_reward_invalid(bad, aggregate):
    for got in (
        dvreward([0.9, bad], [0.5], aggregate=aggregate),
        dvreward([0.9], [0.5, bad], aggregate=aggregate),
    ):
        assert not got.valid
        assert math.isnan(got.reward)
    assert got is INVALID
    assert dvreward([], []) is INVALID


def test_one_kind_of_questions_only():
    got = dvreward([0.25, 0.75], [])
    assert (got.reward, got.semantic, got.valid) == (0.5, 0.5, True)
    assert math.isnan(got.quality)
    assert dvreward([], [0.5]).quality == 0.5


def test_unknown_options():
    with pytest.raises(ValueError, match="score='sum'"):
        dvreward([0.5], [0.5], score="sum")
    with pytest.raises(ValueError, match="aggregate='max'"):
        dvreward([0.5], [0.5], aggregate="max")
