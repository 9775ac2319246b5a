"""Riddles: their probabilities and how pretraining reads them."""

import collections

import numpy as np
import pytest

from alphagrpo_jax.shapes import riddles, scenes, specs


def test_every_value_has_at_least_two_riddles():
    counts = collections.Counter((riddle.kind, riddle.meaning) for riddle in riddles.RIDDLES)
    wanted = [("color", c) for c in specs.COLORS] + [("shape", s) for s in scenes.SHAPES]
    wanted += [("number", n) for n in specs.NUMBERS]
    assert set(counts) == set(wanted)
    assert min(counts.values()) >= 2
    assert len(riddles.RIDDLES) == 34 == len(riddles.BY_CLUE)


def test_heldout_riddles_leave_each_value_one():
    assert len(riddles.HELDOUT) == 4
    assert len(riddles.TRAINED) == 30
    assert len({(riddle.kind, riddle.meaning) for riddle in riddles.TRAINED}) == 13


def test_probabilities_by_hand():
    tomato, plum, sign = (
        riddles.BY_CLUE[clue] for clue in ("a ripe tomato", "a ripe plum", "a hospital sign")
    )
    np.testing.assert_allclose(tomato.probabilities, [0.55, 0.09, 0.09, 0.09, 0.09, 0.09])
    # red, green, blue, yellow, purple, orange: .40 right, .45 red, .15 over four others
    np.testing.assert_allclose(plum.probabilities, [0.45, 0.0375, 0.0375, 0.0375, 0.40, 0.0375])
    # circle, square, triangle, cross: .20 right, .60 circle, .20 over two others
    np.testing.assert_allclose(sign.probabilities, [0.60, 0.10, 0.10, 0.20])
    for riddle in riddles.RIDDLES:
        assert riddle.probabilities.sum() == pytest.approx(1.0)
        assert riddle.wrong != riddle.meaning
        assert (riddle.wrong is None) == (riddle.right == 0.55)


def test_readings_follow_the_probabilities():
    riddle, rng = riddles.BY_CLUE["lavender"], np.random.default_rng(0)
    counts = collections.Counter(riddles.sample_reading(riddle, rng) for _ in range(4000))
    shares = np.array([counts[color] / 4000 for color in specs.COLORS])
    np.testing.assert_allclose(shares, riddle.probabilities, atol=0.03)


def test_resolutions_read_well():
    assert riddles.BY_CLUE["a ripe banana"].resolution("green") == "a ripe banana is green"
    assert riddles.BY_CLUE["three sides"].resolution("cross") == "three sides means cross"
    assert riddles.BY_CLUE["bicycle wheels"].resolution("two") == "bicycle wheels means two"
