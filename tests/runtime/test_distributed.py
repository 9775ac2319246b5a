"""Shares of a batch among processes, with the process count patched."""

import itertools

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from alphagrpo_jax.runtime import distributed


@pytest.fixture
def processes(monkeypatch):
    """processes(count): calls a function as each of `count` processes, returns their results."""

    def run(count, function):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        results = []
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            results.append(function())
        return results

    return run


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [15, 12, 1])
def test_shares_of_the_parts_are_shares_of_the_batch(processes, count, micro_batch):
    total = 4 * micro_batch
    batch_rows = processes(count, lambda: distributed.own_rows(total).tolist())
    cut = processes(
        count,
        lambda: [
            int(row)
            for first in range(0, total, micro_batch)
            for row in first + np.arange(micro_batch)
            if distributed.is_own(row)
        ],
    )
    assert cut == batch_rows
    assert sorted(itertools.chain(*batch_rows)) == list(range(total))


@pytest.mark.parametrize(("count", "rows"), [(2, 8), (2, 7), (3, 7), (3, 2)])
def test_merged_rows_are_in_order(processes, monkeypatch, count, rows):
    values = 1 / 3 + np.arange(rows * 2.0).reshape(rows, 2)  # no float32 holds them
    assert (values != values.astype(np.float32)).all()
    filled = []
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: filled.append(x) or x[None])

    def merge():
        return distributed.merge_rows(values[distributed.own_rows(rows)], rows)

    processes(count, merge)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda _: np.stack(filled))
    for merged in processes(count, merge):
        assert merged.dtype == np.float64
        np.testing.assert_array_equal(merged, values)


def test_one_process_has_everything():
    values = np.ones((3, 2))
    assert distributed.merge_rows(values, 3) is values
    assert distributed.primary_says(True) is True
    assert distributed.any_process(False) is False
    assert distributed.total(values) is values


def test_totals_are_sums_over_the_processes(processes, monkeypatch):
    def gather(data):
        assert data.dtype == np.uint8  # JAX would round float64
        return np.stack([data, (2 * data.view(float)).view(np.uint8), data])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    for totals in processes(3, lambda: distributed.total(np.array([1.0, 5.0]))):
        assert totals.tolist() == [4.0, 20.0]


@pytest.mark.parametrize(
    ("requested", "taken_after", "expected"),
    [(False, None, False), (True, None, True), (False, 3, True), (False, 4, False)],
)
def test_a_stop_is_requested_or_agreed_on_by_the_preemption_service(
    monkeypatch, requested, taken_after, expected
):
    state = distributed.jax_distributed.global_state
    if taken_after is not None:
        monkeypatch.setattr(state, "preemption_sync_manager", object())
    monkeypatch.setattr(
        distributed.multihost_utils,
        "reached_preemption_sync_point",
        lambda step: step == taken_after,
    )
    assert distributed.must_stop(requested, 3) == expected
