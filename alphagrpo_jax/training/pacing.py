"""Lets the host run a little ahead of the device, and look for a stop between micro-batches."""

import collections
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.cores import usable_cores
from alphagrpo_jax.runtime.stopping import StopRequest

Results = TypeVar("Results")

# Micro-batches that wait for the device while it computes another, or on a CPU are computed beside
# it: it never waits for the host, and a stop finds few programs that can no longer be called back.
AHEAD = 2


class MicroBatches:
    """Dispatches micro-batches, and counts those that the device has not finished."""

    def __init__(self, stop: StopRequest) -> None:
        """Begins with none.

        Args:
          stop: ends the work between two micro-batches once it is overdue.
        """
        self._stop = stop
        self._waiting: collections.deque[Any] = collections.deque()
        self._lanes, self._number = _make_lanes(), -1

    def begin(self) -> None:
        """Waits until the next micro-batch may be dispatched.

        Raises:
          StoppedError: a stop is overdue.
        """
        while len(self._waiting) > AHEAD:
            jax.block_until_ready(self._waiting.popleft())
        distributed.check_stop(self._stop)
        self._number += 1

    def call(self, function: Callable[..., Results], *arguments: Any) -> Results:
        """Calls a function that dispatches programs of the micro-batch that has begun.

        Where a thread of its own calls it, it knows the mesh of `jax.set_mesh`, but no other
        setting of JAX that the caller made by a `with` block.
        """
        lane = self._lanes[self._number % len(self._lanes)]
        if lane is None:
            return function(*arguments)
        mesh = jax.sharding.get_mesh()  # of this thread alone

        def call_on_mesh() -> Results:
            with jax.set_mesh(mesh):
                return function(*arguments)

        return lane.submit(call_on_mesh).result()

    def dispatched(self, results: Any) -> None:
        """Notes a micro-batch by a pytree of its results, which no later program may take."""
        self._waiting.append(results)


def _make_lanes() -> list[ThreadPoolExecutor | None]:
    """Returns the threads that dispatch micro-batches in turns; None is the caller's.

    A CPU device computes what one thread dispatches in order, and what several do at the same time:
    a program of small operations keeps about one core busy. Several devices of a CPU would do the
    same, but wait for each other in sums over rows, for ever where all threads of XLA wait.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return [None]
    return [None, *_threads()[: usable_cores() - 1]]


@functools.cache
def _threads() -> list[ThreadPoolExecutor]:
    """Returns the process' threads that dispatch micro-batches, which start when they are used."""
    return [
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="micro-batch") for _ in range(AHEAD)
    ]
