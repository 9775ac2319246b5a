"""The training command with one step that takes too long; run as a program of its own.

    python stop_scenes.py SCENE --config=... --workdir=...

The scene begins in step 2: it writes the file `reached`, and then the main thread is where no
Python handler of a signal runs.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app

from alphagrpo_jax import train, update


def compiling() -> None:
    """Compiles for a minute or more."""

    def large(x):
        for number in range(6000):
            x = jnp.tanh(x @ x + number)
        return x

    lowered = jax.jit(large).lower(jnp.ones((8, 8)))
    pathlib.Path("reached").touch()
    lowered.compile(compiler_options={"xla_backend_optimization_level": 3})


def running() -> None:
    """Waits for a program of the device that never ends."""

    def busy(x):
        return jax.lax.while_loop(lambda y: y[0] < 2.0, jnp.sin, x)

    program = jax.jit(busy).lower(jnp.ones(8)).compile()
    pathlib.Path("reached").touch()
    jax.block_until_ready(program(jnp.ones(8)))


SCENES = {"compiling": compiling, "running": running}


def main() -> None:
    scene = SCENES[sys.argv.pop(1)]
    old_log_probs = update.old_log_probs

    def slow_log_probs(run, state, batch):
        if batch.sample_ids[0][0] == 2 and pathlib.Path("stalls_after").exists():
            scene()
        return old_log_probs(run, state, batch)

    update.old_log_probs = slow_log_probs
    app.run(train.command, flags_parser=train.parse_flags)


if __name__ == "__main__":
    main()
