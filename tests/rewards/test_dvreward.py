import math

import numpy as np
import pytest

from alphagrpo_jax.rewards.dvreward import INVALID, dependent, dvreward


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


def test_a_child_counts_only_if_its_parents_hold():
    """Is there a cat? .9, is it red? .8; is there a mat? .5 (does not hold), is it old? .7."""
    scores = np.array([0.9, 0.8, 0.5, 0.7])
    got = dependent(scores, [(), (0,), (), (2,)])
    np.testing.assert_array_equal(got, [0.9, 0.8, 0.5, 0.0])
    np.testing.assert_array_equal(dependent(scores, [(), (0, 2), (), (0,)]), [0.9, 0.0, 0.5, 0.7])
    np.testing.assert_array_equal(scores, [0.9, 0.8, 0.5, 0.7])  # left as they were


def test_a_failed_parent_is_not_handed_on_to_grandchildren():
    """0 fails, so 1 counts as 0; 2 depends on 1, whose own score holds."""
    got = dependent(np.array([0.2, 0.9, 0.8]), [(), (0,), (1,)])
    np.testing.assert_array_equal(got, [0.2, 0.0, 0.8])


def test_dependency_aware_rewards_by_hand():
    semantic, quality, parents = [0.4, 0.8, 0.6], [0.9, 0.7], [(), (0,), (), (0,), (2,)]
    got = dvreward(semantic, quality, parents=parents)
    assert got.semantic == pytest.approx((0.4 + 0.0 + 0.6) / 3)
    assert got.quality == pytest.approx((0.0 + 0.7) / 2)
    assert got.reward == pytest.approx(math.sqrt(1 / 3 * 0.35))
    binary = dvreward(semantic, quality, score="binary", aggregate="pooled", parents=parents)
    assert binary.reward == pytest.approx((0 + 0 + 1 + 0 + 1) / 5)
    assert dvreward(semantic, quality, parents=[()] * 5) == dvreward(semantic, quality)


def test_a_missing_answer_stays_missing_whatever_its_parents():
    got = dvreward([0.1, None], [0.9], parents=[(), (0,), ()])
    assert got is INVALID


@pytest.mark.parametrize("parents", [[()], [(), (2,)], [(), (-1,)]])
def test_parents_that_do_not_fit(parents):
    with pytest.raises(ValueError, match="parents"):
        dvreward([0.9], [0.9], parents=parents)
