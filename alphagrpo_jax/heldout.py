"""Evaluation of a run's policy on held-out prompts, task by task, with fixed keys."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import build, jitted, prompts, tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.evaluation import (
    CHECKERS,
    Evaluation,
    check_records,
    evaluate_answers,
    evaluate_images,
    refinement_metrics,
)  # fmt: skip
from alphagrpo_jax.guards import check_validity
from alphagrpo_jax.rewards import report
from alphagrpo_jax.rewards.questions import Record
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime import metrics as metrics_lib
from alphagrpo_jax.runtime.stopping import StopFlag, StoppedError
from alphagrpo_jax.trainer import Run, decode_steps, image_block
from alphagrpo_jax.types import TextBlock, TrainState

REPORT_FILE = "report.html"  # of the newest evaluation


def check_heldout(config: Config, data: Mapping[str, build.Data]) -> None:
    """Tries the exact checker on all held-out records before anything is drawn.

    Raises:
      ValueError: see `evaluation.check_records`.
    """
    size = (config.model.height, config.model.width)
    for both in data.values():
        if both.heldout.task.reward == "image":
            check_records(both.heldout, CHECKERS[config.eval.checker], size)


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
    for prefix, temperature in ways.items():
        for name in config.tasks:
            own = evaluate_task(run, state, name, temperature=temperature, prefix=prefix, stop=stop)
            kind = "evaluation" if prefix == "eval" else "greedy evaluation"
            check_validity(config, own.scores, f"{kind} of {name} at step {step}")
            found[prefix, name] = own
    row = {}
    for prefix in ways:
        metrics = {name: found[prefix, name].metrics for name in config.tasks}
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


def write_samples(run: Run, drawn: Mapping[str, Evaluation], step: int, label: str) -> None:
    """Writes the sample grids, a report on each, and all of them as the run's newest report.

    Args:
      run: the run.
      drawn: evaluations with images, by task.
      step: updates done.
      label: of the files.
    """
    folder, several = run.workdir / "samples", run.config.task == "mixed"
    pages = {}
    for name, own in drawn.items():
        file = f"{label}_{name}" if several else label
        kept = own.captions[: run.config.log.samples]
        metrics_lib.write_samples(folder, file, own.images[: len(kept)], kept)
        pages[name] = _sample_report(run, name, own, step)
        metrics_lib.replace_text(folder / f"{file}.html", report.to_html(pages[name]))
    if pages:
        first, *_ = pages.values()
        rows = [row for page in pages.values() for row in page.rows]
        whole = report.Report(f"{run.config.task}, step {step}", first.how, tuple(rows))
        metrics_lib.replace_text(run.workdir / REPORT_FILE, report.to_html(whole))


def _sample_report(run: Run, name: str, own: Evaluation, step: int) -> report.Report:
    """The images of a sample grid, explained by the answers that made their rewards."""
    kept = own.captions[: run.config.log.samples]
    options = build.scoring_options(run.config, tasks.TASKS[name])
    rows = report.rows(
        [f"{name} {number}" for number in range(len(kept))],
        [images_lib.data_url(image) for image in own.images[: len(kept)]],
        own.records,
        own.scores,
        options,
        thinks=[caption["think"] for caption in kept],
        exact=[caption["exact"] for caption in kept],
    )
    return report.Report(f"{name}, step {step}", report.describe(options), tuple(rows))


def evaluate_task(
    run: Run,
    state: TrainState,
    name: str,
    *,
    temperature: float,
    prefix: str,
    stop: StopFlag | None = None,
) -> Evaluation:
    """Evaluates one task on its held-out prompts, with the same keys every time.

    Task srr first draws an image per prompt without thinking (or takes the records' own), then
    repairs it whatever its reward; `initial/...` are the metrics of the first images.
    """
    config, task = run.config, tasks.TASKS[name]
    heldout = run.data[name].heldout
    rows = prompts.balanced(heldout.records, config.eval.prompts)
    records = [heldout.records[row] for row in rows]
    weights = run.weights(state)
    root = jax.random.key(config.eval.seed)

    def drawer(drawing: jitted.Drawing, key: jax.Array, inputs):
        def draw(part: np.ndarray, first: int) -> tuple[np.ndarray | None, list[list[str]]]:
            if stop is not None and distributed.any_process(stop.requested):
                raise StoppedError
            given = drawing.prefill(weights, inputs(part))
            scalars = (jnp.int32(first), jnp.int32(config.eval.num_points))
            drawn, images = drawing.generate(
                weights, given, key, *scalars, jnp.float32(temperature)
            )
            return distributed.to_host(images), decode_steps(run.loaded.tokenizer, drawn)

        return draw

    steps, size = run.steps.tasks[name], config.eval.micro_batch
    scoring_options = build.scoring_options(config, task)
    if task.reward == "answer":

        def asked(part: np.ndarray) -> tuple:
            images = heldout.images(np.array(rows)[part], run.size)
            return heldout.inputs(np.array(rows)[part], image_block(run.loaded, images))

        return evaluate_answers(
            drawer(steps.eval, root, asked), records, micro_batch=size, prefix=prefix
        )
    common = {"micro_batch": size, "check": CHECKERS[config.eval.checker]}
    initial = first_images = None
    if task.image == "record" or (task.refines and config.srr.source == "record"):
        first_images = heldout.images(rows, run.size)
    elif task.image == "drawn":
        plain = _plain_inputs(run, records)
        initial = evaluate_images(
            drawer(run.steps.eval_initial, jax.random.fold_in(root, 1), plain),
            run.pool,
            records,
            scoring_options=build.scoring_options(config, tasks.TASKS["t2i"]),
            prefix=f"{prefix}/initial",
            **common,
        )
        first_images = initial.images

    def shown(part: np.ndarray) -> tuple:
        images = None if first_images is None else image_block(run.loaded, first_images[part])
        return heldout.inputs(np.array(rows)[part], images)

    found = evaluate_images(
        drawer(steps.eval, root, shown),
        run.pool,
        records,
        scoring_options=scoring_options,
        prefix=prefix,
        second=run.second,
        **common,
    )
    if not task.refines:
        return found
    checked = (records, first_images, found.images, common["check"])
    own = refinement_metrics(*checked) | ({} if initial is None else initial.metrics)
    own = {key if key.startswith(prefix) else f"{prefix}/{key}": x for key, x in own.items()}
    return found._replace(metrics=found.metrics | own)


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
