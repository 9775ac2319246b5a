"""Trains by AlphaGRPO: prompts, rollout, reward, advantage, loss, update, again and again.

    python -m alphagrpo_jax.train --config=configs/grpo.py [--workdir=DIR] [--config.FIELD=VALUE]
      [--profile=START:COUNT]

Exit codes: 0 done, 75 stopped by SIGTERM or SIGINT after a save (run the same command again), 1 a
failure explained in one message, 2 wrong usage or configuration, 130 ended by a third Ctrl-C.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from alphagrpo_jax import advantage, initial_images, prompts, reward, rollout, update
from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.config import Config
from alphagrpo_jax.evaluation import heldout
from alphagrpo_jax.planning import shortage
from alphagrpo_jax.runtime import checkpoint, cli, distributed, peers
from alphagrpo_jax.runtime import metrics as metrics_lib
from alphagrpo_jax.runtime.cli import DONE, STOPPED
from alphagrpo_jax.runtime.compilations import CompileCounter, use_cache
from alphagrpo_jax.runtime.console import Console
from alphagrpo_jax.runtime.device_memory import is_shortage
from alphagrpo_jax.runtime.errors import AccessError, UsageError, UserError, is_machine_error
from alphagrpo_jax.runtime.metric_reductions import merge_batches
from alphagrpo_jax.runtime.metrics import notify
from alphagrpo_jax.runtime.profiling import ProfiledSteps, StepProfiler
from alphagrpo_jax.runtime.stopping import StoppedError, StopSignals
from alphagrpo_jax.training import run_folder, setup, verifiers
from alphagrpo_jax.training.checks import check_end, early_decay
from alphagrpo_jax.training.closing import closing_words
from alphagrpo_jax.training.context import Run, make_run
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.speed import speed_metrics
from alphagrpo_jax.training.steps import compile_fns
from alphagrpo_jax.training.writers import Writers
from alphagrpo_jax.types import (
    BatchAdvantages,
    BatchRewards,
    DataPosition,
    RolloutBatch,
    TrainState,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default runs/<config name>.")
_PROFILE = flags.DEFINE_string("profile", None, "START:COUNT, updates that the profiler traces.")

LAST_SECONDS = 1.5  # by which the process that keeps the others' store ends after them


def main(
    config: Config,
    workdir: pathlib.Path,
    console: Console | None = None,
    stop: StopSignals | None = None,
    profiled: ProfiledSteps | None = None,
) -> int:
    """Runs a configuration in a folder, from where it stands; returns the exit code.

    Args:
      config: the run's.
      workdir: the run's folder.
      console: shows phases and progress; None: nothing is shown.
      stop: ends the run early; None: SIGTERM and SIGINT do, but not in the middle of compiling.
      profiled: updates that the profiler traces.
    Raises:
      UserError: the run cannot start or go on; the message says what to do.
    """
    if stop is None:
        with StopSignals(grace_seconds=config.checkpoint.stop_seconds) as stop:
            return main(config, workdir, console, stop, profiled)
    # ------------------------------------------------------------------ build
    console, compiles = console or Console(enabled=False), CompileCounter()
    console.compile_seconds = lambda: compiles.seconds
    config, mesh = setup.enter_mesh(config)
    check_start(config, workdir)
    cache, profiler = use_cache(config.cache.dir, workdir), StepProfiler(profiled, workdir)
    with console.phase("loading the model"):
        loaded = setup.load_policy(config, mesh)
    with console.phase("reading the prompts"):
        data = setup.load_data(config, loaded, workdir / "data" / str(jax.process_index()))
        heldout.check_heldout(config, data)
    with console.phase("preparing the train state"):
        optimizer = make_optimizer(config.optimizer)
        state = setup.initial_state(config, loaded.base, optimizer, mesh)
    checkpoint.check_writable(workdir, state_bytes=sum(x.nbytes for x in jax.tree.leaves(state)))
    fns = compile_fns(config, loaded, state, optimizer, mesh)
    # ---------------------------------------------------------------- restore
    saves = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, on_failure=peers.fail)
    state = state if saves.latest() is not None else setup.with_adapter(config, state)
    state, done, position = run_folder.restore(saves, state, prompts.start_position(config), data)
    log = metrics_lib.MetricsLog(workdir, last_step=done, writes=distributed.is_primary())
    if done >= config.train.steps > 0 and run_folder.is_finished(workdir):
        notify(f"{workdir} is finished: {done} steps are done")
        return DONE
    check_end(config, log, done)
    writers = open_writers(config, workdir, log, console, done)
    emergency = run_folder.EmergencyCheckpoint(saves, data, writers.log_row)
    stop.rescue, evaluated = emergency.rescue, False

    with (
        contextlib.suppress(StoppedError),
        verifiers.open_verifiers(config, loaded, console, stop) as (verifier, second_verifier),
        emergency.on_error(),
    ):
        if config.train.steps > 0 or not run_folder.holds_run(workdir):
            run_folder.mark_running(workdir, config, loaded.weights)
        run = make_run(config, loaded, data, fns, verifier, workdir, second_verifier, console, stop)
        evaluate_pending(run, state, done, position, data, log, writers)
        evaluated, pool_counts = True, verifiers.PoolCounts(verifier)
        # ---------------------------------------------------------- the loop
        while done < config.train.steps and not distributed.must_stop(stop.requested, done):
            step, timer = done + 1, metrics_lib.Timer()
            saves.check()
            profiler.begin(step)
            console.start_step(step, config.train.steps)
            emergency.hold(state, done, position)
            params = run.sampling_params(state)
            verifiers.follow(verifier, params)  # the policy may be its own verifier
            with timer("initial_images"):
                initial = initial_images.take(run, params, state.key, step, position)
                batches = prompts.next_batches(config, data, step, position, initial)
            with timer("rollout"):
                on_images = functools.partial(reward.submit_images, run)
                on_texts = functools.partial(reward.submit_reflections, run)
                rollouts = [
                    rollout.sample(
                        run, params, state.key, step, batch, on_images=on_images, on_texts=on_texts
                    )
                    for batch in batches
                ]
            del params  # a copy of all weights, if adapters are merged
            with timer("reward_wait"):  # the device computes while the verifiers still answer
                old = [update.old_log_probs(run, state, batch) for batch in rollouts]
                rewards = [reward.gather(run, batch, step) for batch in rollouts]
            advantages = [advantage.of_batch(batch, config.advantage) for batch in rewards]
            with timer("update"):
                state, metrics = update.step(run, state, rollouts, old, advantages, step)
            rollout.release(rollouts)
            row = step_row(config, rollouts, rewards, advantages, metrics) | timer.metrics()
            with timer("eval"):
                if heldout.is_due(config, config.eval.every, step):
                    emergency.hold(state, step, position, row)
                    greedy = step == config.train.steps
                    row |= evaluate(run, state, step, greedy=greedy, update_row=row)
            row |= timer.metrics() | compiles.metrics() | pool_counts.metrics()
            row |= speed_metrics(config, loaded.config, rollouts, row)
            # ------------------------------------------------------- log, save
            if save_due := heldout.is_due(config, config.checkpoint.every, step):
                content = run_folder.content(state, step, position, data)
                row["state/digest"] = checkpoint.digest(*content)
            writers.log_row(step, row)
            done = step
            if save_due:
                saves.save(done, *content, wait=False)
        # ---------------------------------------------------------------- end
        if done < config.train.steps and saves.latest() != done:  # stopped
            saves.save(done, *run_folder.content(state, done, position, data))
    saved = saves.latest() or 0  # more than `done` if a stop has ended an evaluation
    for closed in (saves, writers, profiler):
        closed.close()
    notify(compiles.words(cache))
    if done < config.train.steps or not evaluated:
        notify(f"stopped after step {saved}; the same command continues")
        return STOPPED
    if config.train.steps > 0:
        run_folder.mark_finished(workdir, done)
        notify(f"{workdir}: {done} steps are done")
        console.message(closing_words(config, workdir, log.rows, data, console.seconds))
    return DONE


def check_start(config: Config, workdir: pathlib.Path) -> None:
    """Refuses a folder that not all can write, or of another run; notifies of an early decay."""
    checkpoint.check_writable(workdir, state_bytes=0)
    checkpoint.check_shared(workdir)
    run_folder.check_folder(config, workdir)
    if notice := early_decay(config):
        notify(notice)


def open_writers(
    config: Config,
    workdir: pathlib.Path,
    log: metrics_lib.MetricsLog,
    console: Console,
    done: int,
) -> Writers:
    """Opens the writers of a run's rows, behind those of the steps that are done."""
    return Writers(
        log,
        workdir,
        console,
        config=dataclasses.asdict(config),
        options=config.log,
        step=done,
        total=config.train.steps,
    )


