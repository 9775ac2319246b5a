"""Trains by AlphaGRPO: prompts, rollout, reward, advantage, loss, update, again and again.

    python -m alphagrpo_jax.train --config=configs/grpo.py [--workdir=DIR] [--config.FIELD=VALUE]

Exit codes: 0 done, 75 stopped by SIGTERM or SIGINT after a save (run the same command again), 1 a
failure explained in one message, 2 wrong usage or configuration.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import initial_images, update
from alphagrpo_jax.config import Config, MeshOptions
from alphagrpo_jax.evaluation.heldout import check_heldout, evaluate_first, evaluate_row, is_regular
from alphagrpo_jax.prompts import next_batches, start_position
from alphagrpo_jax.reward import advantage_of, gather, gather_reflections
from alphagrpo_jax.rollout import sample
from alphagrpo_jax.runtime import checkpoint, cli, distributed
from alphagrpo_jax.runtime import metrics as metrics_lib
from alphagrpo_jax.runtime.cli import DONE, STOPPED
from alphagrpo_jax.runtime.errors import AccessError, UsageError, UserError, is_machine_error
from alphagrpo_jax.runtime.metrics import merge_metrics, notify
from alphagrpo_jax.runtime.stopping import StopFlag
from alphagrpo_jax.training import run_folder, setup
from alphagrpo_jax.training import steps as steps_lib
from alphagrpo_jax.training import verifiers as verifiers_lib
from alphagrpo_jax.training.checks import check_end, early_decay
from alphagrpo_jax.training.context import Run

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default runs/<config name>.")


def main(config: Config, workdir: pathlib.Path) -> int:
    """Runs a configuration in a folder, from where it stands; returns the exit code."""
    # ------------------------------------------------------------------ build
    stop, compiles = StopFlag(), metrics_lib.CompileCounter()
    mesh = setup.make_mesh(config)
    jax.set_mesh(mesh)
    config = dataclasses.replace(config, mesh=MeshOptions(**mesh.shape))
    checkpoint.check_writable(workdir, state_bytes=0)
    run_folder.check_folder(config, workdir)
    if notice := early_decay(config):
        notify(notice)
    loaded = setup.load_policy(config, mesh)
    data = setup.load_data(config, loaded, workdir / "data" / str(jax.process_index()))
    check_heldout(config, data)
    optimizer = setup.make_optimizer(config)
    state = setup.initial_state(config, loaded.base, optimizer, mesh)
    checkpoint.check_writable(workdir, state_bytes=sum(x.nbytes for x in jax.tree.leaves(state)))
    steps = steps_lib.compile_fns(config, loaded, state, optimizer, mesh)

    # ---------------------------------------------------------------- restore
    saves = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep)
    state, done, place = run_folder.restore(saves, state, start_position(config), data)
    log = metrics_lib.MetricsLog(workdir, last_step=done, writes=distributed.is_primary())
    if done >= config.train.steps > 0 and run_folder.is_finished(workdir):
        notify(f"{workdir} is finished: {done} steps are done")
        return DONE
    check_end(config, log, done)
    board = metrics_lib.TensorBoardWriter(
        workdir, enabled=config.log.tensorboard and distributed.is_primary(), step=done
    )
    bar = metrics_lib.Progress(
        total=config.train.steps,
        done=done,
        enabled=config.log.progress and distributed.is_primary(),
    )

    def record(step: int, row: Mapping[str, Any]) -> None:
        (log.complete if log.owes(step) else log.write)(step, row)
        board.write(step, row)
        bar.show(row, advance=int(step > done))

    with (
        verifiers_lib.open_verifiers(config, loaded) as (pool, second),
        run_folder.saved_on_error(saves, data, record) as kept,
    ):
        if config.train.steps > 0 or not run_folder.holds_run(workdir):
            run_folder.mark_running(workdir, config)
        run = Run(config, loaded, data, steps, pool, workdir, second)
        settled = evaluate_first(run, state, done, place, log, record, stop)
        counts = verifiers_lib.PoolCounts(pool)
        # ---------------------------------------------------------- the loop
        while done < config.train.steps and not distributed.any_process(stop.requested):
            step, started = done + 1, time.monotonic()
            kept.hold(state, done, place)
            initial_images.fill(run, state, step, place)
            batches = next_batches(config, data, step, place)
            given = time.monotonic()
            drawn = [sample(run, state, step, batch) for batch in batches]
            rolled = time.monotonic()
            old = [update.old_log_probs(run, state, each) for each in drawn]
            verdicts = [gather_reflections(run, each) for each in drawn]
            scores = [gather(run, *each, step) for each in zip(drawn, verdicts, strict=True)]
            rewarded = time.monotonic()
            advantages = [
                advantage_of(config, *each) for each in zip(drawn, scores, verdicts, strict=True)
            ]
            kept.drop()
            state, learned, parts = update.step(run, state, drawn, old, advantages, step)
            updated = time.monotonic()
            parts = [
                score.metrics() | each.text_metrics | advantage.metrics | part
                for score, each, advantage, part in zip(
                    scores, drawn, advantages, parts, strict=True
                )
            ]
            names = [batch.task.name for batch in batches]
            row = merge_metrics(config, names, parts) | learned
            row |= {
                "time/initial_images": given - started,
                "time/rollout": rolled - given,
                "time/reward_wait": rewarded - rolled,
                "time/update": updated - rewarded,
            }
            if is_regular(config, config.eval.every, step):
                kept.hold(state, step, place, row)
                row |= evaluate_row(run, state, step, greedy=step == config.train.steps)
            row |= {
                "time/eval": time.monotonic() - updated,
                "time/compilations": compiles.count,
            } | counts.metrics()
            # ------------------------------------------------------- log, save
            regular = is_regular(config, config.checkpoint.every, step)
            if regular:
                content = run_folder.content(state, step, place, data)
                row["state/digest"] = checkpoint.digest(*content)
            record(step, row)
            done = step
            if regular:
                saves.save(done, *content)
        # ---------------------------------------------------------------- end
        if done < config.train.steps and saves.latest() != done:  # stopped
            saves.save(done, *run_folder.content(state, done, place, data))
    saves.close()
    board.close()
    bar.close()
    if config.train.steps == 0:
        return DONE if settled else STOPPED
    if done < config.train.steps or not settled:
        notify(f"stopped after step {done}; the same command continues")
        return STOPPED
    run_folder.mark_finished(workdir, done)
    notify(f"{workdir}: {done} steps are done")
    return DONE


def command(argv: Sequence[str]) -> None:
    """Runs the command: finds configuration and folder, and ends with the exit code."""
    if len(argv) > 1:
        fail(f"unexpected arguments {argv[1:]}; see --help")
    if _CONFIG.value is None:
        fail("no --config given; the default is --config=configs/grpo.py")
    logging.set_verbosity(logging.WARNING)  # libraries; our own notices go to stderr
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{name}"
    if "://" in workdir:
        fail(f"--workdir={workdir}: expected a folder; mount the bucket and name that")
    sys.exit(cli.exit_code_of(lambda: start(_CONFIG.value, pathlib.Path(workdir))))


def start(fields: Mapping[str, Any], workdir: pathlib.Path) -> int:
    """Checks a configuration and runs it; returns the exit code.

    Raises:
      UserError: the run cannot start or go on; the message says what to do.
    """
    config = config_lib.from_config_dict(fields)
    distributed.initialize()
    try:
        return main(config, workdir)
    except KeyboardInterrupt:
        raise UserError("interrupted twice; the last checkpoint is untouched") from None
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
