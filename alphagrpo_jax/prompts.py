"""Stage 1: reads records as a TFDS dataset, tokenizes a task's inputs, and orders the prompts."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from alphagrpo_jax import tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import control_tokens
from alphagrpo_jax.runtime import host_random
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.errors import InputError, MissingFileError, UserError
from alphagrpo_jax.runtime.records import Record, numbered_lines, parse_record, read_jsonl
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.tasks import TEXT, Task
from alphagrpo_jax.types import (
    DataPosition,
    ImageBlock,
    InitialImageQueue,
    PromptBatch,
    TextBlock,
)

SPLIT = "records"
MAX_REPORTED = 5  # prompts listed in one error
# What verifiers and scorers read, and the policy does not: a run goes on when they are mended.
MENDABLE = ("semantic_questions", "quality_questions", "caption", "facts")


class PromptRecords(tfds.core.GeneratorBasedBuilder):
    """A JSONL file of records (see `runtime.records`) as array_record files, in file order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, *, source: str | os.PathLike, form: str = "questions", **options: Any
    ) -> None:
        """Makes a builder over `source`, whose records have one form.

        Args:
          source: the file.
          form: see `runtime.records.parse_record`.
          **options: as of any TFDS builder, e.g. `data_dir`.
        """
        self._source, self._form = pathlib.Path(source), form
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"prompt": tfds.features.Text(), "record": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts with atomic yes/no questions; `record` is the whole JSON object.",
            features=features,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # the file is local
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for index, record in enumerate(read_jsonl(self._source, form=self._form)):
            text = json.dumps(record.to_json())
            yield index, {"prompt": record.prompt, "record": text}


