"""Evaluation of a run's policy on held-out prompts, task by task, with fixed keys."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import prompts, tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.evaluation.checkers import CHECKERS, check_records
from alphagrpo_jax.evaluation.metrics import (
    Evaluation,
    Sampled,
    evaluate_answers,
    evaluate_images,
    refinement_metrics,
)
from alphagrpo_jax.evaluation.samples import write_samples
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.prompts import image_block
from alphagrpo_jax.rollout import decode_steps
from alphagrpo_jax.runtime import checkpoint, distributed
from alphagrpo_jax.runtime import metrics as metrics_lib
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import notify
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.runtime.stopping import StopFlag, StoppedError
from alphagrpo_jax.tasks import think_texts
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import run_folder
from alphagrpo_jax.training import steps as steps_lib
from alphagrpo_jax.training.checks import check_validity
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.types import DataPosition, ImageBlock, TextBlock, TrainState

# By `tasks.Task.data`.
HELDOUT_FIELDS = {
    "prompts": "data.heldout",
    "edits": "data.edit_heldout",
    "answers": "data.answer_heldout",
}


def check_heldout(config: Config, data: Mapping[str, prompts.TaskData]) -> None:
    """Tries the exact checker on all held-out records before anything is drawn.

    Raises:
      ValueError: see `evaluation.check_records`.
    """
    size = (config.model.height, config.model.width)
    for both in data.values():
        task = both.heldout.task
        if task.reward == "image":
            _, path = config.data.pair(task.data)
            source = f"{HELDOUT_FIELDS[task.data]}={path}"
            check_records(both.heldout, CHECKERS[config.eval.checker], size, source=source)


def evaluate_row(
    run: Run,
    state: TrainState,
    step: int,
    *,
    greedy: bool,
    samples: str | None = None,
    stop: StopFlag | None = None,
) -> dict[str, float]:
    """Evaluates all tasks on their held-out prompts, writes sample grids, returns the metrics.

    In mixed runs "eval/..." are means over the tasks, "TASK/eval/..." those of each.

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
    config, found = run.config, {}
    ways = {"eval": config.eval.temperature} | ({"eval_greedy": 0.0} if greedy else {})
    first = {
        name: initial_images(run, state, name, stop=stop)
        for name in config.tasks
        if tasks.TASKS[name].refines
    }
    for prefix, temperature in ways.items():
        for name in config.tasks:
            own = evaluate_task(
                run,
                state,
                name,
                temperature=temperature,
                prefix=prefix,
                initial=first.get(name),
                stop=stop,
            )
            kind = "evaluation" if prefix == "eval" else "greedy evaluation"
            check_validity(config, own.scores, f"{kind} of {name} at step {step}")
            found[prefix, name] = own
    row = {}
    for prefix in ways:
        metrics = {name: found[prefix, name].metrics for name in config.tasks}
        if prefix == "eval":
            metrics |= {name: metrics[name] | own.metrics for name, own in first.items()}
        if config.task == "mixed":
            row |= {
                f"{name}/{key}": value
                for name, own in metrics.items()
                for key, value in own.items()
            }
        row |= _means(list(metrics.values()))
    if distributed.is_primary():
        drawn = {name: found["eval", name] for name in config.tasks}
        pictures = {name: own for name, own in drawn.items() if own.images is not None}
        write_samples(run, pictures, step, samples or f"step_{step:06d}")
    return row


def evaluate_task(
    run: Run,
    state: TrainState,
    name: str,
    *,
    temperature: float,
    prefix: str,
    initial: Evaluation | None = None,
    stop: StopFlag | None = None,
) -> Evaluation:
    """Evaluates one task on its held-out prompts, with the same keys every time.

    Args:
      run, state, name: the policy and the task.
      temperature: of texts.
      prefix: of the metrics' names.
      initial: what a refining task repairs, whatever its reward; from `initial_images`.
      stop: see `evaluate_row`.
    Raises:
      StoppedError: see `evaluate_row`.
    """
    config, task = run.config, tasks.TASKS[name]
    heldout, steps = run.data[name].heldout, run.steps.tasks[name]
    rows, records = _chosen(run, name)
    draw = _Sampler(run, run.weights(state), temperature, stop)
    root, size = jax.random.key(config.eval.seed), config.eval.micro_batch
    first_images = None
    if initial is not None:
        first_images = initial.images
    elif task.image == "record":
        first_images = heldout.images(rows, run.size)

    def inputs(part: np.ndarray) -> tuple[TextBlock | ImageBlock, ...]:
        images = None if first_images is None else image_block(run.loaded, first_images[part])
        return heldout.inputs(rows[part], images)

    own = functools.partial(draw.draw, steps.eval, root, inputs, task)
    if task.reward == "answer":
        return evaluate_answers(own, records, micro_batch=size, prefix=prefix)
    found = evaluate_images(
        own,
        run.pool,
        records,
        micro_batch=size,
        scoring_options=options_lib.scoring_options(config, task),
        check=CHECKERS[config.eval.checker],
        prefix=prefix,
        second=run.second,
    )
    if initial is None:
        return found
    checked = (records, first_images, found.images, CHECKERS[config.eval.checker])
    refined = {f"{prefix}/{key}": x for key, x in refinement_metrics(*checked).items()}
    return found._replace(metrics=found.metrics | refined)


