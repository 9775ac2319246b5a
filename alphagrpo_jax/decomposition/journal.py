"""Reads the input prompts, and writes the output file, which alone says which of them are done.

A line of the output is one record, written as a whole and synced before it counts. It carries the
prompt's index in the input and a digest of the input, so that a process that was killed at any
moment continues by reading the file: a prompt that has a line is done, a last line cut short is
dropped, and the file of another input is refused. Lines stand in the order in which prompts were
finished until `Journal.sort` puts them in the order of the input, by replacing the file at once.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.decomposition import phrasing
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import control_tokens
from alphagrpo_jax.runtime.errors import AccessError, UserError
from alphagrpo_jax.runtime.files import replace_bytes, sync_folder
from alphagrpo_jax.runtime.records import (
    Record,
    RecordError,
    check_encoding,
    parse_line,
    parse_record,
    strip_mark,
)
from alphagrpo_jax.runtime.texts import is_writable

PROVENANCE = "decomposition"  # the field of a record that says how it was made


class JournalError(UserError, ValueError):
    """An input or output file that cannot be used; the message names it, the line and the fix."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and its position in the input."""

    text: str
    index: int  # of its line, from 0: the record's original_index
    id: str | None = None  # that the input gives it


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of an input file, each once."""

    path: pathlib.Path
    prompts: tuple[Prompt, ...]
    duplicates: tuple[int, ...]  # line numbers, from 1, of prompts that occur before
    digest: str  # of texts, indexes and ids, 16 hex digits


def read_prompts(path: str | os.PathLike) -> Prompts:
    """Reads prompts: of a file *.jsonl objects with "prompt" and maybe "id", else one a line.

    Blank lines are skipped. A prompt that occurs again, compared by `normalize_text` as in
    `check_file`, is listed in `duplicates` only.

    Raises:
      JournalError: no such file, not UTF-8, no prompt, a bad line, or a prompt with a control
        token.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
        check_encoding(lines[0], path)
    except OSError as error:
        raise JournalError(f"cannot read the prompts {path}: {error.strerror}") from error
    except RecordError as error:
        raise JournalError(str(error)) from error
    first_prompts: dict[str, Prompt] = {}  # by normalized text
    ids: dict[str, int] = {}
    duplicates = []
    for index, line in enumerate(lines):
        try:
            text = strip_mark(line).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise JournalError(
                f"{path}:{index + 1}: got bytes that are not UTF-8 ({error.reason} at byte "
                f"{error.start}); expected a UTF-8 text: convert the file"
            ) from error
        if not text:
            continue
        prompt = Prompt(text, index)
        if path.suffix == ".jsonl":
            prompt = _from_json(text, index, f"{path}:{index + 1}")
        if tokens := control_tokens(prompt.text):
            raise JournalError(
                f"{path}:{index + 1}: got the control tokens {tokens} in the prompt, which models "
                "read as ends of turns or images; expected plain text: take them out"
            )
        if prompt.id is not None and ids.setdefault(prompt.id, index) != index:
            first = ids[prompt.id] + 1
            raise JournalError(f"{path}:{index + 1}: id {prompt.id!r} is that of line {first} too")
        if first_prompts.setdefault(phrasing.normalize_text(prompt.text), prompt) is not prompt:
            duplicates.append(index + 1)
    if not first_prompts:
        raise JournalError(f"{path}: got no prompts, expected at least one line with a prompt")
    prompts = tuple(first_prompts.values())
    listed = json.dumps([dataclasses.astuple(prompt) for prompt in prompts])
    digest = hashlib.sha256(listed.encode()).hexdigest()[:16]
    return Prompts(path, prompts, tuple(duplicates), digest)


def _from_json(line: str, index: int, where: str) -> Prompt:
    try:
        fields = parse_line(line.encode())
    except RecordError as error:
        raise JournalError(
            f'{where}: {error} with "prompt" (a file of plain prompts must not be named *.jsonl)'
        ) from error
    text = fields.get("prompt") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text.strip() or not is_writable(text):
        raise JournalError(
            f'{where}: got "prompt" {text!r}, expected an object whose "prompt" is a text that is '
            "not empty and that UTF-8 can hold"
        )
    prompt_id = fields.get("id")
    is_text = isinstance(prompt_id, str) and is_writable(prompt_id)
    if prompt_id is not None and not is_text and type(prompt_id) is not int:
        raise JournalError(f"{where}: got id {prompt_id!r}, expected a text or an integer")
    return Prompt(text.strip(), index, None if prompt_id is None else str(prompt_id))


