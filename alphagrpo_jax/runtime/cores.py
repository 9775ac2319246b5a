"""Counts the cores that a process may use."""

import os


def usable_cores() -> int:
    """Returns how many cores this process may use: those of its affinity, where systems have it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
