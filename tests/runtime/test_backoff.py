"""Waits of the shared back-off against the formula, with the jitter's own random numbers."""

import random

import pytest
import tenacity

from alphagrpo_jax.runtime.backoff import Backoff


def test_waits_double_with_jitter():
    jitter = random.Random(0)
    backoff = Backoff(0.2)
    for failures in (1, 2, 3, 10, 33, 34, 2000):
        expected = 0.2 * 2.0 ** min(failures - 1, 32) * jitter.uniform(0.5, 1.5)
        assert backoff.seconds(failures) == expected


def test_the_bound_holds_before_jitter():
    jitter = random.Random(0)
    backoff = Backoff(1.0, longest_seconds=60.0)
    for failures in (1, 5, 6, 7, 8, 100):
        expected = min(2.0 ** (failures - 1), 60.0) * jitter.uniform(0.5, 1.5)
        assert backoff.seconds(failures) == expected


def test_without_a_first_wait_there_is_none():
    assert [Backoff(0.0).seconds(failures) for failures in (1, 2, 99)] == [0.0] * 3
    assert Backoff(0.0, longest_seconds=0.0).seconds(5) == 0.0


def test_tenacity_waits_by_it():
    waits = []
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(4), wait=Backoff(0.5), sleep=waits.append, reraise=True
    )
    with pytest.raises(ZeroDivisionError):
        retrying(lambda: 1 / 0)
    jitter = random.Random(0)
    assert waits == [0.5 * 2.0**n * jitter.uniform(0.5, 1.5) for n in range(3)]
