"""Lets the host run a little ahead of the device, and look for a stop between micro-batches."""

import collections
from typing import Any

import jax

from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.stopping import StopRequest

# Micro-batches that wait for the device while it computes another: it never waits for the host, and
# a stop finds few programs that can no longer be called back.
AHEAD = 2


class MicroBatches:
    """Counts the micro-batches that the device has not finished."""

    def __init__(self, stop: StopRequest) -> None:
        """Begins with none.

        Args:
          stop: ends the work between two micro-batches once it is overdue.
        """
        self._stop = stop
        self._waiting: collections.deque[Any] = collections.deque()

    def begin(self) -> None:
        """Waits until the next micro-batch may be dispatched.

        Raises:
          StoppedError: a stop is overdue.
        """
        while len(self._waiting) > AHEAD:
            jax.block_until_ready(self._waiting.popleft())
        distributed.check_stop(self._stop)

    def dispatched(self, results: Any) -> None:
        """Notes a micro-batch by a pytree of its results, which no later program may take."""
        self._waiting.append(results)
