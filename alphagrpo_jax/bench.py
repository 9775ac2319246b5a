"""Measures where the time of a training step goes.

    python -m alphagrpo_jax.bench [--config=configs/grpo.py] [--steps=5] [--out=bench.json]

Everything is measured in one process, one after the other: a first step with all compilations, then
steps with drawing alone, the verifier pool alone, and whole steps as training does them, where the
verifiers answer while the device works. Only ratios within one such run are worth comparing.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alphagrpo_jax import config_checks, initial_images, update
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.prompts import next_batches
from alphagrpo_jax.reward import advantage_of, gather
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rollout import sample
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import CompileCounter
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import setup
from alphagrpo_jax.training import verifiers as verifiers_lib
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.training.steps import compile_fns
from alphagrpo_jax.types import DataPosition, PromptBatch, RolloutBatch, TrainState

TASKS = ("rt2i", "t2i", "ti2i")  # whose steps are all alike


class Silent:
    """A pool that takes images and answers nothing: drawing without verifiers beside it."""

    def submit(self, *_: object) -> None:
        """Takes a sample."""


class Seconds(NamedTuple):
    """How long the stages of one training step took."""

    rollout: float
    reward_wait: float
    update: float


STAGES = Seconds._fields


def measure(config: Config, folder: pathlib.Path, *, steps: int) -> dict[str, float]:
    """All figures of a configuration, by name; see `table` for their units.

    Args:
      config: of the run.
      folder: for the prompt cache.
      steps: repetitions of each measurement; medians are reported.
    Raises:
      UserError: as in training; ConfigError also for a task whose steps are not all alike.
    """
    if config.task not in TASKS:
        raise ConfigError(f"task: got {config.task!r}, bench measures one of {TASKS}")
    compiles = CompileCounter()
    mesh = setup.make_mesh(config)
    jax.set_mesh(mesh)
    loaded = setup.load_policy(config, mesh)
    data = setup.load_data(config, loaded, folder / "data")
    optimizer = setup.make_optimizer(config)
    state = setup.initial_state(config, loaded.base, optimizer, mesh)
    steps_ = compile_fns(config, loaded, state, optimizer, mesh)
    with verifiers_lib.make_pool(config) as pool:
        pool.wait_ready()
        run = Run(config, loaded, data, steps_, pool, folder)
        first = time.monotonic()
        state, _ = _step(run, state, 1)
        first = time.monotonic() - first
        count, seconds = compiles.count, compiles.seconds
        silent = run._replace(pool=Silent())
        drawing = [_timed(lambda at=at: _draw(silent, state, at)) for at in range(2, steps + 2)]
        questions, answering = _answering(run, state, steps)
        whole = []
        for at in range(2, steps + 2):
            state, spent = _step(run, state, at)
            whole.append(spent)
    total = float(np.median(np.sum(whole, axis=1)))
    parts = dict(zip(STAGES, np.median(whole, axis=0).tolist(), strict=True))
    draw, answer = float(np.median(drawing)), float(np.median(answering))
    return {
        "images_per_second": config.trajectories / draw,
        "questions_per_second": questions / answer,
        "seconds/draw_alone": draw,
        "seconds/answer_alone": answer,
        "seconds/step": total,
        **{f"seconds/{name}": value for name, value in parts.items()},
        **{f"share/{name}": value / sum(parts.values()) for name, value in parts.items()},
        "share/verifier_hidden": max(0.0, 1.0 - parts["reward_wait"] / answer),
        "seconds/first_step": first,
        "compilations": count,
        "seconds/compilation": seconds,
        "compilations_after_first_step": compiles.count - count,
    }


def _batch(run: Run, state: TrainState, step: int) -> PromptBatch:
    place = DataPosition({run.config.task: (step - 1) * run.config.train.prompts_per_step}, None)
    initial_images.fill(run, state, step, place)
    (batch,) = next_batches(run.config, run.data, step, place)
    return batch


def _draw(run: Run, state: TrainState, step: int) -> RolloutBatch:
    drawn = sample(run, state, step, _batch(run, state, step))
    jax.block_until_ready(drawn.trajectories)
    return drawn


def _step(run: Run, state: TrainState, step: int) -> tuple[TrainState, Seconds]:
    """One training step as `train.main` does it."""
    marks = [time.monotonic()]
    drawn = _draw(run, state, step)
    marks.append(time.monotonic())
    old = update.old_log_probs(run, state, drawn)
    scores = gather(run, drawn, None, step)
    marks.append(time.monotonic())
    advantages = advantage_of(run.config, drawn, scores)
    state, *_ = update.step(run, state, [drawn], [old], [advantages], step)
    jax.block_until_ready(state.trainable)
    marks.append(time.monotonic())
    return state, Seconds(*np.diff(marks).tolist())


def _answering(run: Run, state: TrainState, steps: int) -> tuple[float, list[float]]:
    """Mean number of questions of a step's samples, and the seconds the pool alone takes."""
    config = run.config
    rng = np.random.default_rng(config.seed)
    shape = (config.trajectories, config.model.height, config.model.width, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    asked = 0

    def ask(turn: int) -> None:  # other prompts every time, as in training
        nonlocal asked
        batch = _batch(run, state, turn + 2)
        rows = np.repeat(batch.rows, config.train.group_size)
        records = [run.data[batch.task.name].train.records[row] for row in rows]
        options = options_lib.scoring_options(config, batch.task)
        for record in records:
            asked += len(scoring.yes_no_questions(options, record))
            asked += len(scoring.rating_questions(options, record))
        ids = [("bench", turn, number) for number in range(len(records))]
        scoring.submit(run.pool, ids, images, records, options, first=0)
        run.pool.gather(ids)

    spent = [_timed(lambda turn=turn: ask(turn)) for turn in range(steps)]
    return asked / steps, spent


def _timed(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def table(figures: dict[str, float], config: Config) -> str:
    """The figures for people."""
    get = figures.__getitem__
    rows = [
        ("rollout alone (think and draw)", f"{get('images_per_second'):.1f} images/s"),
        (
            f"verifier pool alone ({config.verifier.workers} x {config.verifier.threads} threads)",
            f"{get('questions_per_second'):.0f} questions/s",
        ),
        (f"step of {config.trajectories} trajectories", f"{get('seconds/step'):.3f} s"),
        *(
            (f"  {name}", f"{get(f'seconds/{name}'):.3f} s  {get(f'share/{name}'):6.1%}")
            for name in STAGES
        ),
        ("verifier time hidden", f"{get('share/verifier_hidden'):.1%}"),
        ("first step", f"{get('seconds/first_step'):.1f} s"),
        ("compilations", f"{get('compilations'):.0f} in {get('seconds/compilation'):.1f} s"),
        ("  after the first step", f"{get('compilations_after_first_step'):.0f}"),
    ]
    return "\n".join(f"{name:<38}{value}" for name, value in rows)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m alphagrpo_jax.bench", description=__doc__)
    parser.add_argument("--config", default=config_checks.DEFAULT_CONFIG, help="a Python file")
    parser.add_argument("--steps", type=int, default=5, help="repetitions; medians are shown")
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Measures a configuration and prints its table."""
    config = config_checks.read_config(options.config)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(config, pathlib.Path(folder), steps=options.steps)
    if options.out:
        replace_text(options.out, json.dumps(figures, indent=2) + "\n")
    print(table(figures, config))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
