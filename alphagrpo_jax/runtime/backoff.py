"""Computes exponential back-off with jitter, shared by everything that tries something again."""

import random

import tenacity
from tenacity.wait import wait_base, wait_exponential

JITTER = 0.5  # every wait is multiplied by a random factor in [1 - JITTER, 1 + JITTER]
MAX_DOUBLINGS = 32


class Backoff(wait_base):
    """Exponential waits: `first_seconds * 2 ** (failures - 1)`, times a random factor.

    Without the factor all clients that an outage hit together would come back together. Is a wait
    strategy of tenacity (`tenacity.Retrying(wait=Backoff(...))`); code that keeps its own count of
    failures, because it serves other work between two attempts, calls `seconds`.
    """

    def __init__(self, first_seconds: float, *, longest_seconds: float | None = None) -> None:
        """Takes the bounds of the waits.

        Args:
          first_seconds: wait after the first failure, before jitter.
          longest_seconds: bound of the wait, before jitter; None: `MAX_DOUBLINGS` doublings.
        """
        if longest_seconds is None:
            longest_seconds = first_seconds * 2.0**MAX_DOUBLINGS
        self._exponential = wait_exponential(multiplier=first_seconds, max=longest_seconds)
        # Seeded and private: retries neither disturb nor depend on anyone else's random numbers.
        self._jitter = random.Random(0)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        """Returns the seconds to wait after a failed attempt; called by tenacity."""
        factor = self._jitter.uniform(1.0 - JITTER, 1.0 + JITTER)
        return self._exponential(retry_state) * factor

    def seconds(self, failures: int) -> float:
        """Returns the seconds to wait after `failures` >= 1 failures in a row."""
        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = failures
        return self(state)
