"""Bootstrap statistics on numbers made by hand."""

import numpy as np
import pytest

from alphagrpo_jax.studies import bootstrap

GROUPS = ["plain/count"] * 4 + ["plain/relation"] * 2 + ["implied"] * 4
CLUSTERS = list("aabbcdeeff")


def bools(text: str) -> np.ndarray:
    return np.array([mark == "1" for mark in text], bool)


def sample(gains, clusters, runs=None):
    gains = np.array(gains, np.float64)
    runs = np.ones((bootstrap.RESAMPLES, len(gains)), int) if runs is None else runs
    return bootstrap.resample(gains, clusters, runs, np.random.default_rng(0))


def frequencies(values):
    distinct, counts = np.unique(np.round(values, 9), return_counts=True)
    return dict(zip(distinct.tolist(), (counts / len(values)).tolist(), strict=True))


def test_clusters_are_combinations_or_riddles():
    record = {"kind": "plain", "combination": "1 red circle", "riddles": []}
    assert bootstrap.cluster(record) == "1 red circle"
    record = {"kind": "implied", "combination": "1 red circle", "riddles": ["lavender", "a coin"]}
    assert bootstrap.cluster(record) == "a coin + lavender"


def test_whole_clusters_are_resampled():
    # Fifty prompts that always agree are one observation: of two clusters both, or one twice.
    means = frequencies(sample([[0.0] * 50 + [1.0] * 50], ["a"] * 50 + ["b"] * 50))
    assert means == pytest.approx({0.0: 0.25, 0.5: 0.5, 1.0: 0.25}, abs=0.02)
    # Clusters of unequal sizes: a mean over the prompts that were drawn.
    means = frequencies(sample([[1.0, 0.0, 0.0, 0.0]], list("abbb")))
    assert means == pytest.approx({0.0: 0.25, 0.25: 0.5, 1.0: 0.25}, abs=0.02)
    assert frequencies(sample([[1.0, 0.0]], ["a", "a"])) == {0.5: 1.0}


def test_runs_are_resampled_as_given():
    runs = np.array([[2, 0], [1, 1], [0, 2]])
    means = sample([[0.0, 0.0], [1.0, 1.0]], ["a", "b"], runs)
    np.testing.assert_allclose(means, [0.0, 0.5, 1.0])


def test_gains_by_hand():
    before = bools("1100" + "10" + "0000")
    after = np.stack([bools("1110" + "10" + "1100"), bools("1111" + "00" + "1110")])
    gains = bootstrap.gains(after, before, GROUPS, CLUSTERS)
    values = {name: gain.value for name, gain in gains.items()}
    # The two runs gain 1/4 and 2/4 on counts, 0 and -1/2 on relations, 2/4 and 3/4 on riddles.
    assert values == pytest.approx(
        {
            "plain/count": 0.375,
            "plain/relation": -0.25,
            "implied": 0.625,
            "plain": 0.0625,
            "all": 0.34375,
        }
    )
    halves = (gains["plain"].resampled + gains["implied"].resampled) / 2
    np.testing.assert_allclose(gains["all"].resampled, halves)
    for gain in gains.values():
        low, high = gain.interval
        assert low <= gain.value <= high


def test_all_groups_of_a_sample_hold_the_same_runs():
    after = np.stack([bools("1" * 10), bools("0" * 10)])
    gains = bootstrap.gains(after, bools("0" * 10), GROUPS, CLUSTERS)
    shares = frequencies(gains["all"].resampled)
    assert shares == pytest.approx({0.0: 0.25, 0.5: 0.5, 1.0: 0.25}, abs=0.02)
    np.testing.assert_array_equal(gains["plain"].resampled, gains["implied"].resampled)


def test_shares_weigh_plain_types_alike():
    shares = bootstrap.shares(bools("1110" + "00" + "1000"), GROUPS)
    assert shares["plain"] == pytest.approx(0.375)
    assert shares["all"] == pytest.approx((0.375 + 0.25) / 2)
