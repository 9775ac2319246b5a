import math

import pytest

from alphagrpo_jax.rewards.viescore import viescore


def test_by_hand():
    assert viescore([9.0, 4.0], [9.0]) == pytest.approx(0.6)
    assert viescore([10.0], [10.0]) == 1.0
    assert viescore([0.0, 10.0], [10.0]) == 0.0


@pytest.mark.parametrize("bad", [[], [10.1], [-1.0], [math.nan]])
def test_refuses_scores_that_are_none(bad):
    with pytest.raises(ValueError, match="quality sub-scores"):
        viescore([5.0], bad)
