"""Trains by AlphaGRPO: prompts, rollout, reward, advantage, loss, update, again and again.

    python -m alphagrpo_jax.train --config=configs/grpo.py [--workdir=DIR] [--config.FIELD=VALUE]

Exit codes: 0 done, 75 stopped by SIGTERM or SIGINT after a save (run the same command again), 1 a
failure explained in one message, 2 wrong usage or configuration.
"""

import dataclasses
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from alphagrpo_jax import build, prompts, run_folder
from alphagrpo_jax import config as config_lib
from alphagrpo_jax.advantage import Advantages, group_advantage
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.config_fields import MeshShape
from alphagrpo_jax.evaluation import CHECKERS, Evaluation, check_records, evaluate
from alphagrpo_jax.guards import TrainingError, check_end, check_sampled, check_validity
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.pool import Pool, PoolError
from alphagrpo_jax.rewards.questions import Record
from alphagrpo_jax.runtime import checkpoint, distributed
from alphagrpo_jax.runtime import metrics as metrics_lib
from alphagrpo_jax.runtime.stopping import StopFlag, StoppedError
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.types import Rollout, StepScores, TextBlock, TrainState, UpdateBatch

DONE, STOPPED, FAILED, WRONG_USAGE = 0, 75, 1, 2
EVALUATION_FILE = "evaluation.json"

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default runs/<config name>.")


# Metrics of a batch's first optimizer step; of its others the last one's are kept.
FIRST_ONLY = {"text/ratio_max_dev", "image/ratio_max_dev", "logp/rollout_update_max_abs_diff"}


# Errors whose message says what to do; anything else comes with its traceback.
EXPLAINED = (TrainingError, checkpoint.CheckpointError, PoolError, ValueError, FileNotFoundError)


class Drawn(NamedTuple):
    """The trajectories of one update, their images under way to the verifiers."""

    trajectories: Rollout
    records: list[Record]  # one per trajectory
    ids: list[tuple[int, int]]  # of the samples in the pool
    texts: list[str] | None  # think texts
    text_metrics: dict[str, float]


