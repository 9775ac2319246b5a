"""Lengths of texts: the rows that fill up a mesh decide nothing."""

import numpy as np
import pytest

from alphagrpo_jax.training import sampling


@pytest.mark.parametrize(("rows", "length"), [(None, 12), (3, 6), (4, 12)])
def test_the_bucket_holds_the_rows_that_count(rows, length):
    lengths = np.array([2, 5, 6, 11])
    mask = np.arange(12) < lengths[:, None]
    assert sampling._bucket(mask, 2, rows) == length


@pytest.mark.parametrize(("buckets", "lengths"), [(1, [10]), (3, [4, 7, 10])])
def test_bucket_lengths(buckets, lengths):
    assert sampling.bucket_lengths(10, buckets) == lengths