class _Sampler(NamedTuple):
    """Draws micro-batches of an evaluation."""

    run: Run
    weights: PolicyParams
    temperature: float
    stop: StopFlag | None

    def draw(
        self,
        drawing: steps_lib.SampleFns,
        key: jax.Array,
        inputs: Callable[[np.ndarray], tuple],
        task: tasks.Task,
        part: np.ndarray,
        first: int,
    ) -> Sampled:
        """A task's steps for the prompts `part`, int64[N]; see `evaluation.Draw`."""
        if self.stop is not None and distributed.any_process(self.stop.requested):
            raise StoppedError
        given = drawing.prefill(self.weights, inputs(part))
        scalars = (jnp.int32(first), jnp.int32(self.run.config.eval.num_points))
        drawn, images = drawing.generate(
            self.weights, given, key, *scalars, jnp.float32(self.temperature)
        )
        texts = decode_steps(self.run.loaded.tokenizer, drawn)
        answers = texts[-1] if task.reward == "answer" else []
        return Sampled(distributed.to_host(images), think_texts(task, texts), answers)


def initial_images(
    run: Run, state: TrainState, name: str, *, stop: StopFlag | None = None
) -> Evaluation:
    """The images that a refining task starts from, scored and checked as `eval/initial/...`.

    One per held-out prompt: drawn without thinking, or the records' own; no text takes part, so
    that they are the same for every temperature.

    Raises:
      StoppedError: see `evaluate_row`.
      TrainingError: the verifiers failed too often.
    """
    config, plain = run.config, tasks.TASKS["t2i"]
    rows, records = _chosen(run, name)
    weights = run.weights(state)  # a policy that judges itself needs them in any case
    if config.srr.source == "record":
        images = run.data[name].heldout.images(rows, run.size)

        def make(part: np.ndarray, first: int) -> Sampled:
            del first
            return Sampled(images[part], (), [])

    else:
        key = jax.random.fold_in(jax.random.key(config.eval.seed), 1)
        draw = _Sampler(run, weights, 0.0, stop)
        inputs = _plain_inputs(run, records)
        make = functools.partial(draw.draw, run.steps.eval_initial, key, inputs, plain)
    initial = evaluate_images(
        make,
        run.pool,
        records,
        micro_batch=config.eval.micro_batch,
        scoring_options=options_lib.scoring_options(config, plain),
        check=CHECKERS[config.eval.checker],
        prefix="eval/initial",
    )
    check_validity(config, initial.scores, f"initial images of {name}")
    return initial


def _chosen(run: Run, name: str) -> tuple[np.ndarray, list[Record]]:
    """Which held-out prompts of a task are evaluated, int64[N], and their records."""
    heldout = run.data[name].heldout
    rows = np.array(prompts.balanced(heldout.records, run.config.eval.prompts))
    return rows, [heldout.records[row] for row in rows]


def _plain_inputs(run: Run, records: Sequence[Record]):
    """The records' prompts alone, as task t2i gets them."""
    tokens, mask = prompts.tokenise(
        [record.prompt for record in records],
        run.loaded.tokenizer,
        bucket=run.config.rollout.prompt_tokens,
    )
    return lambda part: (TextBlock(tokens[part], mask[part]),)


def _means(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the tasks that have a metric."""
    if len(each) == 1:
        return dict(each[0])
    keys = dict.fromkeys(key for own in each for key in own)
    return {key: float(np.nanmean([own[key] for own in each if key in own])) for key in keys}


EVALUATION_FILE = "evaluation.json"


def evaluate_first(
    run: Run,
    state: TrainState,
    done: int,
    place: DataPosition,
    log: metrics_lib.MetricsLog,
    record: Callable[[int, Mapping[str, Any]], None],
    stop: StopFlag,
) -> bool:
    """What comes before the loop: an evaluation alone, or the one that the last row still owes.

    Returns:
      False if a stop was asked for before it was done.
    """
    config, alone = run.config, run.config.train.steps == 0
    untold = done == 0 and not distributed.primary_says(log.has(0))
    if alone and not untold:
        row = evaluate_row(run, state, done, greedy=True, samples="evaluation")
        report_evaluation(run.workdir, {"step": done} | row)
        return True
    if not untold and not distributed.primary_says(log.owes(done)):
        return True
    try:
        row = evaluate_row(run, state, done, greedy=done in (0, config.train.steps), stop=stop)
    except StoppedError:
        notify(f"stopped before the evaluation of step {done} was done; it is done again")
        return False
    if done and is_regular(config, config.checkpoint.every, done):
        row["state/digest"] = checkpoint.digest(*run_folder.content(state, done, place, run.data))
    record(done, row)
    if alone:
        report_evaluation(run.workdir, {"step": 0} | row)
    return True


def is_regular(config: Config, every: int, step: int) -> bool:
    """Whether something that is done `every` so many steps (0: at the end alone) is due."""
    return step == config.train.steps or (every > 0 and step % every == 0)


def report_evaluation(workdir: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Writes and prints what an evaluation alone found; the log of the run stays as it is."""
    text = json.dumps(row, indent=2, sort_keys=True)
    if distributed.is_primary():
        replace_text(workdir / EVALUATION_FILE, text + "\n")
        print(text)
