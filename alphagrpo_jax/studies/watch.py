"""Runs a command and measures its wall time and the peak memory of its process tree.

    python -m alphagrpo_jax.studies.watch -- COMMAND...

Memory is the summed PSS (a page that n processes share counts 1/n in each) of the command and all
its descendants, read from Linux's /proc every two seconds: a shorter peak may be missed. Prints one
line of JSON to stdout at the end and exits with the command's exit code (128 + n if signal n ended
it).
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

PERIOD = 2.0  # seconds between two readings; shorter periods slow the command down noticeably
PROC = pathlib.Path("/proc")
NOT_FOUND = 127  # exit code, as the shell's


class CommandUsage(NamedTuple):
    """Exit code, wall time and peak memory of a command."""

    exit_code: int
    wall_seconds: float
    peak_bytes: int


def process_tree(root: int) -> set[int]:
    """Returns the ids of a process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended since
            # "pid (name) state parent ...", and a name may hold blanks and brackets.
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    processes, pending = {root}, [root]
    while pending:
        process_children = children.get(pending.pop(), [])
        pending += set(process_children) - processes
        processes.update(process_children)
    return processes


def pss(process: int) -> int:
    """Reads the PSS of one process, bytes; 0 if it has ended or belongs to another user."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(process) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


class StartError(UserError, OSError):
    """A command that cannot be started."""

    exit_code = NOT_FOUND


def watch(command: Sequence[str]) -> CommandUsage:
    """Runs a command to its end and forwards SIGTERM and SIGINT to it.

    Raises:
      StartError: it cannot be started.
    """
    start_time, peak = time.monotonic(), 0
    try:
        process = subprocess.Popen(command, process_group=0)  # else Ctrl-C would reach it twice
    except OSError as error:
        raise StartError(f"{command[0]} cannot be started ({error.strerror})") from error
    # SIGTERM to the command alone, as `kill` does; SIGINT to its group, as the terminal does.
    senders = {signal.SIGINT: os.killpg, signal.SIGTERM: os.kill}

    def forward(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            senders[signal.Signals(number)](process.pid, number)

    before = {number: signal.signal(number, forward) for number in senders}
    try:
        while process.poll() is None:
            peak = max(peak, sum(map(pss, process_tree(process.pid))))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PERIOD)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = process.returncode
    exit_code = code if code >= 0 else 128 - code
    return CommandUsage(exit_code, time.monotonic() - start_time, peak)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", nargs="+", help="after --")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Watches a command and prints its figures; returns its exit code."""
    if not (PROC / "self" / "smaps_rollup").exists():
        raise UserError("/proc/PID/smaps_rollup not found; this needs Linux 4.14 or newer")
    usage = watch(options.command)
    line = {
        "wall_seconds": round(usage.wall_seconds, 1),
        "peak_pss_gib": round(usage.peak_bytes / 2**30, 3),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return usage.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
