"""Measures where the time of a training step goes.

    python -m alphagrpo_jax.bench [--config=configs/grpo.py] [--steps=5] [--out=bench.json]
      [--against=earlier.json]

Everything is measured in one process, one after the other: a first step with all compilations, then
steps with the rollout alone, the verifier pool alone, and whole steps as training does them, where
the verifiers answer while the device works. Ratios within one such run are worth comparing. Those
of two runs, which `--against` adds, say something where the machine was as idle in both.
"""

import argparse
import functools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from alphagrpo_jax import advantage, config_checks, prompts, reward, rollout, update
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.compilations import CompileCounter
from alphagrpo_jax.runtime.errors import InputError, MissingFileError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.training import setup, verifiers
from alphagrpo_jax.training.context import Run, make_run
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.speed import speed_metrics
from alphagrpo_jax.training.steps import compile_fns
from alphagrpo_jax.types import DataPosition, PromptBatch, RolloutBatch, TrainState

TASKS = ("rt2i", "t2i", "ti2i")  # whose steps are all alike


class StageSeconds(NamedTuple):
    """Seconds that the stages of one training step took."""

    rollout: float
    reward_wait: float
    update: float


STAGES = StageSeconds._fields


def measure(config: Config, folder: pathlib.Path, *, steps: int) -> dict[str, float]:
    """Measures all figures of a configuration, by name; see `table` for their units.

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
    with verifiers.make_pool(config) as pool:
        run, state = start_run(config, folder, pool)
        pool.wait_ready()
        start = time.monotonic()
        state, *_ = _train_step(run, state, 1)
        first_step = time.monotonic() - start
        count, seconds = compiles.count, compiles.seconds
        rollouts = [
            _timed(lambda number=number: _rollout_alone(run, state, number))
            for number in range(2, steps + 2)
        ]
        questions, answering = _answering(run, steps)
        stages, speeds = [], []
        for number in range(2, steps + 2):
            state, stage_seconds, speed = _train_step(run, state, number)
            stages.append(stage_seconds)
            speeds.append(speed)
    total = float(np.median(np.sum(stages, axis=1)))
    by_stage = dict(zip(STAGES, np.median(stages, axis=0).tolist(), strict=True))
    rollout_seconds, answer_seconds = float(np.median(rollouts)), float(np.median(answering))
    return {
        "images_per_second": config.trajectories / rollout_seconds,
        "questions_per_second": questions / answer_seconds,
        "seconds/draw_alone": rollout_seconds,
        "seconds/answer_alone": answer_seconds,
        "seconds/step": total,
        **{f"seconds/{name}": value for name, value in by_stage.items()},
        **{f"share/{name}": value / sum(by_stage.values()) for name, value in by_stage.items()},
        **{name.removeprefix("time/"): _median(speeds, name) for name in speeds[0]},
        "share/verifier_hidden": max(0.0, 1.0 - by_stage["reward_wait"] / answer_seconds),
        "seconds/first_step": first_step,
        "compilations": count,
        "seconds/compilation": seconds,
        "compilations_after_first_step": compiles.count - count,
    }


def start_run(config: Config, folder: pathlib.Path, pool: Any) -> tuple[Run, TrainState]:
    """Loads model and prompts of a run without a run folder; nothing is compiled yet.

    Args:
      config: of the run.
      folder: for the prompt cache.
      pool: of verifiers; None where nothing asks them.
    """
    config, mesh = setup.enter_mesh(config)
    loaded = setup.load_policy(config, mesh)
    data = setup.load_data(config, loaded, folder / "data")
    optimizer = make_optimizer(config.optimizer)
    state = setup.initial_state(config, loaded.base, optimizer, mesh)
    fns = compile_fns(config, loaded, state, optimizer, mesh)
    return make_run(config, loaded, data, fns, pool, folder), state


def _median(rows: Sequence[dict[str, float]], name: str) -> float:
    return float(np.median([row[name] for row in rows]))


def _batch(run: Run, step: int) -> PromptBatch:
    position = (step - 1) * run.config.train.prompts_per_step
    data = {name: context.data for name, context in run.tasks.items()}
    (batch,) = prompts.next_batches(
        run.config, data, step, DataPosition({run.config.task: position}, None)
    )
    return batch


def _sample(
    run: Run, state: TrainState, step: int, on_images: rollout.OnImages | None
) -> RolloutBatch:
    params: PolicyParams = run.sampling_params(state)
    batch = _batch(run, step)
    sampled = rollout.sample(run, params, state.key, step, batch, on_images=on_images)
    jax.block_until_ready(sampled.trajectories)
    return sampled


def _rollout_alone(run: Run, state: TrainState, step: int) -> None:
    """Samples a batch; its images are fetched, as for verifiers, and dropped."""
    _sample(run, state, step, on_images=lambda *_: None)


def _train_step(
    run: Run, state: TrainState, step: int
) -> tuple[TrainState, StageSeconds, dict[str, float]]:
    """Takes one training step as `train.main` does; returns its speed metrics, too."""
    marks = [time.monotonic()]
    sampled = _sample(run, state, step, functools.partial(reward.submit_images, run))
    marks.append(time.monotonic())
    old = update.old_log_probs(run, state, sampled)
    rewards = reward.gather(run, sampled, step)
    marks.append(time.monotonic())
    advantages = advantage.of_batch(rewards, run.config.advantage)
    state, _ = update.step(run, state, [sampled], [old], [advantages], step)
    jax.block_until_ready(state.trainable)
    marks.append(time.monotonic())
    stages = StageSeconds(*np.diff(marks).tolist())
    times = {f"time/{name}": value for name, value in stages._asdict().items()}
    return state, stages, speed_metrics(run.config, run.loaded.config, [sampled], times)


def _answering(run: Run, steps: int) -> tuple[float, list[float]]:
    """Times the pool alone on random images.

    Returns:
      Mean number of questions of a step's samples, and the seconds of each repetition.
    """
    config = run.config
    rng = np.random.default_rng(config.seed)
    shape = (config.trajectories, config.model.height, config.model.width, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    questions = 0

    def answer(turn: int) -> None:  # other prompts every time, as in training
        nonlocal questions
        batch = _batch(run, turn + 2)
        context = run.tasks[batch.task.name]
        rows = np.repeat(batch.rows, config.train.group_size)
        records = [context.data.train.records[row] for row in rows]
        for record in records:
            questions += len(scoring.yes_no_questions(context.scoring, record))
            questions += len(scoring.rating_questions(context.scoring, record))
        sample_ids = [("bench", turn, number) for number in range(len(records))]
        scoring.submit(run.verifier, sample_ids, images, records, context.scoring)
        run.verifier.gather(sample_ids)

    seconds = [_timed(lambda turn=turn: answer(turn)) for turn in range(steps)]
    return questions / steps, seconds


def _timed(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def table(
    figures: dict[str, float], config: Config, against: dict[str, float] | None = None
) -> str:
    """Formats the figures as a table; with those of an earlier run, also as ratios to them."""
    rows = [f"{name:<38}{value}" for name, value in _rows(figures, config)]
    if against is not None:
        names = [name for name in figures if against.get(name) and name != "compilations"]
        ratios = [f"  {name:<36}{figures[name] / against[name]:.3f}" for name in names]
        rows += ["", "now / then", *ratios]
    return "\n".join(rows)


def _rows(figures: dict[str, float], config: Config) -> list[tuple[str, str]]:
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
        ("images per second and device", f"{get('images_per_second_per_device'):.2f}, whole step"),
        ("first step", f"{get('seconds/first_step'):.1f} s"),
        ("compilations", f"{get('compilations'):.0f} in {get('seconds/compilation'):.1f} s"),
        ("  after the first step", f"{get('compilations_after_first_step'):.0f}"),
    ]
    if "mfu" in figures:
        rows.append(("share of the devices' peak (MFU)", f"{get('mfu'):.1%}"))
    return rows


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m alphagrpo_jax.bench", description=__doc__)
    parser.add_argument("--config", default=config_checks.DEFAULT_CONFIG, help="a Python file")
    parser.add_argument("--steps", type=cli.COUNT, default=5, help="repetitions; medians are shown")
    parser.add_argument("--out", help="a JSON file for the figures")
    parser.add_argument("--against", help="such a file of an earlier run, to show ratios")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures a configuration and prints its table."""
    config = config_checks.read_config(options.config)
    against = None if options.against is None else read_figures(options.against)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(config, pathlib.Path(folder), steps=options.steps)
    if options.out:
        replace_text(options.out, json.dumps(figures, indent=2) + "\n")
    print(table(figures, config, against))


def read_figures(path: str | pathlib.Path) -> dict[str, float]:
    """Reads the figures that an earlier run wrote by `--out`.

    Raises:
      MissingFileError: there is no such file.
      InputError: it holds something else.
    """
    try:
        figures = json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        raise MissingFileError(
            f"--against {path}: no such file; bench writes it by --out"
        ) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise InputError(f"--against {path}: expected figures of bench, got {error}") from error
    is_number = isinstance(figures, dict) and all(
        isinstance(value, int | float) for value in figures.values()
    )
    if not is_number or "seconds/step" not in figures:
        raise InputError(
            f"--against {path}: expected an object of numbers with seconds/step, as bench writes "
            "it by --out"
        )
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
