"""Prints how long a run takes to end after SIGINT and SIGTERM, at every moment of it.

PYTHONPATH=.:tests python tests/e2e/stop_seconds.py FOLDER [MOMENT ...]
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import tiny_world

TESTS = pathlib.Path(__file__).parent.parent
STALLS = "--config.verifier.path=tiny_verifiers:Stalls"
# By moment: images until the verifier stalls, the scene of `stop_scenes` if any, flags, signals.
MOMENTS = {
    "verifiers start": (0, None, ["--config.verifier.path=tiny_verifiers:never_starts"], 1),
    "first evaluation": (1, None, [STALLS], 1),
    "verifier stalls": (6 + 8 + 1, None, [STALLS], 1),
    "two signals": (6 + 8 + 1, None, [STALLS], 2),
    "periodic evaluation": (6 + 8 + 8 + 1, None, [STALLS], 1),
    "micro-batches": (1000, None, ["--config.train.prompts_per_step=300"], 1),
    "compiling": (1000, "compiling", [], 1),
    "device program": (1000, "running", [], 1),
}


def wait_for_moment(world: pathlib.Path, workdir: pathlib.Path, moment: str) -> None:
    """Waits until the moment is reached; micro-batches begin behind the first row."""
    metrics = workdir / "metrics.jsonl"
    while not (world / "reached").exists():
        if moment == "micro-batches" and metrics.exists() and metrics.read_text():
            time.sleep(1.0)
            return
        time.sleep(0.05)


def measure(world: pathlib.Path, moment: str, number: signal.Signals) -> str:
    """Returns a line of the table."""
    limit, scene, flags, count = MOMENTS[moment]
    workdir = world / f"{moment.replace(' ', '_')}_{number.name}"
    shutil.rmtree(workdir, ignore_errors=True)
    (world / "stalls_after").write_text(str(limit))
    (world / "reached").unlink(missing_ok=True)
    program = [str(TESTS / "e2e" / "stop_scenes.py"), scene] if scene else []
    process = subprocess.Popen(
        [
            sys.executable,
            *(program or ["-m", "alphagrpo_jax.train"]),
            f"--config={TESTS / 'tiny_world.py'}",
            f"--workdir={workdir}",
            "--config.checkpoint.every=100",
            "--config.checkpoint.stop_seconds=6",
            *flags,
        ],
        cwd=world,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_moment(world, workdir, moment)
    begun = time.monotonic()
    for repetition in range(count):
        time.sleep(float(repetition))
        os.killpg(process.pid, number)
    code = process.wait()
    seconds = time.monotonic() - begun
    saved = sorted(path.name for path in workdir.glob("checkpoints/[0-9]*"))
    load = os.getloadavg()[0]
    return (
        f"{moment:20} {number.name:8} {seconds:5.1f} s  code {code}, saved {saved}, load {load:.1f}"
    )


def main() -> None:
    world = pathlib.Path(sys.argv[1]).absolute()
    if not world.exists():
        world.mkdir(parents=True)
        tiny_world.write_all(world)
    for moment in sys.argv[2:] or MOMENTS:
        for number in (signal.SIGINT, signal.SIGTERM):
            sys.stdout.write(measure(world, moment, number) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
