"""Learning curves as geometry: which curves there are, where they run, where their labels stand."""

import itertools

import pytest

from alphagrpo_jax.rewards import curves
from alphagrpo_jax.rewards.curves import FRAME

ROWS = [
    {"step": 0, "eval/reward/mean": 0.5, "eval/exact_all": 0.25, "eval/exact_all/plain": 0.5},
    {"step": 1, "reward/mean": 0.25},
    {"step": 2, "reward/mean": None},
    {"step": 4, "reward/mean": 0.75, "eval/reward/mean": 1.0, "eval/exact_all": 0.75},
]


def points(text):
    return [tuple(float(number) for number in pair.split(",")) for pair in text.split()]


def test_curves_run_through_their_values():
    reward, exact = curves.panels(ROWS)
    assert [tick.text for tick in reward.x_ticks] == ["0", "1", "2", "3", "4"]
    assert [tick.text for tick in reward.y_ticks] == ["0.2", "0.4", "0.6", "0.8", "1.0"]
    assert reward.y_ticks[0].at == FRAME.y_max
    assert reward.y_ticks[-1].at == FRAME.y_min
    training, heldout = reward.lines
    assert (training.label, training.value) == ("in training", "0.750")
    assert (heldout.label, heldout.value) == ("held-out", "1.000")
    width, height = FRAME.x_max - FRAME.x_min, FRAME.y_max - FRAME.y_min
    assert points(heldout.path) == [
        (FRAME.x_min, pytest.approx(FRAME.y_max - height * 0.3 / 0.8, abs=0.06)),
        (FRAME.x_max, FRAME.y_min),
    ]
    assert [x for x, _ in points(training.path)] == [FRAME.x_min + width / 4, FRAME.x_max]
    assert heldout.dots[1].words == "held-out, step 4: 1.000"
    assert [line.label for line in exact.lines] == ["all", "plain"]
    assert len(points(exact.lines[1].path)) == 1


def test_mixed_runs_have_curves_by_task():
    row = {"step": 3, "eval/exact_all": 0.5, "eval/reward/mean": 0.5, "reward/mean": 0.5}
    row |= {"rt2i/eval/reward/mean": 0.75, "srr/eval/reward/mean": 0.25, "srr/reward/mean": 0.25}
    row |= {"rt2i/eval/exact_all": 0.5, "rt2i/eval/exact_all/plain": 0.1}
    training, heldout, exact = curves.panels([row])
    assert [line.label for line in training.lines] == ["all", "srr"]
    assert [line.label for line in heldout.lines] == ["all", "rt2i", "srr"]
    assert [line.label for line in exact.lines] == ["all", "rt2i"]
    assert training.lines[1].color == heldout.lines[2].color  # a task has one color
    by_kind = curves.panels([row | {"eval/exact_all/implied": 0.1, "eval/exact_all/plain": 0.9}])[3]
    assert [line.label for line in by_kind.lines] == ["all", "implied", "plain"]


def test_nothing_measured_is_no_panel():
    assert curves.panels([]) == ()
    assert curves.panels([{"step": 1, "reward/mean": None}]) == ()


def test_long_training_curves_are_smoothed_and_heldout_ones_are_not():
    rows = [
        {"step": step, "reward/mean": step % 2, "eval/reward/mean": step % 2} for step in range(40)
    ]
    training, heldout = curves.panels(rows)[0].lines
    assert len(points(training.path)) == len(points(training.raw)) == 40
    assert training.dots == ()
    assert heldout.raw == ""
    assert len(heldout.dots) == 40
    assert curves.smooth([(0, 0.0), (1, 3.0), (2, 6.0)], window=3) == [(0, 1.5), (1, 3.0), (2, 4.5)]


@pytest.mark.parametrize(
    ("low", "high", "integers", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.884, 0.951, False, [0.88, 0.9, 0.92, 0.94, 0.96]),
        (0, 200, True, [0, 50, 100, 150, 200]),
        (0, 2, True, [0, 1, 2]),
        (0, 0, True, [0, 1]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low, high, integers, expected):
    assert curves.ticks(low, high, 6, integers=integers) == expected


def test_labels_do_not_lie_on_each_other():
    wanted = {"a": 100.0, "b": 101.0, "c": 99.0, "d": FRAME.y_max, "e": FRAME.y_max}
    heights = curves.label_heights(wanted)
    ordered = sorted(heights.values())
    assert all(
        after - before >= curves.LABEL_GAP - 1e-9 for before, after in itertools.pairwise(ordered)
    )
    assert sorted(heights, key=heights.get) == ["c", "a", "b", "d", "e"]
    assert max(ordered) <= FRAME.y_max
