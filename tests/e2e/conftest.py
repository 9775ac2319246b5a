"""The training command, in this process or as one of its own, in a folder with the tiny world.

In this process a second run reuses what the first has traced, which is most of a tiny run's time.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import pytest
import tiny_world
from absl import flags
from ml_collections import config_flags

from alphagrpo_jax import train

TESTS = pathlib.Path(__file__).parent.parent
ROOT = TESTS.parent
CONFIG = f"--config={TESTS / 'tiny_world.py'}"


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> pathlib.Path:
    return tiny_world.write_all(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def run(world) -> Callable[..., tuple[int, str]]:
    """run(workdir, *arguments, **environment): (exit code, all output) of the command, run here."""

    def run(workdir, *arguments, **environment):
        with pytest.MonkeyPatch.context() as patch, captured(world / "output.txt") as output:
            patch.chdir(world)
            for name, value in environment.items():
                patch.setenv(name, value)
            code = run_command(patch, f"--workdir={workdir}", *arguments)
        return code, output.read_text()

    return run


def run_command(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command with flags of its own; the process is as before afterwards."""
    argv, values = ["train", CONFIG, *arguments], flags.FlagValues()
    patch.setattr(sys, "argv", argv)
    patch.setattr(flags, "FLAGS", values)
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    patch.setattr(train, "_CONFIG", config)
    patch.setattr(train, "_WORKDIR", workdir)
    patch.setattr(train, "end_process", lambda code: None)  # it would end the tests
    profile = flags.DEFINE_string("profile", None, "", flag_values=values)
    patch.setattr(train, "_PROFILE", profile)
    try:
        return train.command(train.parse_flags(argv)) or 0
    except SystemExit as stop:
        return stop.code
    except Exception:  # as the interpreter ends with
        traceback.print_exc()
        return 1
    finally:
        jax.set_mesh(None)


@contextlib.contextmanager
def captured(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Everything that this process and its children print goes to a file meanwhile."""
    saved = [os.dup(number) for number in (1, 2)]
    with path.open("w", buffering=1) as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield path
        finally:
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


@pytest.fixture(scope="session")
def start(world) -> Callable[..., subprocess.Popen]:
    """start(workdir, *arguments, devices=1, ...): the command as a process of its own.

    Further keywords are its environment; with `start_new_session` it leads a process group.

    It keeps all that it compiles: most of it a later run compiles as well.
    """

    def start(workdir, *arguments, devices=1, start_new_session=False, **environment):
        compiler = environment.pop("XLA_FLAGS", os.environ["XLA_FLAGS"])
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "alphagrpo_jax.train",
                CONFIG,
                f"--workdir={workdir}",
                *arguments,
            ],
            cwd=world,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "XLA_FLAGS": f"{compiler} --xla_force_host_platform_device_count={devices}",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=start_new_session,
        )

    return start


@pytest.fixture(scope="session")
def run_process(start) -> Callable[..., tuple[int, str]]:
    """run_process(workdir, *arguments, ...): (exit code, stderr) of a process of its own."""

    def run_process(*arguments, **options):
        process = start(*arguments, **options)
        _, errors = process.communicate(timeout=1800)
        return process.returncode, errors

    return run_process


@pytest.fixture
def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


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
