"""Evaluates a run's policy on held-out prompts, task by task, with fixed keys."""

import enum
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from alphagrpo_jax import prompts
from alphagrpo_jax.config import Config
from alphagrpo_jax.evaluation.checkers import CHECKERS, check_records, check_scored
from alphagrpo_jax.evaluation.metrics import (
    Evaluation,
    Sampled,
    SampleFn,
    evaluate_answers,
    evaluate_images,
    refinement_metrics,
)
from alphagrpo_jax.evaluation.samples import write_samples
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.prompts import image_block
from alphagrpo_jax.rollout import decode_steps
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import MetricsLog, sample_label
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.tasks import TASKS, Task, think_texts
from alphagrpo_jax.training.checks import check_validity
from alphagrpo_jax.training.context import Run
from alphagrpo_jax.training.sampling import collect_images, run_steps
from alphagrpo_jax.training.steps import SampleFns
from alphagrpo_jax.types import ImageBlock, TextBlock

EVALUATION_FILE = "evaluation.json"
# By `tasks.Task.data`.
HELDOUT_FIELDS = {
    "prompts": "data.heldout",
    "edits": "data.edit_heldout",
    "answers": "data.answer_heldout",
}
# Rows of the evaluation set, int64[N] -> the task's inputs for them.
InputsFn = Callable[[np.ndarray], tuple[TextBlock | ImageBlock, ...]]


def check_heldout(config: Config, data: Mapping[str, prompts.TaskData]) -> None:
    """Tries exact checker and scorers' needs on all records before anything is sampled.

    Raises:
      ValueError: see `checkers.check_records`.
    """
    size = (config.model.height, config.model.width)
    for task_data in data.values():
        task = task_data.heldout.task
        if task.reward == "image":
            _, path = config.data.pair(task.data)
            source = f"{HELDOUT_FIELDS[task.data]}={path}"
            check_records(task_data.heldout, CHECKERS[config.eval.checker], size, source=source)
            for prompt_set, name in (
                (task_data.train, "training"),
                (task_data.heldout, "held-out"),
            ):
                label = f"the {name} records of task {task.name}"
                check_scored(prompt_set, config.reward, size, source=label)


class Pending(enum.Enum):
    """The evaluation that is due before the first update of this process."""

    NONE = "the last row has its evaluation"
    UNTRAINED = "row 0, the untrained policy's, is missing"
    LAST_ROW = "the last row's evaluation failed and is done again"
    REPORT = "train.steps is 0: evaluate the newest checkpoint and leave the log as it is"


def pending(config: Config, log: MetricsLog, step: int) -> Pending:
    """Finds out which evaluation is due before the first update.

    Args:
      config: the run's.
      log: the rows written so far, whole on the primary process only.
      step: updates done.
    """
    if step == 0 and not distributed.primary_says(log.has(0)):
        return Pending.UNTRAINED
    if config.train.steps == 0:
        return Pending.REPORT
    return Pending.LAST_ROW if distributed.primary_says(log.is_pending(step)) else Pending.NONE