def step_row(
    config: Config,
    rollouts: Sequence[RolloutBatch],
    rewards: Sequence[BatchRewards],
    advantages: Sequence[BatchAdvantages],
    metrics: update.UpdateMetrics,
) -> dict[str, Any]:
    """Merges the metrics of an update's batches and of the update itself into one row."""
    batch_metrics = [
        reward_batch.metrics | rollout_batch.metrics | advantage_batch.text.metrics | update_metrics
        for reward_batch, rollout_batch, advantage_batch, update_metrics in zip(
            rewards, rollouts, advantages, metrics.batches, strict=True
        )
    ]
    names = [rollout_batch.batch.task.name for rollout_batch in rollouts]
    merged = merge_batches(batch_metrics, names, by_task=config.task == "mixed")
    return merged | metrics.update


def evaluate(
    run: Run,
    state: TrainState,
    step: int,
    *,
    greedy: bool,
    label: str | None = None,
    update_row: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluates a train state; see `heldout.evaluate`."""
    params = run.sampling_params(state)
    verifiers.follow(run.verifier, params)
    with run.stop.at_once():
        return heldout.evaluate(
            run, params, step, greedy=greedy, label=label, update_row=update_row
        )


def evaluate_pending(
    run: Run,
    state: TrainState,
    done: int,
    position: DataPosition,
    data: Mapping[str, prompts.TaskData],
    log: metrics_lib.MetricsLog,
    writers: Writers,
) -> None:
    """Does the evaluation that is due before the first update; see `heldout.Pending`.

    Raises:
      StoppedError: a stop was requested before it was done.
    """
    config, pending = run.config, heldout.pending(run.config, log, done)
    if pending is heldout.Pending.NONE:
        return
    if pending is heldout.Pending.REPORT:
        row = evaluate(run, state, done, greedy=True, label="evaluation")
        heldout.write_report(run.workdir, {"step": done} | row)
        return
    row = evaluate(run, state, done, greedy=done in (0, config.train.steps))
    if done and heldout.is_due(config, config.checkpoint.every, done):
        row["state/digest"] = checkpoint.digest(*run_folder.content(state, done, position, data))
    writers.log_row(done, row)
    if config.train.steps == 0:
        heldout.write_report(run.workdir, {"step": 0} | row)


def command(argv: Sequence[str]) -> None:
    """Runs the command: finds configuration and folder, and ends with the exit code."""
    if len(argv) > 1:
        fail(f"unexpected arguments {argv[1:]}; see --help")
    if _CONFIG.value is None:
        fail("no --config given; the default is --config=configs/grpo.py")
    logging.set_verbosity(logging.WARNING)  # libraries; our own notices go to stderr
    config_file = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = _WORKDIR.value or f"runs/{config_file.stem}"
    if "://" in workdir:
        fail(f"--workdir={workdir}: expected a folder; mount the bucket and name that")
    arguments = (_CONFIG.value, pathlib.Path(workdir), _PROFILE.value, config_file)
    sys.exit(cli.exit_code_of(lambda: start(*arguments)))


def start(
    fields: Mapping[str, Any],
    workdir: pathlib.Path,
    profile: str | None = None,
    config_file: pathlib.Path = config_lib.DEFAULT_CONFIG,
) -> int:
    """Checks a configuration and runs it; returns the exit code.

    Args:
      fields: of the configuration.
      workdir: the run's folder.
      profile: updates that the profiler traces, "START:COUNT".
      config_file: where the configuration comes from, for messages.
    Raises:
      UserError: the run cannot start or go on; the message says what to do.
    """
    config = config_lib.from_config_dict(fields)
    profiled = ProfiledSteps.parse(profile) if profile else None
    distributed.initialize()
    progress = config.log.progress and distributed.is_primary()
    stop = StopSignals(
        grace_seconds=config.checkpoint.stop_seconds,
        end_process=end_process,
        announce=distributed.announce_stop,
        announced=distributed.stop_announced if distributed.is_joined() else None,
    )
    with peers.ending_together():
        console = Console(enabled=progress)
        return run_explained(config, workdir, console, stop, profiled, config_file)


def run_explained(
    config: Config,
    workdir: pathlib.Path,
    console: Console,
    stop: StopSignals,
    profiled: ProfiledSteps | None,
    config_file: pathlib.Path,
) -> int:
    """Runs `main`, and says of errors of the machine what they mean for the run.

    Raises:
      UserError: see `main`; AccessError for files that cannot be read or written; DeviceMemoryError
        for devices with too little memory.
    """
    try:
        with stop, console:
            return main(config, workdir, console, stop, profiled)
    except jax.errors.JaxRuntimeError as error:
        if not is_shortage(error):
            raise
        raise shortage.explain(error, config, config_file) from error
    except OSError as error:
        in_workdir = isinstance(error.filename, str) and (
            pathlib.Path(error.filename).absolute().is_relative_to(workdir.absolute())
        )
        if isinstance(error, UserError) or not (in_workdir or is_machine_error(error)):
            raise
        raise AccessError(
            f"{error}; the run's folder {workdir} or another file cannot be read or written: look "
            "for a full disk, then run the same command again: it continues from the last "
            "checkpoint"
        ) from error


def end_process(code: int) -> NoReturn:
    """Ends the process at once, whatever its main thread does; called from another thread."""
    peers.announce_end(code)
    if distributed.is_joined() and distributed.is_primary():
        time.sleep(LAST_SECONDS)  # without its store the other processes would end by a failure
    os._exit(code)


def fail(message: str) -> NoReturn:
    """Ends the process as after wrong usage, with one message on stderr."""
    sys.exit(cli.report(UsageError(message)))


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags by absl; wrong flags and unknown fields end the process with code 2."""
    try:
        return flags.FLAGS(list(argv))
    except (
        flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError,
        ImportError,
    ) as error:  # fmt: skip
        fail(f"{error}; see --help, and configs/grpo.py for the fields")


if __name__ == "__main__":
    app.run(command, flags_parser=parse_flags)
