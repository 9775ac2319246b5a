import numpy as np
import pytest
from default_options import advantage_options

from alphagrpo_jax import advantage
from alphagrpo_jax.types import BatchRewards

REWARD = np.array([[0.0, 1.0, 0.5], [0.2, 0.2, 0.8]])
ALL = np.ones((2, 3), bool)


def group_advantage(reward, valid, *, initial=None, **changes):
    options = advantage_options(**{"std": "global_raw", **changes})
    return advantage.group_advantage(reward, valid, options, initial=initial)


def test_global_raw_by_hand():
    got = group_advantage(REWARD, ALL)
    std = np.sqrt(np.mean((REWARD - 0.45) ** 2))  # population, around the mean of all six
    expected = (REWARD - [[0.5], [0.4]]) / (std + 1e-4)
    np.testing.assert_allclose(got.advantage, expected, rtol=1e-6)
    assert got.advantage.dtype == np.float32
    assert got.used.all()
    assert not got.all_zero
    assert got.metrics["group/zero_std_fraction"] == 0.0
    assert got.metrics["advantage/scale"] == pytest.approx(std)


def test_other_scales_by_hand():
    centred = REWARD - [[0.5], [0.4]]
    got = group_advantage(REWARD, ALL, std="global_centered").advantage
    np.testing.assert_allclose(got, centred / (np.sqrt(np.mean(centred**2)) + 1e-4), rtol=1e-6)
    got = group_advantage(REWARD, ALL, std="group").advantage
    np.testing.assert_allclose(got, centred / (REWARD.std(1, keepdims=True) + 1e-4), rtol=1e-6)
    got = group_advantage(REWARD, ALL, std="none").advantage
    np.testing.assert_allclose(got, centred, rtol=1e-6)


def test_invalid_samples_count_nowhere():
    reward = np.array([[0.0, 1.0, np.nan, 0.5], [0.2, 1e9, 0.2, 0.8]])
    valid = np.array([[True, True, False, True], [True, False, True, True]])
    for std in ("global_raw", "global_centered", "group", "none"):
        got = group_advantage(reward, valid, std=std)
        expected = group_advantage(REWARD, ALL, std=std).advantage
        np.testing.assert_array_equal(got.advantage[valid], expected.ravel())
        np.testing.assert_array_equal(got.advantage[~valid], 0.0)
        np.testing.assert_array_equal(got.used, valid)


def test_groups_with_fewer_than_two_valid_samples_are_left_out():
    reward = np.array([[0.1, 0.9], [0.4, np.nan], [np.nan, np.nan]])
    got = group_advantage(reward, np.isfinite(reward))
    np.testing.assert_array_equal(got.used, [[True, True], [False, False], [False, False]])
    # the lone valid sample still counts for the standard deviation of all valid samples
    std = np.std([0.1, 0.9, 0.4])
    np.testing.assert_allclose(got.advantage[0], np.array([-0.4, 0.4]) / (std + 1e-4), rtol=1e-6)
    np.testing.assert_array_equal(got.advantage[1:], 0.0)
    assert got.metrics["group/left_out_fraction"] == pytest.approx(2 / 3)


def test_equal_rewards_give_exactly_zero():
    # the mean of three times 0.1 is not 0.1 in floating point
    reward = np.full((2, 3), 0.1)
    for std in ("global_raw", "global_centered", "group", "none"):
        got = group_advantage(reward, ALL, std=std)
        assert got.all_zero
        assert got.metrics["group/zero_std_fraction"] == 1.0
    half = group_advantage(np.array([[0.1, 0.1, 0.1], [0.0, 0.5, 1.0]]), ALL)
    np.testing.assert_array_equal(half.advantage[0], 0.0)
    assert half.metrics["group/zero_std_fraction"] == 0.5


def test_no_valid_sample_at_all():
    got = group_advantage(np.full((2, 3), np.nan), ~ALL)
    assert got.all_zero
    assert not got.used.any()
    assert got.metrics["group/zero_std_fraction"] == 0.0
    assert got.metrics["group/left_out_fraction"] == 1.0


