"""SIGINT and SIGTERM at every moment of a run: finished steps are saved, and the run continues."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

TESTS = pathlib.Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STALLS = "--config.verifier.path=tiny_verifiers:Stalls"
NEVER_STARTS = "--config.verifier.path=tiny_verifiers:never_starts"
GRACE = "--config.checkpoint.stop_seconds=1"
PATIENCE_SECONDS = 300.0  # on a busy machine; no result depends on it
# Images that the verifier answers about: 3 prompts twice in the first evaluation, 8 in each update,
# 3 in the evaluation after step 2.
IN_FIRST_EVALUATION, IN_STEP_2, IN_EVALUATION = 1, 6 + 8 + 1, 6 + 8 + 8 + 1


@pytest.fixture(scope="module")
def whole(run, world, rows):
    """Rows of a run of four steps without interruption."""
    code, errors = run(world / "unstopped")
    assert code == 0, errors
    return rows(world / "unstopped")


@contextlib.contextmanager
def scene(world: pathlib.Path, limit: int) -> Iterator[pathlib.Path]:
    """The verifiers stall after so many images; yields the file that tells when they do."""
    stalls_after, reached = world / "stalls_after", world / "reached"
    stalls_after.write_text(str(limit))
    reached.unlink(missing_ok=True)
    try:
        yield reached
    finally:
        stalls_after.unlink()


def wait_for(path: pathlib.Path, *processes: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("limit", "saved", "number"),
    [(IN_STEP_2, 1, signal.SIGINT), (IN_EVALUATION, 2, signal.SIGTERM)],
    ids=["in the second step", "in the evaluation after it"],
)
def test_a_stop_leaves_a_stalled_verifier(limit, saved, number, run, world, whole, rows):
    workdir = world / f"stalled_{saved}"
    with scene(world, limit) as reached:

        def stop() -> None:
            wait_for(reached)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=stop)
        thread.start()
        code, errors = run(workdir, STALLS, GRACE)
        thread.join()
    assert code == 75, errors
    assert f"stopped after step {saved}; the same command continues" in errors
    assert str(saved) in {path.name for path in (workdir / "checkpoints").iterdir()}
    stopped_rows = rows(workdir)
    assert stopped_rows[:saved] == whole[:saved]
    assert [row["step"] for row in stopped_rows] == list(range(saved + 1))
    assert ("eval/pending" in stopped_rows[-1]) == (saved == 2)
    code, errors = run(workdir, STALLS, GRACE)
    assert code == 0, errors
    assert rows(workdir) == whole


def start_scene(world: pathlib.Path, name: str, workdir: pathlib.Path) -> subprocess.Popen:
    """Starts a program of `stop_scenes`, as the fixture `start` starts the command."""
    return subprocess.Popen(
        [
            sys.executable,
            str(TESTS / "e2e" / "stop_scenes.py"),
            name,
            f"--config={TESTS / 'tiny_world.py'}",
            f"--workdir={workdir}",
            GRACE,
        ],
        cwd=world,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def check_stopped(process, run, workdir, arguments, whole, rows, *, saved: int) -> str:
    """The process ends with 75, has saved so many steps, and continues to the same end."""
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, errors
    assert "the same command continues" in errors
    assert len([row for row in rows(workdir) if row["step"]]) == saved
    assert (workdir / "checkpoints" / str(saved)).exists() == bool(saved)
    code, resume_errors = run(workdir, *arguments)
    assert code == 0, resume_errors
    assert rows(workdir) == whole
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["compiling", "running"])
def test_a_stop_does_not_wait_for_the_compiler_or_the_device(name, number, run, world, whole, rows):
    """Where the main thread runs no handler, another thread saves and ends the process."""
    workdir = world / f"{name}_{number.name}"
    with scene(world, 1000) as reached:
        process = start_scene(world, name, workdir)
        wait_for(reached, process)
        os.killpg(process.pid, number)
        errors = check_stopped(process, run, workdir, (GRACE,), whole, rows, saved=1)
    assert "stopped while a step was under way" in errors


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("limit", "arguments"),
    [(IN_FIRST_EVALUATION, (STALLS, GRACE)), (0, (NEVER_STARTS, GRACE))],
    ids=["first evaluation", "starting verifiers"],
)
def test_a_stop_before_the_first_step(limit, arguments, number, start, run, world, whole, rows):
    workdir = world / f"early_{limit}_{number.name}"
    with scene(world, limit) as reached:
        process = start(workdir, *arguments, start_new_session=True)
        wait_for(reached, process)
        os.killpg(process.pid, number)
        process.wait(PATIENCE_SECONDS)
    check_stopped(process, run, workdir, arguments, whole, rows, saved=0)


@pytest.mark.slow
def test_a_second_signal_ends_the_grace_and_loses_nothing(start, run, world, whole, rows):
    workdir, arguments = world / "twice", (STALLS, "--config.checkpoint.stop_seconds=1e6")
    with scene(world, IN_STEP_2) as reached:
        process = start(workdir, *arguments, start_new_session=True)
        wait_for(reached, process)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.5)
        process.wait(PATIENCE_SECONDS)
    errors = check_stopped(process, run, workdir, arguments, whole, rows, saved=1)
    assert "without the step under way" in errors


@pytest.mark.slow
def test_a_third_ctrl_c_ends_the_process(start, world, rows):
    workdir = world / "thrice"
    with scene(world, 1000) as reached:
        process = start_scene(world, "compiling", workdir)
        wait_for(reached, process)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, errors
    assert "steps since the last checkpoint are lost" in errors
    assert [row["step"] for row in rows(workdir)] == [0, 1]
    assert not list((workdir / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
@pytest.mark.parametrize("receivers", [(0, 1), (1,)], ids=["both", "second"])
def test_several_processes_stop_together(receivers, start, world, rows, free_port):
    """While the verifier of both stalls; whoever is told, all end with 75 and one checkpoint."""
    workdir = world / f"processes_{len(receivers)}_{receivers[0]}"
    arguments = (STALLS, GRACE, "--config.mesh.data=2")
    joined = {"COORDINATOR_ADDRESS": f"127.0.0.1:{free_port}", "NUM_PROCESSES": "2"}
    with scene(world, 4 + 4 + 1) as reached:
        processes = [
            start(workdir, *arguments, **joined, PROCESS_ID=str(rank)) for rank in range(2)
        ]
        wait_for(reached, *processes)
        for rank in receivers:
            processes[rank].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], "\n".join(outputs)
    assert [row["step"] for row in rows(workdir)] == [0, 1]
    assert [path.name for path in (workdir / "checkpoints").glob("[0-9]*")] == ["1"]
