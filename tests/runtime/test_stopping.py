"""Requests to stop: their grace, and blocks without one."""

import pytest

from alphagrpo_jax.runtime.stopping import StoppedError, StopRequest


def test_a_request_leaves_a_grace_to_what_is_under_way():
    stop = StopRequest(grace_seconds=1000.0)
    stop.check()
    assert not stop.requested
    stop.request()
    stop.check()
    assert stop.requested
    assert not stop.overdue
    stop.hurry()
    assert stop.overdue
    with pytest.raises(StoppedError):
        stop.check()


def test_a_second_request_does_not_begin_the_grace_anew():
    stop = StopRequest(grace_seconds=0.0)
    stop.request()
    assert stop.overdue
    stop.request()
    assert stop.overdue


def test_a_block_without_grace_ends_with_the_request():
    stop = StopRequest(grace_seconds=1000.0)
    with stop.at_once():
        stop.check()
        stop.request()
        with pytest.raises(StoppedError):
            stop.check()
        with stop.at_once():
            assert stop.overdue
        assert stop.overdue
    stop.check()
