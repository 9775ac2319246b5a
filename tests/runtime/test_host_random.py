"""Streams of host-side random numbers: each by itself, and as numpy makes them."""

import itertools

import numpy as np
import pytest

from alphagrpo_jax.runtime import host_random
from alphagrpo_jax.runtime.host_random import Stream

BIG = 1 << 32


def first_numbers(*arguments, **options):
    return tuple(host_random.generator(*arguments, **options).integers(0, 1 << 62, 4).tolist())


def test_no_two_streams_coincide():
    """Without padding, stream 1 at number 0 was the order of prompts of epoch 1."""
    seeds, numbers, task_numbers = (0, 1, 2), (0, 1, 2, BIG, 2 * BIG, BIG + 1), (0, 1, 2)
    places = list(itertools.product(Stream, seeds, numbers, task_numbers))
    streams = {
        first_numbers(stream, seed=seed, number=number, task_number=task_number)
        for stream, seed, number, task_number in places
    }
    assert len(streams) == len(places)
    assert len({int(stream) for stream in Stream}) == len(Stream)


def test_the_entropy_has_four_words():
    for words, numbers in (
        ([7, 3, 0, 1], {"seed": 7, "number": 3}),
        ([7, 3, 2, 5 * 256 + 1], {"seed": 7, "number": 2 * BIG + 3, "task_number": 5}),
    ):
        expected = np.random.default_rng(words).integers(0, 1 << 62, 4).tolist()
        assert list(first_numbers(Stream.TASKS, **numbers)) == expected


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"seed": BIG, "number": 0}, r"got seed=4294967296, expected it in \[0, 2\^32\)"),
        ({"seed": 0, "number": -1}, "got number=-1"),
        ({"seed": 0, "number": 0, "task_number": 1 << 24}, "got task_number=16777216"),
    ],
)
def test_numbers_that_would_run_into_other_words_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        host_random.generator(Stream.ORDER, **numbers)
