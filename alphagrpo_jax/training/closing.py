"""Writes the words at the end of a run: before and after, where everything is, what to do next."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from alphagrpo_jax.config import Config
from alphagrpo_jax.prompts import TaskData
from alphagrpo_jax.runtime.console import seconds_words
from alphagrpo_jax.runtime.metrics import REPORT, SAMPLES, sample_label
from alphagrpo_jax.runtime.results import changes
from alphagrpo_jax.tasks import TASKS, Task

TRAINING_FIELDS = {
    "prompts": "data.train",
    "edits": "data.edit_train",
    "answers": "data.answer_train",
}  # by `tasks.Task.data`


def closing_words(
    config: Config,
    workdir: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    data: Mapping[str, TaskData],
    seconds: float,
) -> str:
    """Returns the block of lines that ends a finished run.

    Args:
      config: the run's.
      workdir: the run's folder.
      rows: of metrics.jsonl.
      data: prompts by task; a held-out one becomes the example of the next command.
      seconds: since the process began.
    """
    folder = shlex.quote(str(workdir))
    lines = [*result_lines(rows), f"  time       {seconds_words(seconds)} in this start"]
    if (workdir / REPORT).exists():
        labels = [sample_label(row["step"]) for row in rows if "eval/reward/mean" in row]
        lines += [
            f"  report     {workdir / REPORT}: curves, then samples with all answers",
            f"  samples    {workdir / SAMPLES}: {labels[0]} to {labels[-1]}",
        ]
    lines.append(f"  numbers    {workdir / 'metrics.jsonl'}")
    if config.log.tensorboard:
        lines.append(f"  curves     pip install tensorboard && tensorboard --logdir {folder}")
    name = config.tasks[0]
    task, heldout = TASKS[name], data[name].heldout
    lines += [
        "  try next   the trained model on a prompt:",
        f"               {generate_command(task, folder, heldout.records[0].prompt)}",
        *_data_lines(config, task),
    ]
    return "\n".join(lines)


def result_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of the held-out results before and after; none before two evaluations."""
    compared = changes(rows)
    if not compared:
        return []
    names = ["  " * bool(change.group) + (change.group or change.name) for change in compared]
    width = max(len("held-out"), *map(len, names))
    lines = [f"  {'held-out':{width}}  before     after"]
    for name, change in zip(names, compared, strict=True):
        lines.append(f"  {name:{width}}  {change.before:6.3f} -> {change.after:6.3f}")
    return lines


def generate_command(task: Task, folder: str, prompt: str) -> str:
    """Returns a command that tries a run's newest checkpoint at its task.

    Args:
      task: of the run.
      folder: of the run, quoted for a shell.
      prompt: an example.
    """
    words, start = shlex.quote(prompt), f"python -m alphagrpo_jax.generate --checkpoint {folder}"
    if task.data == "edits":
        return f"{start} --image IMAGE --edit {words} --out edited.png"
    if task.data == "answers":
        return f"{start} --image IMAGE --ask {words}"
    how = "--refine 2" if task.refines else "--think" if task.text_kinds else "--n 4"
    return f"{start} --prompt {words} {how} --out drawing.png"


def _data_lines(config: Config, task: Task) -> list[str]:
    """Returns how to train on one's own prompts."""
    field = TRAINING_FIELDS[task.data]
    train = f"the same command with --config.{field}=mine.jsonl --workdir=runs/mine"
    if task.data != "prompts":
        return [
            f"             your own {task.data}, as records in mine.jsonl:",
            f"               {train}",
        ]
    in_shapes_world = config.eval.checker == "shapes"
    model = "shapes" if in_shapes_world else "openai:http://HOST:PORT/v1 --model NAME"
    decompose = "python -m alphagrpo_jax.decompose --input prompts.txt --output mine.jsonl"
    return [
        "             your own prompts, one a line in prompts.txt:",
        f"               {decompose} --llm {model}",
        f"               {train}",
    ]