class PromptSet(NamedTuple):
    """N prompts of one task, tokenized."""

    task: Task
    records: tuple[Record, ...]
    texts: tuple[TextBlock, ...]  # one per text input of the task, numpy, N rows
    folder: pathlib.Path  # that the records' image files are in
    digest: str  # sha256 of the file, and of the images where the task needs them
    unmended: str = ""  # sha256 of the same without the fields that a mended record may change

    def inputs(
        self, rows: Sequence[int] | np.ndarray, images: ImageBlock | None = None
    ) -> tuple[TextBlock | ImageBlock, ...]:
        """Returns the task's inputs for these prompts, in order.

        Args:
          rows: which prompts.
          images: P given images, if the task has such an input.
        """
        texts = iter(self.texts)
        blocks: list[TextBlock | ImageBlock] = []
        for kind in self.task.inputs:
            if kind == TEXT:
                text = next(texts)
                blocks.append(TextBlock(text.tokens[rows], text.mask[rows]))
            else:
                assert images is not None  # the caller passes them to tasks with such an input
                blocks.append(images)
        return tuple(blocks)

    def images(self, rows: Sequence[int] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Returns the records' images at a size, uint8[P, height, width, 3]; see `record_image`."""
        return np.stack([record_image(self.folder, self.records[row], size) for row in rows])


class TaskData(NamedTuple):
    """Both prompt sets of a task, tokenized."""

    train: PromptSet
    heldout: PromptSet


def record_image(folder: pathlib.Path, record: Record, size: tuple[int, int] | None) -> np.ndarray:
    """Reads a record's image, uint8[height, width, 3].

    It is fitted into `size` (height, width) on white; without a size it keeps its own.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the record names no image, or what it names is not one.
    """
    if record.image is None:
        raise InputError(f"record {record.prompt!r} has no 'image', which its task needs")
    if record.image.startswith("data:"):
        image = images_lib.from_data_url(record.image)
    else:
        image = images_lib.open_rgb(folder / record.image)
    if size is None:
        return np.asarray(image)
    height, width = size
    return np.asarray(images_lib.fitted(image, width, height))


def load(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    task: Task,
    bucket: int,
    cache: str | os.PathLike,
    own_images: bool = False,
) -> PromptSet:
    """Builds (once) and reads the dataset of a JSONL file, and tokenizes a task's texts.

    Args:
      path: the file.
      tokenizer: the policy's.
      task: whose inputs are made.
      bucket: tokens that every prompt with its two delimiters must fit into; what the task's
        templates add comes on top.
      cache: folder for the array_record files, by the content of the file.
      own_images: whether every record must have a readable image.
    Raises:
      FileNotFoundError: no such file, or image files that are missing.
      ValueError: bad lines (file and line number), unreadable images, or prompts longer than the
        bucket.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MissingFileError(f"no file of prompt records at {path}; check data.train/heldout")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    form = "answer" if task.reward == "answer" else "questions"
    folder = pathlib.Path(cache) / f"{form}_{digest[:16]}"
    builder = PromptRecords(source=path, form=form, data_dir=str(folder))
    with _quiet():
        builder.download_and_prepare()
        # A decorator of tfds hides the parameters.
        rows = builder.as_data_source(split=SPLIT)  # pyright: ignore[reportCallIssue]
    records = tuple(parse_record(json.loads(row["record"]), form=form) for row in rows)
    check_control_tokens(path, records, task, tokenizer)
    unmended = _unmended_digest(records)
    if own_images:
        digest, unmended = check_images(path, records, (digest, unmended))
    texts = tuple(
        TextBlock.from_host(
            *tokenize(
                [_filled(template, record) for record in records],
                tokenizer,
                bucket=bucket + added_tokens(template, tokenizer),
                added=added_tokens(template, tokenizer),
            )
        )
        for template in task.texts
    )
    return PromptSet(task, records, texts, path.parent, digest, unmended)


def _unmended_digest(records: Sequence[Record]) -> str:
    """Returns the sha256 of all records in order, but for the fields `MENDABLE`."""
    fields = [record.to_json() for record in records]
    plain = [{name: row[name] for name in row if name not in MENDABLE} for row in fields]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check_images(
    path: pathlib.Path, records: Sequence[Record], digests: Sequence[str]
) -> list[str]:
    """Tries to open every record's image; returns digests of these digests and all images.

    Raises:
      ValueError: some are missing or unreadable; one message that lists them by line.
    """
    problems, totals = [], [hashlib.sha256(digest.encode()) for digest in digests]
    for (number, _), record in zip(numbered_lines(path), records, strict=True):
        try:
            image = record_image(path.parent, record, None)
            content = f"{image.shape}".encode() + image.tobytes()
            for total in totals:
                total.update(content)
        except UserError as error:
            problems.append(f"  {path}:{number}: {error}")
    if problems:
        raise InputError(
            f"{len(problems)} of {len(records)} records have no readable image:\n"
            + _listed(problems)
        )
    return [total.hexdigest() for total in totals]


def check_control_tokens(
    path: pathlib.Path, records: Sequence[Record], task: Task, tokenizer: Tokenizer
) -> None:
    """Refuses records whose texts a model would read as more than text.

    The fields that enter the policy's context, and the questions, which it reads too where it is
    its own verifier, may hold none of its special tokens; and none that verifiers are known to
    have, as ratings ask about prompts.

    Raises:
      InputError: there are some; one message that lists them by line.
    """
    names = sorted({name for text in task.texts for name in re.findall(r"\{(\w+)\}", text)})
    problems, total = [], 0
    for (number, _), record in zip(numbered_lines(path), records, strict=True):
        fields = {"prompt": record.prompt, **record.extra}
        texts = [(name, str(fields[name])) for name in names if name in fields]
        texts += [(f"question {text!r}", text) for text in record.question_texts]
        tokens = {
            where: sorted({*control_tokens(text), *tokenizer.control_tokens(text)})
            for where, text in texts
        }
        faults = [
            f"  {path}:{number}: {where}: {names}" for where, names in tokens.items() if names
        ]
        problems += faults
        total += bool(faults)
    if problems:
        raise InputError(
            f"{total} of {len(records)} records hold control tokens, which a model reads as ends "
            f"of turns or images; expected plain texts: take them out\n{_listed(problems)}"
        )


def _listed(problems: Sequence[str]) -> str:
    """Lists the first of some problems, each a line."""
    more = len(problems) - MAX_REPORTED
    tail = f"\n  ... and {more} more" if more > 0 else ""
    return "\n".join(problems[:MAX_REPORTED]) + tail


def added_tokens(template: str, tokenizer: Tokenizer) -> int:
    """Bounds the number of tokens that a template adds to the longest text that fills it.

    A text is one field of a record; tokens may be cut otherwise where field and template meet.
    """
    constant = re.sub(r"\{\w+\}", "", template)
    return len(tokenizer.encode(constant)) + 4 if constant else 0


def _filled(template: str, record: Record) -> str:
    fields = {"prompt": record.prompt, **record.extra}
    try:
        return template.format_map(fields)
    except KeyError as error:
        raise InputError(
            f"record {record.prompt!r} has no field {error}, which its task's text needs"
        ) from error


def tokenize(
    prompts: Sequence[str], tokenizer: Tokenizer, *, bucket: int, added: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes prompts to int32[N, T] tokens and their bool[N, T] mask, T = bucket.

    `added` of the bucket's tokens are a template's, as the advice in an error has to know.

    Raises:
      ValueError: prompts that do not fit; the longest ones are listed.
    """
    rows = [tokenizer.wrap(prompt) for prompt in prompts]
    long = sorted((len(row), text) for row, text in zip(rows, prompts, strict=True))[::-1]
    long = [(length, text) for length, text in long if length > bucket]
    if long:
        lines = (f"  {count} tokens: {text[:100]!r}" for count, text in long[:MAX_REPORTED])
        examples = "\n".join(lines)
        raise InputError(
            f"{len(long)} of {len(rows)} prompts are longer than the prompt bucket of {bucket} "
            f"tokens (delimiters included):\n{examples}\nset rollout.prompt_tokens to at least "
            f"{long[0][0] - added}, or shorten them"
        )
    return tokenizer.batch(rows, bucket)


def order(position: int, count: int, *, size: int, seed: int, task_number: int = 0) -> np.ndarray:
    """Returns which prompts come next: every epoch of every task is a permutation of its own.

    A pure function of its arguments, so that the position is all a checkpoint has to hold.

    Args:
      position: prompts taken so far.
      count: how many to take.
      size: number of prompts in the set.
      seed: of the run.
      task_number: of the task among those of the run; tasks that read one file differ by it.
    Returns:
      int64[count] indices.
    """
    numbers = np.arange(position, position + count)
    epochs = {
        epoch: host_random.generator(
            host_random.Stream.ORDER, seed=seed, number=epoch, task_number=task_number
        ).permutation(size)
        for epoch in np.unique(numbers // size).tolist()
    }
    return np.array([epochs[int(n) // size][int(n) % size] for n in numbers], np.int64)


def next_rows(config: Config, prompt_set: PromptSet, position: int, count: int) -> np.ndarray:
    """Returns which prompts of a task of a run come next, int64[count]; see `order`."""
    return order(
        position,
        count,
        size=len(prompt_set.records),
        seed=config.seed,
        task_number=config.tasks.index(prompt_set.task.name),
    )


def balanced(records: Sequence[Record], count: int) -> list[int]:
    """Chooses an evaluation set: half implied, half plain, each balanced over its types.

    Records without "kind" (not of the shapes world) are taken from the front.

    Args:
      records: the held-out set.
      count: how many; fewer are returned if there are fewer.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for index, record in enumerate(records):
        kind = str(record.extra.get("kind", ""))
        groups.setdefault(kind, {}).setdefault(str(record.extra.get("type", "")), []).append(index)
    kinds = [_interleave(list(types.values())) for _, types in sorted(groups.items())]
    return sorted(_interleave(kinds)[:count])


def _interleave(lists: list[list[int]]) -> list[int]:
    """Takes one item of each list in turn, until all are empty."""
    longest = max(map(len, lists), default=0)
    return [items[turn] for turn in range(longest) for items in lists if turn < len(items)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the dataset library's own progress bars and notices."""
    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logger.setLevel(level)


def start_position(config: Config) -> DataPosition:
    """Returns the position before the first step."""
    queue = None
    if any(tasks.TASKS[name].refines for name in config.tasks):
        capacity = config.srr.queue_prompts + config.train.prompts_per_step
        queue = InitialImageQueue.empty(capacity, config.model.height, config.model.width)
    return DataPosition(dict.fromkeys(config.tasks, 0), queue)


def tasks_at(config: Config, step: int) -> list[tasks.Task]:
    """Returns the task of each batch of an update; a mixed run samples them by weight."""
    if config.task != "mixed":
        return [tasks.TASKS[config.task]]
    weights = np.array(config.mixed.weights)
    rng = host_random.generator(host_random.Stream.TASKS, seed=config.seed, number=step)
    indices = rng.choice(len(weights), config.mixed.batches, p=weights / weights.sum())
    return [tasks.TASKS[config.mixed.tasks[index]] for index in indices]


def next_batches(
    config: Config,
    data: Mapping[str, TaskData],
    step: int,
    position: DataPosition,
    initial_images: Sequence[InitialImageQueue] = (),
) -> list[PromptBatch]:
    """Takes the prompts of an update and moves the position on.

    Args:
      config: the run's.
      data: prompts by task.
      step: number of the update.
      position: moves on for tasks that do not refine; `initial_images.take` moves it for the rest.
      initial_images: of the batches whose tasks refine images, in order.
    """
    count, size = config.train.prompts_per_step, (config.model.height, config.model.width)
    waiting = iter(initial_images)
    batches = []
    for number, task in enumerate(tasks_at(config, step)):
        if task.refines:
            initial = next(waiting)
            batches.append(PromptBatch(number, task, initial.row, initial.image, initial))
            continue
        prompt_set, start = data[task.name].train, position.positions[task.name]
        rows = next_rows(config, prompt_set, start, count)
        images = prompt_set.images(rows, size) if task.image == "record" else None
        batches.append(PromptBatch(number, task, rows, images, None))
        position.positions[task.name] += count
    return batches


def image_block(loaded: LoadedModel, images: np.ndarray) -> ImageBlock:
    """Resizes input images uint8[P, Hpx, Wpx, 3] for the ViT; the VAE takes them as they are."""
    height, width = images.shape[1:3]
    sizes = loaded.config.vit_transform
    vit_images = images
    if images_lib.fitted_size(width, height, sizes) != (width, height):
        resized = [images_lib.resize(Image.fromarray(image), sizes) for image in images]
        vit_images = np.stack([np.asarray(image) for image in resized])
    return ImageBlock.from_host(images, vit_images)
