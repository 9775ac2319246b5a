"""Stage 1: question records as a TFDS dataset, their tokens, and the order they come in."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from alphagrpo_jax.rewards.questions import Record, parse_record, read_jsonl
from alphagrpo_jax.runtime.tokenizer import Tokenizer

SPLIT = "records"
MAX_REPORTED = 5  # prompts listed in one error


class PromptRecords(tfds.core.GeneratorBasedBuilder):
    """Any JSONL file of records (see `rewards.questions`) as array_record files, in file order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: str | os.PathLike, **options: Any) -> None:
        """A builder over `source`; `options` as of any TFDS builder, e.g. `data_dir`."""
        self._source = pathlib.Path(source)
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
        for index, record in enumerate(read_jsonl(self._source)):
            text = json.dumps(record.to_json())
            yield index, {"prompt": record.prompt, "record": text}


class PromptSet(NamedTuple):
    """N prompts, tokenised."""

    records: tuple[Record, ...]
    tokens: np.ndarray  # int32[N, T], <|im_start|> to <|im_end|>, padded
    mask: np.ndarray  # bool[N, T]
    digest: str  # sha256 of the file


def load(
    path: str | os.PathLike, tokenizer: Tokenizer, *, bucket: int, cache: str | os.PathLike
) -> PromptSet:
    """Builds (once) and reads the dataset of a JSONL file, and tokenises all prompts.

    Args:
      path: the file.
      tokenizer: the policy's.
      bucket: T; every prompt with its two delimiters must fit.
      cache: folder for the array_record files, by the content of the file.
    Raises:
      FileNotFoundError: no such file.
      ValueError: bad lines (file and line number), or prompts longer than the bucket.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompt records at {path}; check data.train/heldout")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = pathlib.Path(cache) / digest[:16]
    builder = PromptRecords(source=path, data_dir=str(folder))
    with _quiet():
        builder.download_and_prepare()
        rows = builder.as_data_source(split=SPLIT)
    records = tuple(parse_record(json.loads(row["record"])) for row in rows)
    tokens, mask = tokenise([record.prompt for record in records], tokenizer, bucket=bucket)
    return PromptSet(records, tokens, mask, digest)


def tokenise(
    prompts: Sequence[str], tokenizer: Tokenizer, *, bucket: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32[N, T] tokens and their bool[N, T] mask, T = bucket.

    Raises:
      ValueError: prompts that do not fit; the longest ones are listed.
    """
    rows = [tokenizer.wrap(prompt) for prompt in prompts]
    long = sorted((len(row), text) for row, text in zip(rows, prompts, strict=True))[::-1]
    long = [each for each in long if each[0] > bucket]
    if long:
        lines = (f"  {count} tokens: {text[:100]!r}" for count, text in long[:MAX_REPORTED])
        shown = "\n".join(lines)
        raise ValueError(
            f"{len(long)} of {len(rows)} prompts are longer than the prompt bucket of {bucket} "
            f"tokens (delimiters included):\n{shown}\nset rollout.prompt_tokens to at least "
            f"{long[0][0]}, or shorten them"
        )
    return tokenizer.batch(rows, bucket)


def order(position: int, count: int, *, size: int, seed: int) -> np.ndarray:
    """Which prompts come next: every epoch is a permutation of its own.

    A pure function of its arguments, so that the position is all a checkpoint has to hold.

    Args:
      position: prompts taken so far.
      count: how many to take.
      size: number of prompts in the set.
      seed: of the run.
    Returns:
      int64[count] indices.
    """
    numbers = np.arange(position, position + count)
    epochs = {
        epoch: np.random.default_rng([seed, epoch]).permutation(size)
        for epoch in np.unique(numbers // size).tolist()
    }
    return np.array([epochs[int(n) // size][int(n) % size] for n in numbers], np.int64)


def balanced(records: Sequence[Record], count: int) -> list[int]:
    """Indices of an evaluation set: half implied, half plain, each balanced over its types.

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
    """One of each in turn, until all are empty."""
    longest = max((len(each) for each in lists), default=0)
    return [each[turn] for turn in range(longest) for each in lists if turn < len(each)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the dataset library's own progress bars and notices."""
    logger = logging.getLogger("absl")
    level = logger.level
    tfds.disable_progress_bar()
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logger.setLevel(level)
