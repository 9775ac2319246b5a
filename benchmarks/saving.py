"""Measures for how long a save of a train state stops a run, and how long it takes in all.

    python -m benchmarks.saving [--megabytes=500] [--folder=DIR]

The state is 8 float32 arrays of random numbers on the default device. After each save an update
takes their memory, as in a run.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.checkpoint import Checkpoints

ARRAYS, SAVES = 8, 3


class SaveSeconds(NamedTuple):
    """Seconds of one save."""

    blocked: float  # until the run goes on
    total: float  # until the checkpoint is complete


def measure(folder: str, megabytes: int) -> list[SaveSeconds]:
    """Saves a state several times, an update between two saves.

    Args:
      folder: takes the checkpoints.
      megabytes: of the state, 10^6 bytes.
    """
    count = megabytes * 10**6 // 4 // ARRAYS
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    state = {str(i): jax.random.normal(key, (count,), jnp.float32) for i, key in enumerate(keys)}
    update = jax.jit(lambda tree: jax.tree.map(lambda x: 0.5 * x + 1, tree), donate_argnums=0)
    saves, seconds = Checkpoints(folder, keep=1), []
    for step in range(1, SAVES + 1):
        jax.block_until_ready(state)
        start = time.monotonic()
        saves.save(step, state, {"step": step}, wait=False)
        blocked = time.monotonic() - start
        state = update(state)
        saves.wait()
        seconds.append(SaveSeconds(blocked, time.monotonic() - start))
    saves.close()
    return seconds


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m benchmarks.saving", description=__doc__)
    parser.add_argument("--megabytes", type=cli.COUNT, default=500, help="size of the state")
    parser.add_argument("--folder", help="where a temporary folder is made; default: the system's")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Prints the seconds of every save."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number, save in enumerate(measure(folder, options.megabytes), start=1):
            print(f"save {number}: the run stops for {save.blocked:.3f} s of {save.total:.3f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