class Journal:
    """The output file, locked by one process at a time; a context manager.

    Attributes:
      path: of the file.
      done: records written so far, by `original_index`.
    """

    def __init__(self, path: str | os.PathLike, prompts: Prompts) -> None:
        """Opens or begins the file, locks it, and reads the records in it.

        Args:
          path: of the output; its folder is made if need be.
          prompts: the input.
        Raises:
          JournalError: the file cannot be written, another process writes it, it was not begun by
            this command or was begun with another input, or a line in it is damaged.
        """
        self.path, self._prompts = pathlib.Path(path), prompts
        self.done: dict[int, Record] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _locked(self.path)
        except OSError as error:
            raise JournalError(f"cannot write the output {path}: {error.strerror}") from error
        try:
            self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @property
    def open_prompts(self) -> list[Prompt]:
        """Prompts without a record, in the order of the input."""
        return [prompt for prompt in self._prompts.prompts if prompt.index not in self.done]

    def append(self, prompt: Prompt, fields: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        """Writes the record of a prompt; it is on the disk when this returns.

        Args:
          prompt: one of the input that has no record.
          fields: the questions and further fields of the record.
          origin: how it was made; kept in the record.
        Raises:
          JournalError: the disk is full or away; the file holds whole records only.
          ValueError: the prompt has a record.
          AssertionError: the fields are no record.
        """
        if prompt.index in self.done:
            raise ValueError(f"prompt {prompt.index} has a record already")
        width = len(str(self._prompts.prompts[-1].index))
        identity = {
            "prompt": prompt.text,
            "id": prompt.id or f"{self._prompts.path.stem}-{prompt.index:0{width}d}",
            "original_index": prompt.index,
        }
        origin = {"input": self._prompts.digest, **origin}
        try:
            record = parse_record({**fields, **identity, PROVENANCE: origin})
        except RecordError as error:  # a bug of the caller, nothing that the user can mend
            raise AssertionError(f"prompt {prompt.index}: {error}") from error
        line = _line(record)
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            _write_all(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            raise JournalError(f"cannot write the output {self.path}: {error.strerror}") from error
        self.done[prompt.index] = record

    def sort(self) -> None:
        """Puts the records in the order of the input; a kill leaves the old file or the new one.

        Raises:
          JournalError: the new file cannot be written.
        """
        if list(self.done) == sorted(self.done):
            return
        self.done = dict(sorted(self.done.items()))
        write_whole(self.path, b"".join(_line(record) for record in self.done.values()))

    def _recover(self) -> None:
        """Reads the records and drops a last line that was cut short."""
        os.lseek(self._file, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._file), "rb") as file:
            lines = file.read().split(b"\n")
        tail = lines.pop()  # behind the last line end: nothing, or a line cut short
        by_index = {prompt.index: prompt for prompt in self._prompts.prompts}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = self._parse_line(line, number, by_index)
            assert record.original_index is not None  # `_parse_line` has looked it up
            if record.original_index in self.done:
                raise JournalError(
                    f"{self.path}:{number}: a second record of original_index "
                    f"{record.original_index}; delete one of the two"
                )
            self.done[record.original_index] = record
        if tail:
            if not self.done and not _begins_like_a_record(tail):
                raise JournalError(
                    f"{self.path}: is not empty and was not written by this command; give another "
                    "--output"
                )
            os.ftruncate(self._file, os.lseek(self._file, 0, os.SEEK_END) - len(tail))
            os.fsync(self._file)

    def _parse_line(self, line: bytes, number: int, by_index: Mapping[int, Prompt]) -> Record:
        """Parses a line of this output.

        Raises:
          JournalError: it holds no record, or one of another input.
        """
        where = f"{self.path}:{number}"
        try:
            record = parse_record(parse_line(line))
        except RecordError as error:
            raise JournalError(
                f"{where}: not a record ({error}); mend or delete this line, or give another "
                "--output"
            ) from error
        origin = record.extra.get(PROVENANCE)
        if not isinstance(origin, dict) or "input" not in origin or record.original_index is None:
            raise JournalError(
                f"{where}: a record that this command did not write (no field {PROVENANCE!r}); "
                "give another --output"
            )
        prompt = by_index.get(record.original_index)
        if origin["input"] != self._prompts.digest or prompt is None:
            raise JournalError(
                f"{where}: begun with another input than {self._prompts.path} (digest "
                f"{origin['input']}, expected {self._prompts.digest}); give the input that it was "
                "begun with, or another --output"
            )
        if record.prompt != prompt.text:
            raise JournalError(
                f"{where}: got prompt {record.prompt!r}, expected {prompt.text!r}, line "
                f"{prompt.index + 1} of {self._prompts.path}; delete this line"
            )
        return record


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file as a whole, see `runtime.files.replacing`.

    Raises:
      JournalError: it cannot be written.
    """
    try:
        replace_bytes(path, content)
    except AccessError as error:
        raise JournalError(str(error)) from error


def _locked(path: pathlib.Path) -> int:
    """Opens a file for appending, locked until it is closed or the process ends.

    Raises:
      JournalError: another process holds it.
      OSError: it cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                sync_folder(path.parent)
                return file
        except BlockingIOError as error:
            os.close(file)
            raise JournalError(
                f"{path}: another process is writing this output; wait for it or stop it"
            ) from error
        os.close(file)  # replaced (sorted) between opening and locking


def _line(record: Record) -> bytes:
    return (json.dumps(record.to_json(), ensure_ascii=False) + "\n").encode()


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _begins_like_a_record(line: bytes) -> bool:
    """Tells if a line cut short may be a record, and not somebody's file without a line end."""
    start = b'{"prompt": '
    if not (line.startswith(start) or start.startswith(line)):
        return False
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return isinstance(fields, dict) and PROVENANCE in fields
