"""Compares the speed of a training step with a plain PyTorch implementation of the same model.

    python -m benchmarks.torch_peer [--repeats=4] [--rows=96] [--parts=rollout] [--out=FILE]

The same weights, prompts and options (`configs/grpo.py` without its warm-up) run by turns in one
process on the cores that it may use: ours by the functions that `train` calls, PyTorch as it is
("eager") and by `torch.compile`. PyTorch's is batched over rows, caches keys and values, cuts
padding to the longest of a batch, and copies no frozen weight but those that adapters are merged
into, as ours does. It samples with its own random numbers, but its texts get the lengths that ours
have, so that both do equal work. Advantages are random, since no verifier is asked.

Before anything is timed both compute log-probs, velocities, gradients and pixels of the same
trajectories; a difference above 1e-4 ends the command with code 1. A first round compiles and a
second warms up; medians are of the rounds behind them. After each update both go back to the
adapters from before it.

    python -m benchmarks.torch_peer --sizes=7b --device=cuda [--rows=4] [--side=512]

compares single functions of a model with random weights on one device: see
`benchmarks.torch_sizes`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import torch

from alphagrpo_jax import config_checks
from alphagrpo_jax.config import Config
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.cores import usable_cores
from alphagrpo_jax.runtime.errors import InputError, UsageError
from alphagrpo_jax.runtime.files import replace_text
from benchmarks import torch_sizes
from benchmarks.torch_bagel import TorchBagel
from benchmarks.torch_equality import (
    JaxTrainer,
    differences,
    numbers,
    random_advantages,
    text_lengths,
)
from benchmarks.torch_sizes import say_now
from benchmarks.torch_training import TorchTrainer

STAGES = ("rollout", "log-probs", "update")
STEP = "whole step"
PARTS = (*STAGES, STEP)
TOLERANCE = 1e-4
WARM_UP = 2  # rounds before those that count
OURS, EAGER, COMPILED = "ours", "eager", "compiled"
COMPILERS = ("c++", "g++", "clang++")


class StageTimes(NamedTuple):
    """Seconds of the stages of one training step; 0 for one that was not run."""

    rollout: float
    log_probs: float
    update: float


class Comparison:
    """Both implementations of one configuration, with equal weights."""

    def __init__(self, config: Config, folder: pathlib.Path, *, compiled: bool) -> None:
        """Loads the model, and converts it.

        Args:
          config: of the training step.
          folder: for the prompt cache.
          compiled: whether PyTorch's functions are compiled, too.
        """
        self.ours = JaxTrainer(config, folder)
        loaded = self.ours.run.loaded
        model = TorchBagel(loaded.config, self.ours.params)
        names = [EAGER, COMPILED] if compiled else [EAGER]
        self.peers = {
            name: TorchTrainer(
                model, loaded.tokenizer, self.ours.run.config, compiled=name == COMPILED
            )
            for name in names
        }

    def check(self, say: Callable[[str], None]) -> dict[str, float]:
        """Compares the numbers; returns the differences by implementation and name.

        Raises:
          InputError: one is above the tolerance.
        """
        reference, figures = numbers(self.ours), {}
        for name, peer in self.peers.items():
            gaps = differences(reference, peer)
            say(f"largest differences, {name}: " + _listed(gaps))
            wrong = {key: gap for key, gap in gaps.items() if not gap <= TOLERANCE}
            if wrong:
                raise InputError(
                    f"{name}: the implementations differ by {_listed(wrong)}, expected at most "
                    f"{TOLERANCE:g}; their times cannot be compared"
                )
            figures |= {f"difference/{name}/{key}": gap for key, gap in gaps.items()}
        return figures

    def round(self, step: int, stages: int) -> dict[str, StageTimes]:
        """Takes one training step by each implementation.

        Args:
          step: number of the prompts.
          stages: how many of the stages are run.
        """
        ours, seconds, config = self.ours, {}, self.ours.run.config
        advantages, state = random_advantages(config, step), ours.copied_state()
        clock = _Clock(stages)
        sampled = clock(lambda: ours.rollout(step))
        old = clock(lambda: ours.old_log_probs(sampled))
        clock(lambda: ours.update(state, sampled, old, advantages))
        seconds[OURS] = clock.times()
        block, text = ours.prompts(sampled.batch), sampled.trajectories.texts[0]
        lengths, start = text_lengths(text), int(sampled.trajectories.images[0].start)
        flat_advantages = torch.from_numpy(advantages.ravel())
        for name, peer in self.peers.items():
            before = [parameter.detach().clone() for parameter in peer.parameters]
            clock = _Clock(stages)
            trajectories = clock(lambda peer=peer: peer.rollout(block, lengths, start))
            log_probs = clock(lambda peer=peer, t=trajectories: peer.old_log_probs(t))
            clock(
                lambda peer=peer, t=trajectories, old=log_probs: peer.update(
                    t, old, flat_advantages
                )
            )
            seconds[name] = clock.times()
            with torch.no_grad():
                for parameter, values in zip(peer.parameters, before, strict=True):
                    parameter.copy_(values)
        return seconds


class _Clock:
    """Runs the first stages of a step, and notes their times."""

    def __init__(self, stages: int) -> None:
        self.stages, self.seconds = stages, []

    def __call__(self, action: Callable[[], Any]) -> Any:
        """Runs a stage; returns its result, or None if it is not one of the first."""
        if len(self.seconds) == self.stages:
            return None
        start = time.perf_counter()
        result = action()
        self.seconds.append(time.perf_counter() - start)
        return result

    def times(self) -> StageTimes:
        """Returns the times, 0 for stages that were not run."""
        return StageTimes(*self.seconds, *[0.0] * (len(STAGES) - len(self.seconds)))


def measure(
    config: Config,
    folder: pathlib.Path,
    *,
    repeats: int,
    parts: Sequence[str] = PARTS,
    compiled: bool,
    say: Callable[[str], None] = say_now,
) -> dict[str, Any]:
    """Compares and times both implementations; returns all figures by name.

    Args:
      config: of the training step.
      folder: for the prompt cache.
      repeats: number of rounds that medians are taken of.
      parts: of `PARTS`; stages behind the last of them are not run.
      compiled: whether PyTorch's functions are compiled, too.
      say: called with a line at a time.
    """
    figures: dict[str, Any] = machine()
    say(", ".join(f"{name} {value}" for name, value in figures.items()))
    comparison = Comparison(config, folder, compiled=compiled)
    figures |= comparison.check(say)
    stages = max(STAGES.index(part) + 1 if part in STAGES else len(STAGES) for part in parts)
    rounds = []
    for number in range(WARM_UP + repeats):
        rounds.append(comparison.round(number + 1, stages))
        say(f"round {number + 1}: " + ", ".join(
            f"{name} {' + '.join(f'{value:.3f}' for value in times)} s"
            for name, times in rounds[-1].items()
        ))  # fmt: skip
    counted = rounds[WARM_UP:]
    for name in counted[0]:
        for part in parts:
            spent = [
                sum(times[name]) if part == STEP else times[name][STAGES.index(part)]
                for times in counted
            ]
            figures[f"seconds/{name}/{part}"] = statistics.median(spent)
            figures[f"all seconds/{name}/{part}"] = spent
    rows = comparison.ours.run.config.trajectories
    figures |= {"rows": rows, "repeats": repeats}
    say(table(figures, parts, list(counted[0]), rows))
    return figures


def table(figures: dict[str, Any], parts: Sequence[str], names: Sequence[str], rows: int) -> str:
    """Formats medians, images/s and ratios as a Markdown table."""
    peers = [name for name in names if name != OURS]
    header = ["part", *names, *(f"ours / {name}" for name in peers)]
    lines = [header, ["---"] * len(header)]
    for part in parts:
        seconds = {name: figures[f"seconds/{name}/{part}"] for name in names}
        cells = [f"{value:.3f} s, {rows / value:.1f} images/s" for value in seconds.values()]
        if part not in ("rollout", STEP):
            cells = [f"{value:.3f} s" for value in seconds.values()]
        ratios = [f"{seconds[OURS] / seconds[name]:.2f}" for name in peers]
        lines.append([part, *cells, *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict[str, Any]:
    """Returns what the figures depend on beside the code."""
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jax": jax.__version__,
    }


def cpu_model() -> str:
    """Returns the processor's name, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m benchmarks.torch_peer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=config_checks.DEFAULT_CONFIG, help="a Python file")
    parser.add_argument("--repeats", type=cli.COUNT, default=4, help="medians of so many rounds")
    parser.add_argument("--rows", type=cli.COUNT, help="trajectories; default: the configuration's")
    parser.add_argument("--parts", help=f"of {', '.join(PARTS)}, with commas; default: all")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out; it is timed where there is a C++ compiler",
    )
    parser.add_argument("--out", help="a JSON file for the figures")
    torch_sizes.add_flags(parser)
    options = parser.parse_args(arguments)
    options.compile = not options.no_compile and any(map(shutil.which, COMPILERS))
    names = torch_sizes.PARTS if options.sizes else PARTS
    options.parts = options.parts.split(",") if options.parts else list(names)
    unknown = sorted(set(options.parts) - set(names))
    if unknown:
        parser.error(f"--parts: got {unknown}, expected some of {', '.join(names)}")
    if options.device == "cuda" and not options.sizes:
        parser.error("--device=cuda goes with --sizes: the training step is compared on the CPU")
    return options


