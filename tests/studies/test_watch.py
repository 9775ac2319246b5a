"""The watcher of memory and time: what it counts, and what it passes on."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from alphagrpo_jax.studies import watch

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/smaps_rollup").exists(), reason="needs Linux"
)

WATCH = (sys.executable, "-m", "alphagrpo_jax.studies.watch", "--")
HELD = 128 << 20  # bytes
HOLDER = f"""
import subprocess, sys, time
held = b"x" * {HELD}
if len(sys.argv) > 1:
    subprocess.run([sys.executable, *sys.argv[1:]])
else:
    time.sleep(1.5)
"""


def run(*command: str) -> tuple[int, dict, str]:
    finished = subprocess.run([*WATCH, *command], capture_output=True, text=True, check=False)
    *lines, line = finished.stdout.splitlines()
    return finished.returncode, json.loads(line), "\n".join(lines)


def test_counts_the_descendants_and_passes_the_exit_code_on(tmp_path, monkeypatch):
    script = tmp_path / "a (b) holder.py"
    script.write_text(HOLDER)
    monkeypatch.setattr(watch, "PERIOD", 0.1)
    single = watch.watch([sys.executable, str(script)])
    nested = watch.watch([sys.executable, str(script), str(script)])
    assert single.exit_code == nested.exit_code == 0
    assert HELD < single.peak_bytes < 1.5 * HELD
    assert 2 * HELD < nested.peak_bytes < 3 * HELD
    assert 1.5 < single.wall_seconds < 30


def test_ends_with_one_line_and_the_commands_exit_code():
    code, line, output = run("sh", "-c", "echo spoken; exit 75")
    assert (code, output) == (75, "spoken")
    assert line.keys() == {"wall_seconds", "peak_pss_gib"}
    assert run("sh", "-c", "kill -KILL $$")[0] == 128 + signal.SIGKILL
    missing = subprocess.run([*WATCH, "no_such_command"], capture_output=True, text=True)
    assert missing.returncode == watch.NOT_FOUND
    assert missing.stderr.startswith("error: no_such_command cannot be started")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_passes_signals_on(tmp_path, number):
    ready = tmp_path / "ready"
    script = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    command = [*WATCH, sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as process:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, number)  # as the terminal does
        output = process.communicate(timeout=30)[0]
    assert process.returncode == 75
    assert json.loads(output)["wall_seconds"] < 30
