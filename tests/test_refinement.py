"""Choice of initial images, rectified rewards and the queue, on numbers made by hand."""

import json
from typing import get_args

import numpy as np
import pytest

from alphagrpo_jax.config import InitialChoice
from alphagrpo_jax.refinement import choose_initial, outcomes, rectify
from alphagrpo_jax.types import InitialImageQueue

REWARD = np.array([[0.9, 0.2, 0.2, 0.5], [0.1, 0.8, 0.7, 0.6], [0.3, 0.3, 0.3, 0.3]])
VALID = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]], bool)


def test_the_worst_valid_image_is_repaired_and_the_first_of_equals():
    chosen, has_valid = choose_initial(REWARD, VALID, choice="worst", rng=np.random.default_rng(0))
    assert chosen[:2].tolist() == [1, 3]
    assert has_valid.tolist() == [True, True, False]


def test_softmax_draws_in_proportion_and_never_an_invalid_image():
    reward, valid = np.repeat(REWARD[1:2], 40_000, 0), np.repeat(VALID[1:2], 40_000, 0)
    chosen, _ = choose_initial(reward, valid, choice="softmax", rng=np.random.default_rng(1))
    shares = np.bincount(chosen, minlength=4) / len(chosen)
    weights = np.exp(1 - REWARD[1]) * VALID[1]
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)
    assert shares[0] == 0


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_softmax_takes_rewards_of_any_size(level):
    reward, valid = np.repeat(REWARD[1:2], 400, 0), np.repeat(VALID[1:2], 400, 0)
    pair = [
        choose_initial(values, valid, choice="softmax", rng=np.random.default_rng(1))[0]
        for values in (reward, reward + level)
    ]
    np.testing.assert_array_equal(*pair)


def test_values_of_invalid_images_are_never_looked_at():
    broken = np.where(VALID, REWARD, np.nan)
    for choice in get_args(InitialChoice):
        pair = (np.random.default_rng(2), np.random.default_rng(2))
        expected, _ = choose_initial(REWARD, VALID, choice=choice, rng=pair[0])
        chosen, _ = choose_initial(broken, VALID, choice=choice, rng=pair[1])
        assert chosen[:2].tolist() == expected[:2].tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [[0.6, 0.5, 0.4, np.nan], [0.9, 0.8, 0.95, 0.7]]),
        ("released", [[0.6, 0.5, 0.5, np.nan], [0.9, 0.9, 0.95, 0.9]]),
        ("paper", [[0.6, 0.4, 0.4, np.nan], [0.7, 0.7, 0.95, 0.7]]),
    ],
)
def test_rectification_by_hand(mode, expected):
    """The second member only equals its initial image; the fourth of the first group is invalid."""
    reward = np.array([[0.6, 0.5, 0.4, np.nan], [0.9, 0.8, 0.95, 0.7]])
    valid = ~np.isnan(reward)
    rectified = rectify(reward, valid, np.array([0.5, 0.9]), mode=mode)
    np.testing.assert_array_equal(rectified.reward, expected)
    assert rectified.improved.tolist() == [
        [True, False, False, False],
        [False, False, True, False],
    ]


def test_an_invalid_sample_does_not_lower_the_groups_minimum():
    reward = np.array([[0.6, 0.4, -5.0]])
    valid = np.array([[True, True, False]])
    rectified = rectify(reward, valid, np.array([0.5]), mode="paper")
    assert rectified.reward[0].tolist() == [0.6, 0.4, -5.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "other"}, "mode='other'"),
        ({"initial": np.array([np.nan])}, "not finite"),
    ],
)
def test_bad_rectification_is_refused(arguments, message):
    options = {"initial": np.zeros(1), "mode": "paper"} | arguments
    initial = options.pop("initial")
    with pytest.raises(ValueError, match=message):
        rectify(np.zeros((1, 2)), np.ones((1, 2), bool), initial, **options)


def test_outcomes_are_shares():
    shares = outcomes(np.array([0.5, 0.5, 1.0, 0.0]), np.array([1.0, 0.5, 0.5, 0.25]))
    assert shares == {"improved": 0.5, "kept": 0.25, "spoilt": 0.25}


def entries(first: int, count: int) -> tuple:
    numbers = np.arange(first, first + count)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 2, 2, 3)).astype(np.uint8)
    return numbers, images, numbers / 7


def test_a_queue_hands_out_the_oldest_first_and_survives_a_checkpoint():
    queue = InitialImageQueue.empty(6, 2, 2)
    queue.add(*entries(0, 4))
    assert queue.take(3).row.tolist() == [0, 1, 2]
    queue.add(*entries(4, 3))
    numbers = json.loads(json.dumps(queue.progress()))
    again = InitialImageQueue.restored(queue.image.copy(), numbers)
    for current in (queue, again):
        assert int(current.count) == 4
        batch = current.take(4)
        assert batch.row.tolist() == [3, 4, 5, 6]
        assert batch.reward.tolist() == [n / 7 for n in (3, 4, 5, 6)]  # to the last bit
        assert batch.image[:, 0, 0, 0].tolist() == [3, 4, 5, 6]
        assert int(current.count) == 0
    for name in ("image", "row", "reward"):
        np.testing.assert_array_equal(vars(queue)[name], vars(again)[name])


def test_a_queue_of_an_older_checkpoint_is_read():
    """It told each prompt's lowest initial reward too."""
    image = np.zeros((3, 2, 2, 3), np.uint8)
    saved = {"row": [4, 2], "reward": [0.5, 0.25], "lowest": [0.5, 0.125]}
    queue = InitialImageQueue.restored(image, saved)
    assert queue.progress() == {"row": [4, 2], "reward": [0.5, 0.25]}


def test_a_full_queue_refuses_more():
    queue = InitialImageQueue.empty(3, 2, 2)
    queue.add(*entries(0, 2))
    with pytest.raises(ValueError, match="2 entries for a queue with 1 free"):
        queue.add(*entries(2, 2))