def main(config: Config, workdir: pathlib.Path) -> int:
    """Runs a configuration in a folder, from where it stands; returns the exit code."""
    # ------------------------------------------------------------------ build
    stop, compiles = StopFlag(), metrics_lib.CompileCounter()
    mesh = build.make_mesh(config)
    jax.set_mesh(mesh)
    config = dataclasses.replace(config, mesh=MeshShape(*mesh.devices.shape))
    checkpoint.check_writable(workdir, state_bytes=0)
    run_folder.check_folder(config, workdir)
    loaded = build.load_policy(config, mesh)
    data = build.load_data(config, loaded, workdir / "data" / str(jax.process_index()))
    size = (config.model.height, config.model.width)
    check_records(data.heldout, CHECKERS[config.eval.checker], size)
    optimizer = build.make_optimizer(config)
    state = build.initial_state(config, loaded.base, optimizer, mesh)
    checkpoint.check_writable(workdir, state_bytes=sum(x.nbytes for x in jax.tree.leaves(state)))
    steps = build.jit_steps(config, loaded, state, optimizer, mesh)

    # ---------------------------------------------------------------- restore
    saves = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep)
    state, done, position = run_folder.restore(saves, state, data)
    log = metrics_lib.MetricsLog(workdir, last_step=done, writes=distributed.is_primary())
    if done >= config.train.steps > 0 and run_folder.is_finished(workdir):
        say(f"{workdir} is finished: {done} steps are done")
        return DONE
    check_end(config, log, done)
    evaluates_only = config.train.steps == 0
    if not (evaluates_only and run_folder.exists(workdir)):
        run_folder.mark_running(workdir, config)
    board = metrics_lib.Board(
        workdir, enabled=config.log.tensorboard and distributed.is_primary(), step=done
    )
    bar = metrics_lib.Progress(
        total=config.train.steps,
        done=done,
        enabled=config.log.progress and distributed.is_primary(),
    )

    def record(step: int, row: Mapping[str, Any]) -> None:
        log.write(step, row)
        board.write(step, row)
        bar.show(row, advance=int(step > 0))

    with build.make_pool(config) as pool:
        pool.wait_ready()
        run = Run(config, loaded, data, steps, pool, workdir)
        # -------------------------------------------------- evaluation alone
        untold = done == 0 and not distributed.primary_says(log.has(0))
        if evaluates_only and not untold:
            row = evaluate_row(run, state, done, greedy=True, samples="evaluation")
            report_evaluation(workdir, {"step": done} | row)
        elif untold:
            try:
                row = evaluate_row(run, state, 0, greedy=True, stop=stop)
                record(0, row)
                if evaluates_only:
                    report_evaluation(workdir, {"step": 0} | row)
            except StoppedError:
                say("stopped before the first evaluation was done; it is done again")
        # ---------------------------------------------------------- the loop
        while done < config.train.steps and not distributed.any_process(stop.requested):
            step, started = done + 1, time.monotonic()
            last = step == config.train.steps
            rows = prompts.order(
                position,
                config.train.prompts_per_step,
                size=len(data.train.records),
                seed=config.seed,
            )
            drawn = draw_batch(run, state, step, rows)
            rolled = time.monotonic()
            old = old_scores(run, state, drawn.trajectories)
            scores = scoring.gather(
                pool, drawn.ids, drawn.records, drawn.texts, build.scoring_options(config)
            )
            check_validity(config, scores, f"step {step}")
            rewarded = time.monotonic()
            advantages = advantage_of(config, scores)
            state, learned = update_policy(run, state, drawn.trajectories, old, advantages, step)
            updated = time.monotonic()
            row = scores.metrics() | drawn.text_metrics | advantages.metrics | learned
            if last or (config.eval.every and step % config.eval.every == 0):
                row |= evaluate_row(run, state, step, greedy=last)
            row |= {
                "time/rollout": rolled - started,
                "time/reward_wait": rewarded - rolled,
                "time/update": updated - rewarded,
                "time/eval": time.monotonic() - updated,
                "time/compilations": compiles.count,
            }
            # ------------------------------------------------------- log, save
            position, done = position + len(rows), step
            progress = {"step": done, "position": position} | run_folder.fingerprint(data)
            regular = last or (config.checkpoint.every and step % config.checkpoint.every == 0)
            if regular:
                row["state/digest"] = checkpoint.digest(run_folder.payload(state), progress)
            record(step, row)
            if regular:
                saves.save(done, run_folder.payload(state), progress)
        # ---------------------------------------------------------------- end
        if done < config.train.steps and saves.latest() != done:  # stopped
            progress = {"step": done, "position": position} | run_folder.fingerprint(data)
            saves.save(done, run_folder.payload(state), progress)
    saves.close()
    board.close()
    bar.close()
    if evaluates_only:
        return DONE if log.has(0) else STOPPED
    if done < config.train.steps:
        say(f"stopped after step {done}; the same command continues")
        return STOPPED
    run_folder.mark_finished(workdir, done)
    say(f"{workdir}: {done} steps are done")
    return DONE


class Run(NamedTuple):
    """What does not change during a run."""

    config: Config
    loaded: Loaded
    data: build.Data
    steps: build.Steps
    pool: Pool
    workdir: pathlib.Path


def draw_batch(run: Run, state: TrainState, step: int, rows: np.ndarray) -> Drawn:
    """Stage 2 and the start of stage 3: draws an update's trajectories, micro-batch by micro-batch.

    The images of one micro-batch go to the verifiers while the device draws the next.
    """
    config, group = run.config, run.config.train.group_size
    key, window_key = jax.random.split(jax.random.fold_in(state.key, step))
    lo, hi = config.rollout.window_range
    start = jax.random.randint(window_key, (), lo, hi - config.rollout.window + 1)
    count = config.rollout.micro_batch // group  # prompts
    temperature = jnp.float32(config.rollout.temperature)
    weights = run.steps.weights(run.loaded.base, state.trainable)
    launched = []
    for first in range(0, len(rows), count):
        part = rows[first : first + count]
        block = TextBlock(run.data.train.tokens[part], run.data.train.mask[part])
        given = run.steps.prefill(weights, (block,))
        number = jnp.int32(first * group)
        launched.append(run.steps.generate(weights, given, key, number, start, temperature))
    records = [run.data.train.records[row] for row in np.repeat(rows, group)]
    ids = [(step, number) for number in range(len(records))]
    for number, (_, images) in enumerate(launched):
        first = number * count * group
        own = slice(first, first + count * group)
        scoring.submit(run.pool, ids[own], distributed.to_host(images), records[own], first=first)
    parts = [trajectories for trajectories, _ in launched]
    whole = parts[0] if len(parts) == 1 else run.steps.join(parts)
    texts, text_metrics = None, {}
    if whole.texts:
        sample = distributed.to_host(whole.texts[0])
        texts = decode_texts(run.loaded.tokenizer, sample.tokens, sample.mask)
        text_metrics = {
            "text/length": float(sample.scored.sum(axis=1).mean()),
            "text/truncated_fraction": float(sample.truncated.mean()),
        }
    return Drawn(whole, records, ids, texts, text_metrics)


