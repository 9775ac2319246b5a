"""Runs a command and says how long it took and how much memory it and its processes held at most.

    python -m alphagrpo_jax.studies.watch -- COMMAND...

Memory is the summed PSS (a page that n processes share counts 1/n in each) of the command and all
its descendants, read from Linux's /proc every two seconds (more often would take noticeable time
from what is measured): a peak shorter than that may be missed. Ends with one line of JSON on stdout
and the command's exit code (128 + n if signal n ended it).
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import UserError

PERIOD = 2.0  # seconds between two readings
PROC = pathlib.Path("/proc")
NOT_FOUND = 127  # exit code, as the shell's


class CommandUsage(NamedTuple):
    """How a command went."""

    exit_code: int
    wall_seconds: float
    peak_bytes: int


def process_tree(root: int) -> set[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended since
            # "pid (name) state parent ...", and a name may hold blanks and brackets.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, new = {root}, [root]
    while new:
        own = children.get(new.pop(), [])
        new += set(own) - found
        found.update(own)
    return found


def pss(process: int) -> int:
    """PSS of one process, bytes; 0 if it has ended or belongs to somebody else."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(process) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


class StartError(UserError, OSError):
    """A command that cannot be started."""

    exit_code = NOT_FOUND


def watch(command: Sequence[str]) -> CommandUsage:
    """Runs a command to its end.

    SIGTERM is passed to the command alone, as `kill` does, SIGINT to its whole process group, as
    the terminal does.

    Raises:
      StartError: it cannot be started.
    """
    began, peak = time.monotonic(), 0
    try:
        process = subprocess.Popen(command, process_group=0)  # else Ctrl-C would reach it twice
    except OSError as error:
        raise StartError(f"{command[0]} cannot be started ({error.strerror})") from error
    passing = {signal.SIGINT: os.killpg, signal.SIGTERM: os.kill}

    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            passing[number](process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in passing}
    try:
        while process.poll() is None:
            peak = max(peak, sum(map(pss, process_tree(process.pid))))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PERIOD)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = process.returncode
    return CommandUsage(code if code >= 0 else 128 - code, time.monotonic() - began, peak)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", nargs="+", help="after --")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Watches a command and prints its figures; returns its exit code."""
    if not (PROC / "self" / "smaps_rollup").exists():
        raise UserError("/proc/PID/smaps_rollup not found; this needs Linux 4.14 or newer")
    found = watch(options.command)
    line = {
        "wall_seconds": round(found.wall_seconds, 1),
        "peak_pss_gib": round(found.peak_bytes / 2**30, 3),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return found.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
