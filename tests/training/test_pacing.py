"""Micro-batches are dispatched in turns by several threads of a CPU, with the same numbers."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.stopping import NEVER, StoppedError, StopRequest
from alphagrpo_jax.training import pacing


@pytest.fixture
def mesh(monkeypatch):
    """A mesh of this process' first device, on a machine of three cores."""
    monkeypatch.setattr(pacing.jax, "device_count", lambda: 1)
    monkeypatch.setattr(pacing, "usable_cores", lambda: 3)
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, jax.devices()[:1])) as entered:
        yield entered


def run(function, count: int) -> list:
    pace, results = pacing.MicroBatches(NEVER), []
    for number in range(count):
        pace.begin()
        results.append(pace.call(function, number))
        pace.dispatched(results[-1])
    return results


def test_threads_take_turns_and_know_the_mesh(mesh):
    calls = run(lambda number: (number, threading.get_ident(), jax.sharding.get_mesh()), 6)
    assert [number for number, *_ in calls] == list(range(6))
    threads = [thread for _, thread, _ in calls]
    assert threads[0] == threading.get_ident()
    assert threads[:3] == threads[3:]
    assert len(set(threads)) == 3
    assert {entered for *_, entered in calls} == {jax.sharding.get_mesh()}


@pytest.mark.parametrize("reason", ["devices", "backend", "cores"])
def test_other_machines_dispatch_from_one_thread(mesh, monkeypatch, reason):
    if reason == "devices":
        monkeypatch.setattr(pacing.jax, "device_count", lambda: 2)
    elif reason == "backend":
        monkeypatch.setattr(pacing.jax, "default_backend", lambda: "tpu")
    else:
        monkeypatch.setattr(pacing, "usable_cores", lambda: 1)
    assert set(run(lambda number: threading.get_ident(), 4)) == {threading.get_ident()}


def test_numbers_and_compilations_are_those_of_one_thread(mesh, monkeypatch):
    traced = []

    @jax.jit
    def work(x):
        traced.append(x.shape)
        return jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ y.T @ y), x)

    def of(number: int) -> jax.Array:
        return work(jax.random.normal(jax.random.key(number), (16, 8)))

    by_threads = run(of, 5)
    monkeypatch.setattr(pacing, "usable_cores", lambda: 1)
    for result, expected in zip(by_threads, run(of, 5), strict=True):
        np.testing.assert_array_equal(result, expected)
    assert traced == [(16, 8)]


def test_errors_and_stops_reach_the_caller(mesh):
    def fail(number: int) -> int:
        if number == 1:
            raise ZeroDivisionError("in a thread")
        return number

    with pytest.raises(ZeroDivisionError, match="in a thread"):
        run(fail, 3)
    stop = StopRequest(grace_seconds=0.0)
    stop.request()
    with pytest.raises(StoppedError):
        pacing.MicroBatches(stop).begin()