def evaluate(
    run: Run,
    params: PolicyParams,
    step: int,
    *,
    greedy: bool,
    label: str | None = None,
    update_row: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Evaluates all tasks on their held-out prompts, writes sample grids, returns the metrics.

    In mixed runs "eval/..." are means over the tasks, "TASK/eval/..." those of each.

    Args:
      run: the run.
      params: the weights to sample with.
      step: updates done.
      greedy: evaluate a second time with the likeliest think texts ("eval_greedy").
      label: of the sample grid's files, default that of the step.
      update_row: metrics of the update before it, for the curves of the report.
    Raises:
      StoppedError: a stop is overdue.
      TrainingError: the verifiers failed too often.
    """
    config = run.config
    temperatures = {"eval": config.eval.temperature} | ({"eval_greedy": 0.0} if greedy else {})
    lasting = step == 0 or config.train.steps == 0
    initial = {}
    for name, context in run.tasks.items():
        if context.task.refines:
            with run.console.phase(f"sampling what {name} refines", lasting=lasting):
                initial[name] = evaluate_initial_images(run, params, name)
    row: dict[str, float] = {}
    sampled: dict[str, Evaluation] = {}
    for prefix, temperature in temperatures.items():
        evaluations = {}
        for name in config.tasks:
            with run.console.phase(_phase_name(config, name, prefix, step), lasting=lasting):
                evaluations[name] = evaluate_task(
                    run,
                    params,
                    name,
                    temperature=temperature,
                    prefix=prefix,
                    initial=initial.get(name),
                )
            kind = "evaluation" if prefix == "eval" else "greedy evaluation"
            where = f"{kind} of {name} at step {step}"
            check_validity(config, evaluations[name].rewards, evaluations[name].records, where)
        metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
        if prefix == "eval":
            sampled = evaluations
            metrics |= {name: metrics[name] | initial[name].metrics for name in initial}
        if config.task == "mixed":
            row |= {
                f"{name}/{key}": value
                for name, task_metrics in metrics.items()
                for key, value in task_metrics.items()
            }
        row |= _means(list(metrics.values()))
    if distributed.is_primary():
        known_row = {**(update_row or {}), **row}
        write_samples(run, sampled, step, label or sample_label(step), known_row)
    return row


def evaluate_task(
    run: Run,
    params: PolicyParams,
    name: str,
    *,
    temperature: float,
    prefix: str,
    initial: Evaluation | None = None,
) -> Evaluation:
    """Evaluates one task on its held-out prompts, with the same keys every time.

    Args:
      run, params, name: the run, the weights to sample with, and the task.
      temperature: of texts.
      prefix: of the metrics' names.
      initial: what a refining task repairs, whatever its reward; from `evaluate_initial_images`.
    Raises:
      StoppedError: see `evaluate`.
    """
    config, context = run.config, run.tasks[name]
    task, heldout = context.task, context.data.heldout
    rows, records = _evaluation_set(run, name)
    input_images = None
    if initial is not None:
        input_images = initial.images
    elif task.image == "record":
        input_images = heldout.images(rows, run.image_size)

    def inputs(batch: np.ndarray) -> tuple[TextBlock | ImageBlock, ...]:
        images = None if input_images is None else image_block(run.loaded, input_images[batch])
        return heldout.inputs(rows[batch], images)

    key = jax.random.key(config.eval.seed)
    sample = _sample_fn(
        run, params, context.fns.eval, key, inputs, task, temperature, total=len(rows)
    )
    if task.reward == "answer":
        return evaluate_answers(sample, records, micro_batch=config.eval.micro_batch, prefix=prefix)
    check = CHECKERS[config.eval.checker]
    evaluation = evaluate_images(
        sample,
        run.verifier,
        records,
        micro_batch=config.eval.micro_batch,
        scoring_options=context.scoring,
        check=check,
        prefix=prefix,
        second=run.second_verifier,
    )
    if initial is None:
        return evaluation
    assert input_images is not None  # a refining task starts from images
    assert evaluation.images is not None
    refined = refinement_metrics(records, input_images, evaluation.images, check)
    named = {f"{prefix}/{key}": value for key, value in refined.items()}
    return evaluation._replace(metrics=evaluation.metrics | named)


def evaluate_initial_images(run: Run, params: PolicyParams, name: str) -> Evaluation:
    """Scores and checks the images that a refining task starts from, as `eval/initial/...`.

    One per held-out prompt: sampled without thinking, or the records' own; no text takes part, so
    that they are the same for every temperature.

    Raises:
      StoppedError: see `evaluate`.
      TrainingError: the verifiers failed too often.
    """
    config = run.config
    rows, records = _evaluation_set(run, name)
    if config.srr.source == "record":
        images = run.tasks[name].data.heldout.images(rows, run.image_size)

        def read_images(batch: np.ndarray, first: int) -> Sampled:
            del first
            return Sampled(images[batch], (), [])

        sample: SampleFn = read_images
    else:
        key = jax.random.fold_in(jax.random.key(config.eval.seed), 1)
        inputs = _prompt_inputs(run, records)
        fns, plain, count = run.initial.eval_fns, TASKS["t2i"], len(rows)
        assert fns is not None  # made at the start of a run with a refining task
        sample = _sample_fn(run, params, fns, key, inputs, plain, 0.0, total=count)
    evaluation = evaluate_images(
        sample,
        run.verifier,
        records,
        micro_batch=config.eval.micro_batch,
        scoring_options=run.initial.scoring,
        check=CHECKERS[config.eval.checker],
        prefix="eval/initial",
    )
    check_validity(config, evaluation.rewards, records, f"initial images of {name}")
    return evaluation


def is_due(config: Config, every: int, step: int) -> bool:
    """Returns True at multiples of `every` (0: never there) and at the run's last step."""
    return step == config.train.steps or (every > 0 and step % every == 0)


def write_report(workdir: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Writes and prints an evaluation that is no part of the log (`train.steps` 0)."""
    text = json.dumps(row, indent=2, sort_keys=True)
    if distributed.is_primary():
        replace_text(workdir / EVALUATION_FILE, text + "\n")
        print(text)


def _sample_fn(
    run: Run,
    params: PolicyParams,
    fns: SampleFns,
    key: jax.Array,
    inputs: InputsFn,
    task: Task,
    temperature: float,
    *,
    total: int,
) -> SampleFn:
    """Returns the function that samples a task's steps for a batch of `total` evaluation rows."""

    def sample(batch: np.ndarray, first: int) -> Sampled:
        distributed.check_stop(run.stop)
        run.console.count(first, total)
        images: list[tuple[np.ndarray, np.ndarray]] = []
        trajectories = run_steps(
            fns,
            params,
            inputs(batch),
            key,
            # A window that starts at the end of the schedule: no step is stochastic.
            start=run.config.eval.num_points,
            temperature=temperature,
            first=first,
            stop=run.stop,
            buckets=run.config.rollout.length_buckets,
            on_images=lambda rows, pixels: images.append((rows, pixels)),
        )
        texts = decode_steps(run.loaded.tokenizer, trajectories)
        answers = texts[-1] if task.reward == "answer" else []
        run.console.count(min(first + len(batch), total), total)
        sampled_images = collect_images(images) if images else None
        return Sampled(sampled_images, think_texts(task, texts), answers)

    return sample


def _phase_name(config: Config, task: str, prefix: str, step: int) -> str:
    """Returns the words for an evaluation while it runs."""
    policy = f"step {step}" if step else "the untrained policy"
    where = f" on {task}" if config.task == "mixed" else ""
    texts = ", likeliest think texts" if prefix == "eval_greedy" else ""
    return f"evaluating {policy}{where}{texts}"


def _evaluation_set(run: Run, name: str) -> tuple[np.ndarray, list[Record]]:
    """Returns which held-out prompts of a task are evaluated, int64[N], and their records."""
    heldout = run.tasks[name].data.heldout
    rows = np.array(prompts.balanced(heldout.records, run.config.eval.prompts))
    return rows, [heldout.records[row] for row in rows]


def _prompt_inputs(run: Run, records: Sequence[Record]) -> InputsFn:
    """Returns the inputs of task t2i: the records' prompts alone."""
    tokens, mask = prompts.tokenize(
        [record.prompt for record in records],
        run.loaded.tokenizer,
        bucket=run.config.rollout.prompt_tokens,
    )
    return lambda batch: (TextBlock.from_host(tokens[batch], mask[batch]),)


def _means(task_metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages each metric over the tasks that have it."""
    if len(task_metrics) == 1:
        return dict(task_metrics[0])
    keys = dict.fromkeys(key for metrics in task_metrics for key in metrics)
    return {
        key: float(np.nanmean([metrics[key] for metrics in task_metrics if key in metrics]))
        for key in keys
    }