def test_baselines_by_hand():
    initial = np.array([0.75, 0.1])
    std = REWARD.std()
    got = group_advantage(REWARD, ALL, baseline="initial", initial=initial).advantage
    np.testing.assert_allclose(got, (REWARD - initial[:, None]) / (std + 1e-4), rtol=1e-6)
    # all equal, yet better than the initial image: that is an advantage
    got = group_advantage(np.full((1, 2), 0.6), ALL[:1, :2], baseline="initial", initial=[0.5])
    np.testing.assert_allclose(got.advantage, 0.1 / 1e-4, rtol=1e-5)


@pytest.mark.parametrize("std", ["global_raw", "global_centered", "group", "none"])
def test_the_anchor_scales_each_group_by_its_root_mean_square(std):
    """Rewards less 0.75, the initial one, and 0.4, the group's mean: the larger of the two."""
    initial = np.array([0.75, 0.1])
    got = group_advantage(REWARD, ALL, baseline="anchor", initial=initial, std=std)
    differences = np.array([[-0.75, 0.25, -0.25], [-0.2, -0.2, 0.4]])
    squares = np.array([[(9 + 1 + 1) / 16 / 3], [(0.04 + 0.04 + 0.16) / 3]])
    expected = differences / np.sqrt(squares + 1e-8)
    np.testing.assert_allclose(got.advantage, expected, rtol=1e-6)
    # the square root of 1e-8 is all that divides a group that is exactly as good as its anchor
    small = np.array([[0.5, 0.5 + 2e-4]])
    got = group_advantage(small, ALL[:, :2][:1], baseline="anchor", initial=[0.5], std=std)
    np.testing.assert_allclose(got.advantage, [[-(0.5**0.5), 0.5**0.5]], rtol=1e-6)
    # an invalid member takes no part in the mean square
    valid = np.array([[True, True, False], [True, True, True]])
    got = group_advantage(REWARD, valid, baseline="anchor", initial=initial, std=std)
    expected = np.array([-0.75, 0.25]) / np.sqrt((9 + 1) / 16 / 2 + 1e-8)
    np.testing.assert_allclose(got.advantage[0, :2], expected, rtol=1e-6)


def test_equal_rewards_above_their_anchor_give_exactly_zero():
    got = group_advantage(np.full((2, 3), 0.1), ALL, baseline="anchor", initial=[0.05, 0.0])
    assert got.all_zero


def test_texts_with_a_reward_of_their_own_keep_the_mean_of_their_group():
    """Images are compared with the initial image, 0.75 and 0.1; texts with one another."""
    options = advantage_options(std="none", baseline="initial")
    text = REWARD + np.array([[0.5, 0.0, 0.25], [0.0, 0.5, 0.5]])
    initial = np.array([0.75, 0.1])
    rewards = BatchRewards(text, REWARD, ALL, None, initial, improved=True, metrics={})
    got = advantage.of_batch(rewards, options)
    expected = [[-0.25, 0.25, 0.0], [-8 / 15, -1 / 30, 17 / 30]]
    np.testing.assert_allclose(got.text.advantage, expected, atol=1e-6)
    np.testing.assert_allclose(got.image, REWARD - initial[:, None], atol=1e-6)
    shared = advantage.of_batch(rewards._replace(text=REWARD, text_initial=initial), options)
    np.testing.assert_array_equal(shared.text.advantage, got.image)


def test_order_within_a_group_does_not_matter():
    rng = np.random.default_rng(0)
    reward = rng.random((4, 6))
    valid = rng.random((4, 6)) < 0.7
    order = rng.permutation(6)
    got = group_advantage(reward, valid).advantage[:, order]
    np.testing.assert_allclose(
        group_advantage(reward[:, order], valid[:, order]).advantage, got, atol=1e-6
    )


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and valid of shape \(3, 2\)"):
        group_advantage(REWARD, ALL.T)
    with pytest.raises(ValueError, match=r"got reward nan at \(prompt, member\) \(1, 0\)"):
        group_advantage(np.array([[0.0, 1.0], [np.nan, 1.0]]), ALL[:, :2])
    with pytest.raises(ValueError, match=r"std\n  Input should be 'global_raw',"):
        group_advantage(REWARD, ALL, std="local")
    with pytest.raises(ValueError, match=r"baseline\n  Input should be 'group',"):
        group_advantage(REWARD, ALL, baseline="best")
    with pytest.raises(ValueError, match="needs the finite rewards of 2 initial images"):
        group_advantage(REWARD, ALL, baseline="anchor")