def configuration(options: argparse.Namespace) -> Config:
    """Returns the configuration of the training step that the flags describe.

    Raises:
      UsageError: rows that are no whole number of groups.
    """
    config = config_checks.read_config(options.config)
    changes = {"optimizer.warmup_steps": 0}  # so that the first update has a rate already
    if options.rows:
        group = config.train.group_size
        if options.rows % group:
            raise UsageError(f"--rows={options.rows} must be a multiple of {group}, a group's size")
        changes["train.prompts_per_step"] = options.rows // group
    return config_checks.change_options(config, changes)


def run(options: argparse.Namespace) -> None:
    """Compares what the flags name, and prints the table.

    Raises:
      InputError: the implementations differ, or the device is not there.
      UsageError, ConfigError: flags or options that do not fit.
    """
    torch.set_num_threads(usable_cores())
    if not options.compile:
        print("torch.compile is left out" + " (no C++ compiler)" * (not shutil.which("c++")))
    if options.sizes:
        figures = machine() | torch_sizes.measure(options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(
                configuration(options),
                pathlib.Path(folder),
                repeats=options.repeats,
                parts=options.parts,
                compiled=options.compile,
            )
    if options.out:
        replace_text(options.out, json.dumps(figures, indent=2) + "\n")


def _listed(gaps: dict[str, float]) -> str:
    return ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