def decode_texts(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Texts of int32[B, T] tokens without their two delimiters."""
    return [tokenizer.decode(row[held][1:-1]) for row, held in zip(tokens, mask, strict=True)]


def old_scores(run: Run, state: TrainState, trajectories: Rollout) -> list[StepScores] | None:
    """The log-probs before the update, per micro-batch; None where the policy's own are used."""
    if run.config.train.old_logprob == "self":
        return None
    return [
        run.steps.forward(state.trainable, run.loaded.base, trajectories, part)[0]
        for part in _parts(run.config)
    ]


def advantage_of(config: Config, scores: scoring.Scores) -> Advantages:
    """Stage 4: advantages within each prompt's group."""
    shape = (config.train.prompts_per_step, config.train.group_size)
    return group_advantage(
        scores.total.reshape(shape),
        scores.valid.reshape(shape),
        std=config.advantage.std,
        baseline=config.advantage.baseline,
    )


def update_policy(
    run: Run,
    state: TrainState,
    trajectories: Rollout,
    old: list[StepScores] | None,
    advantages: Advantages,
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """Stages 5 and 6: the optimizer steps of one batch; the state as it was if nothing differs.

    Raises:
      TrainingError: a loss or gradient that is not finite, before it has changed anything; or
        nothing differs and what was drawn is not finite.
    """
    if advantages.all_zero:
        check_sampled(trajectories, step)
        return state, {"update/skipped": 1}
    steps, base, config = run.steps, run.loaded.base, run.config
    flat = (jnp.asarray(x.ravel()) for x in (advantages.advantage, advantages.used))
    batch = UpdateBatch(trajectories, *flat)
    reference: list[StepScores] | None = None
    if config.loss.text_beta > 0 or config.loss.image_beta > 0:
        reference = [steps.reference(base, trajectories, part) for part in _parts(config)]
    entropy = None
    if config.loss.entropy_fraction < 1 and trajectories.texts:
        entropy = steps.entropy(old)
    totals = steps.count(batch, entropy)
    learned: dict[str, float] = {}
    for _ in range(config.train.updates_per_batch):
        summed = None
        for index, part in enumerate(_parts(config)):
            new, pullback = steps.forward(state.trainable, base, trajectories, part)
            before = old[index] if old else None
            ref = reference[index] if reference else None
            own = steps.backward(pullback, new, before, ref, batch, part, totals)
            summed = own if summed is None else steps.accumulate(summed, own)
        state, metrics = steps.apply(state, *summed)
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not values.pop("update/finite"):
            raise TrainingError(
                f"step {step}: the loss ({values['loss/total']}) or its gradient (norm "
                f"{values['update/grad_norm']}) is not finite; the update was not applied and the "
                "last checkpoint is untouched. Lower optimizer.learning_rate, or look for broken "
                "weights or rewards"
            )
        first = {name: learned[name] for name in FIRST_ONLY & learned.keys()}
        learned = values | first
    return state, learned | {"update/skipped": 0, "update/old_is_self": int(old is None)}


def _parts(config: Config) -> list[jax.Array]:
    """The numbers of an update's micro-batches, int32[] each."""
    return [jnp.int32(part) for part in range(config.trajectories // config.train.micro_batch)]


def evaluate_row(
    run: Run,
    state: TrainState,
    step: int,
    *,
    greedy: bool,
    samples: str | None = None,
    stop: StopFlag | None = None,
) -> dict[str, float]:
    """Evaluates on the held-out prompts, writes the sample grid, returns the metrics.

    Args:
      run: the run.
      state: the policy's.
      step: updates done.
      greedy: evaluate a second time with the likeliest think texts ("eval_greedy").
      samples: name of the sample grid, default that of the step.
      stop: where given, a stop that is asked for ends the evaluation.
    Raises:
      StoppedError: see `stop`.
      TrainingError: the verifiers failed too often.
    """
    config = run.config
    found = evaluate_policy(
        run, state, temperature=config.eval.temperature, prefix="eval", stop=stop
    )
    check_validity(config, found.scores, f"evaluation at step {step}")
    row = dict(found.metrics)
    if greedy:
        likeliest = evaluate_policy(run, state, temperature=0.0, prefix="eval_greedy", stop=stop)
        check_validity(config, likeliest.scores, f"greedy evaluation at step {step}")
        row |= likeliest.metrics
    if distributed.is_primary():
        count, name = config.log.samples, samples or f"step_{step:06d}"
        metrics_lib.write_samples(
            run.workdir / "samples", name, found.images[:count], found.captions[:count]
        )
    return row


def evaluate_policy(
    run: Run, state: TrainState, *, temperature: float, prefix: str, stop: StopFlag | None = None
) -> Evaluation:
    """Evaluates on the held-out prompts, with the same keys every time."""
    config, heldout = run.config, run.data.heldout
    key = jax.random.key(config.eval.seed)

    weights = run.steps.weights(run.loaded.base, state.trainable)
    no_window = jnp.int32(config.eval.num_points)

    def draw(tokens: np.ndarray, mask: np.ndarray, first: int) -> tuple[np.ndarray, list[str]]:
        if stop is not None and distributed.any_process(stop.requested):
            raise StoppedError
        given = run.steps.eval_prefill(weights, (TextBlock(tokens, mask),))
        drawn, images = run.steps.eval_generate(
            weights, given, key, jnp.int32(first), no_window, jnp.float32(temperature)
        )
        images, texts = distributed.to_host((images, drawn.texts))
        if not texts:
            return images, []
        return images, decode_texts(run.loaded.tokenizer, texts[0].tokens, texts[0].mask)

    return evaluate(
        draw,
        run.pool,
        heldout,
        prompts.balanced(heldout.records, config.eval.prompts),
        micro_batch=config.eval.micro_batch,
        scoring_options=build.scoring_options(config),
        check=CHECKERS[config.eval.checker],
        prefix=prefix,
    )


def report_evaluation(workdir: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Writes and prints what an evaluation alone found; the log of the run stays as it is."""
    text = json.dumps(row, indent=2, sort_keys=True)
    if distributed.is_primary():
        metrics_lib.replace_text(workdir / EVALUATION_FILE, text + "\n")
        print(text)


def command(argv: Sequence[str]) -> None:
    """The command: configuration, folder, exit code."""
    if len(argv) > 1:
        fail(WRONG_USAGE, f"unexpected arguments {argv[1:]}; see --help")
    if _CONFIG.value is None:
        fail(WRONG_USAGE, "no --config given; the default is --config=configs/grpo.py")
    logging.set_verbosity(logging.WARNING)  # libraries; our own notices go to stderr
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{name}"
    if "://" in workdir:
        fail(WRONG_USAGE, f"--workdir={workdir}: expected a folder; mount the bucket and name that")
    try:
        config = config_lib.from_config_dict(_CONFIG.value)
        distributed.initialize()
        sys.exit(main(config, pathlib.Path(workdir)))
    except ConfigError as error:
        fail(WRONG_USAGE, str(error))
    except KeyboardInterrupt:
        fail(FAILED, "interrupted twice; the last checkpoint is untouched")
    except EXPLAINED as error:
        fail(FAILED, str(error))
    except OSError as error:
        fail(
            FAILED,
            f"{error}; the run's folder {workdir} or another file cannot be read or written: look "
            "for a full disk, then run the same command again: it continues from the last "
            "checkpoint",
        )
    except Exception as error:
        traceback.print_exc()
        fail(FAILED, f"unexpected {type(error).__name__}: {error}")


def say(message: str) -> None:
    """A notice for whoever watches the run."""
    print(message, file=sys.stderr, flush=True)


def fail(code: int, message: str) -> None:
    """Ends the process with one message on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flag parser, with exit code 2 for unknown flags and fields."""
    try:
        return flags.FLAGS(list(argv))
    except (
        flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError,
        ImportError,
    ) as error:  # fmt: skip
        return fail(WRONG_USAGE, f"{error}; see --help, and configs/grpo.py for the fields")


if __name__ == "__main__":
    app.run(command, flags_parser=parse_flags)
