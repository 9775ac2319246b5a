"""The training command as a process of its own, in a folder with the tests' tiny world."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import tiny_world

TESTS = pathlib.Path(__file__).parent.parent
ROOT = TESTS.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    return tiny_world.write_all(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Where the command's process finds the repository and the tests' tiny world. It keeps all that
    it compiles: most of it a later run compiles as well.
    """
    return os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def start(world, environment) -> Callable[..., subprocess.Popen]:
    """start(workdir, *arguments): the command as a process of its own."""

    def start(workdir, *arguments, devices=1, **variables):
        flags = variables.pop("XLA_FLAGS", environment["XLA_FLAGS"])
        flags += f" --xla_force_host_platform_device_count={devices}"
        command = ("-m", "alphagrpo_jax.train", f"--config={TESTS / 'tiny_world.py'}")
        return subprocess.Popen(
            [sys.executable, *command, f"--workdir={workdir}", *arguments],
            cwd=world,
            env=environment | {"XLA_FLAGS": flags} | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def run(start) -> Callable[..., tuple[int, str]]:
    """run(workdir, *arguments): (exit code, stderr) of the whole command."""

    def run(*arguments, **options):
        process = start(*arguments, **options)
        _, errors = process.communicate(timeout=1800)
        return process.returncode, errors

    return run


@pytest.fixture(scope="session")
def rows() -> Callable[[pathlib.Path], list[dict]]:
    """rows(workdir): rows of metrics.jsonl without times; none before the first."""

    def rows(workdir):
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            {key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
            for line in lines
        ]

    return rows


@pytest.fixture(scope="session")
def wait_for_step() -> Callable[..., None]:
    """wait_for_step(workdir, step, process): until the row of a step is written."""

    def wait_for_step(workdir, step, process):
        path = workdir / "metrics.jsonl"
        while process.poll() is None and (
            not path.exists() or f'"step": {step},' not in path.read_text()
        ):
            time.sleep(0.05)

    return wait_for_step
