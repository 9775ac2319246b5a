import numpy as np
import pytest

from alphagrpo_jax.flow import schedule


def test_sigmas_by_hand():
    # t = 1, 2/3, 1/3, 0 and sigma = 3 t / (1 + 2 t)
    expected = np.array([1.0, 6 / 7, 3 / 5, 0.0], np.float32)
    got = schedule.sigmas(4)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def test_shift_one_is_linear_and_ends_are_exact():
    np.testing.assert_array_equal(schedule.sigmas(5, shift=1.0), [1.0, 0.75, 0.5, 0.25, 0.0])
    for num_points in (2, 16, 40, 50):
        got = schedule.sigmas(num_points)
        assert (got[0], got[-1], len(got)) == (1.0, 0.0, num_points)
        assert (np.diff(got) < 0).all()


def test_refuses_too_few_points_and_bad_shifts():
    with pytest.raises(ValueError, match="num_points=1"):
        schedule.sigmas(1)
    with pytest.raises(ValueError, match=r"shift=0\.0"):
        schedule.sigmas(4, shift=0.0)
