"""Reads question records: a prompt with its atomic yes/no questions, in JSON Lines."""

import codecs
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alphagrpo_jax.runtime.errors import MissingFileError, UserError
from alphagrpo_jax.runtime.texts import is_writable

MAX_REPORTED = 20  # bad lines listed in one error
MAX_DEPTH = 50  # of lists and objects in one another; JSON libraries end at some depth too
# UTF-32 first: its mark begins with that of UTF-16.
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_OWN_FIELDS = ("prompt", "semantic_questions", "quality_questions", "id", "original_index")


class RecordError(UserError, ValueError):
    """A record, or a file of records, that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Question:
    """An atomic question whose answer "yes" is the good one."""

    text: str
    tag: str
    is_valid: bool = True  # false: kept in the record, never asked
    dependency: tuple[int, ...] = ()  # indexes of semantic questions that must hold first


@dataclasses.dataclass(frozen=True)
class Record:
    """A prompt and its questions."""

    prompt: str
    semantic: tuple[Question, ...]
    quality: tuple[Question, ...]
    id: str | None = None
    original_index: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # other fields

    @property
    def image(self) -> str | None:
        """The location of its image, if it has one: a file beside the records, or a data: URL."""
        return self.extra.get("image")

    @property
    def image_text(self) -> str:
        """The text that describes the image to come: its "caption" if it has one, else its prompt.

        The prompt of an edit is an instruction, which describes no image.
        """
        return self.extra.get("caption") or self.prompt

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers, if it asks for one."""
        answer = self.extra.get("answer", ())
        return (answer,) if isinstance(answer, str) else tuple(answer)

    @property
    def asked_questions(self) -> list[Question]:
        """The questions that a verifier gets: semantic first, then quality."""
        return [q for q in (*self.semantic, *self.quality) if q.is_valid]

    @property
    def asked_semantic(self) -> list[str]:
        """Texts of the valid semantic questions."""
        return [question.text for question in self.semantic if question.is_valid]

    @property
    def asked_quality(self) -> list[str]:
        """Texts of the valid quality questions."""
        return [question.text for question in self.quality if question.is_valid]

    @property
    def question_texts(self) -> list[str]:
        """Texts of all questions that a verifier gets: semantic first, then quality."""
        return self.asked_semantic + self.asked_quality

    @property
    def asked_parents(self) -> list[tuple[int, ...]]:
        """By question of `question_texts`, the indexes of the questions there that it depends on.

        A question that is never asked can neither hold nor fail: such dependencies are left out.
        """
        numbers = [index for index, question in enumerate(self.semantic) if question.is_valid]
        index_among_valid = {index: number for number, index in enumerate(numbers)}
        return [
            tuple(
                index_among_valid[index]
                for index in question.dependency
                if index in index_among_valid
            )
            for question in (*self.semantic, *self.quality)
            if question.is_valid
        ]

    def split(self, answers: Sequence[float | None]) -> tuple[list, list]:
        """Cuts the answers to `question_texts` into semantic and quality ones.

        Raises:
          ValueError: another number of answers than of questions asked.
        """
        cut = len(self.asked_semantic)
        if len(answers) != cut + len(self.asked_quality):
            raise ValueError(
                f"got {len(answers)} answers for prompt {self.prompt!r}, "
                f"expected {len(self.question_texts)}, one per valid question"
            )
        return list(answers[:cut]), list(answers[cut:])

    def to_json(self) -> dict[str, Any]:
        """Returns the record as one JSON object, `parse_record`'s inverse."""
        fields: dict[str, Any] = {"prompt": self.prompt}
        if self.id is not None:
            fields["id"] = self.id
        if self.original_index is not None:
            fields["original_index"] = self.original_index
        for kind, questions in (("semantic", self.semantic), ("quality", self.quality)):
            fields[f"{kind}_questions"] = [_question_json(kind, question) for question in questions]
        return fields | dict(self.extra)


def read_jsonl(path: str | os.PathLike, *, form: str = "questions") -> list[Record]:
    """Reads records, one JSON object a line; blank lines are skipped.

    Args:
      path: UTF-8 file whose lines have what `form` says, and may have "id", "original_index" and
        any further fields (kept in `Record.extra`).
      form: see `parse_record`.
    Raises:
      MissingFileError: no such file.
      RecordError: bad lines; one message with file, line, what was got, expected, and the fix.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MissingFileError(f"no file of question records at {path}; check data.train/heldout")
    records, problems = [], []
    for number, line in numbered_lines(path):
        try:
            records.append(parse_record(parse_line(line), form=form))
        except RecordError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        listed = "\n".join(problems[:MAX_REPORTED])
        more = len(problems) - MAX_REPORTED
        tail = f"\n... and {more} more" if more > 0 else ""
        raise RecordError(f"{len(problems)} bad line(s) in question records:\n{listed}{tail}")
    if not records:
        raise RecordError(f"{path}: got no records, expected at least one JSON object a line")
    return records


def find_line(path: str | os.PathLike, record: Record) -> int | None:
    """Returns the number of the first line that holds a record; None if no line does.

    Records do not carry their lines: only a failure asks for one.
    """
    for number, line in numbered_lines(path):
        try:
            if parse_record(parse_line(line)) == record:
                return number
        except RecordError:  # a line of another form
            continue
    return None


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file that are not blank, and their numbers from 1.

    Byte order marks at the beginning of lines are dropped: files that were put together have some.

    Raises:
      RecordError: the file is UTF-16 or UTF-32.
    """
    with pathlib.Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                check_encoding(line, path)
            stripped = strip_mark(line)
            if stripped.strip():
                yield number, stripped


def strip_mark(line: bytes) -> bytes:
    """Returns a line without the byte order marks of UTF-8 that it begins with."""
    while line.startswith(codecs.BOM_UTF8):
        line = line.removeprefix(codecs.BOM_UTF8)
    return line


def check_encoding(beginning: bytes, path: str | os.PathLike) -> None:
    """Refuses files of two or four bytes a letter, which editors on Windows write.

    Args:
      beginning: the file's first bytes, two or more if it has them.
      path: of the file, for the message.
    Raises:
      RecordError: the file is such a one.
    """
    marks = (name for mark, name in _WIDE_MARKS.items() if beginning.startswith(mark))
    name = next(marks, None)
    if name is None and b"\0" in beginning[:4]:  # without a mark: {" has a zero beside each letter
        name = "UTF-32" if b"\0\0" in beginning[:4] else "UTF-16"
    if name is not None:
        raise RecordError(
            f"{path} is {name}, expected UTF-8; convert it: iconv -f {name} -t UTF-8 "
            f"{path} > NEW.jsonl"
        )


def parse_record(fields: Any, *, form: str = "questions") -> Record:
    """Builds a record from its decoded JSON object.

    Args:
      fields: the object.
      form: "questions": it has "prompt", "semantic_questions" and "quality_questions"; "answer":
        "prompt" and "answer", the right answer or a list of right ones.
    Raises:
      RecordError: what is wrong with it, and what was expected.
    """
    if not isinstance(fields, dict):
        raise RecordError(f"got {_kind(fields)}, expected a JSON object with prompt and questions")
    _check_texts(fields)
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RecordError(f"field 'prompt': got {prompt!r}, expected a text that is not empty")
    _check_fields(fields, form)
    asks = form == "questions"
    semantic = _questions(fields, "semantic") if asks else ()
    quality = _questions(fields, "quality") if asks else ()
    for question in (*semantic, *quality):
        outside = [index for index in question.dependency if not 0 <= index < len(semantic)]
        if outside:
            raise RecordError(
                f"question {question.text!r}: got dependency {outside}, expected indexes of "
                f"semantic questions, 0..{len(semantic) - 1}"
            )
    return Record(
        prompt=prompt,
        semantic=semantic,
        quality=quality,
        id=_optional_id(fields),
        original_index=_optional_index(fields),
        extra={name: value for name, value in fields.items() if name not in _OWN_FIELDS},
    )


def _check_texts(fields: dict) -> None:
    """Checks all texts in a JSON object, and its depth, without recursion.

    Raises:
      RecordError: a text that UTF-8 cannot hold, or lists in lists without end.
    """
    waiting: list[tuple[str, Any, int]] = [("", fields, 1)]
    while waiting:
        where, value, depth = waiting.pop()
        items: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            items = [(f"{where}.{name}" if where else name, item) for name, item in value.items()]
            broken = [name for name in value if not is_writable(name)]
        elif isinstance(value, list):
            items = [(f"{where}[{index}]", item) for index, item in enumerate(value)]
            broken = []
        else:
            broken = [value] if isinstance(value, str) and not is_writable(value) else []
        if broken:
            raise RecordError(
                f"field {where!r}: got {broken[0]!r}, which holds half of a character (a lone "
                "surrogate), so that UTF-8 cannot hold it; write the whole character or leave it "
                "out"
            )
        if items and depth > MAX_DEPTH:
            raise RecordError(
                f"field {where[:40]!r}...: got values nested more than {MAX_DEPTH} levels deep, "
                "expected a flat record; leave the field out"
            )
        waiting += [(name, item, depth + 1) for name, item in items[::-1]]


def _check_fields(fields: dict, form: str) -> None:
    image = fields.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        raise RecordError(f"field 'image': got {image!r}, expected a file's name or a data: URL")
    if fields.get("caption") is not None and not _is_text(fields["caption"]):
        raise RecordError(
            f"field 'caption': got {fields['caption']!r}, expected a text that describes the image "
            "as it should be; leave it out where the prompt does"
        )
    if form != "answer":
        return
    answer = fields.get("answer")
    listed = [answer] if isinstance(answer, str) else answer
    if not isinstance(listed, list) or not listed or not all(map(_is_text, listed)):
        raise RecordError(
            f"field 'answer': got {answer!r}, expected the right answer as a text, or a list of "
            "right answers"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def parse_line(
    line: bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Decodes one line of JSON.

    Args:
      line: UTF-8; byte order marks at its beginning are dropped.
      object_pairs_hook: see `json.loads`.
    Raises:
      RecordError: it is not UTF-8, or not one JSON value.
    """
    try:  # decoded here: of bytes, the library guesses the encoding
        text = strip_mark(line).decode("utf-8")
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecordError:  # of the hook
        raise
    except UnicodeDecodeError as error:
        raise RecordError(f"got bytes that are not UTF-8 ({error}); expected UTF-8") from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
    except RecursionError:
        problem = "nested too deep"
    except ValueError as error:  # numbers of thousands of digits
        problem = str(error)
    start = line[:60].decode(errors="replace").strip()
    raise RecordError(
        f"got {start!r}, which is not JSON ({problem}); expected one complete JSON object on the "
        "line"
    )


def _questions(fields: dict, kind: str) -> tuple[Question, ...]:
    name = f"{kind}_questions"
    if name not in fields:
        raise RecordError(
            f"field '{name}' is missing; expected a list of questions "
            "(the decompose command writes them)"
        )
    items = fields[name]
    if not isinstance(items, list) or not items:
        got = "an empty list" if items == [] else _kind(items)
        raise RecordError(f"field '{name}': got {got}, expected a list with at least one question")
    questions = tuple(_question(item, f"{name}[{i}]", kind) for i, item in enumerate(items))
    if not any(question.is_valid for question in questions):
        raise RecordError(
            f"field '{name}': every question has is_valid false, expected a valid one"
        )
    return questions


def _question(item: Any, where: str, kind: str) -> Question:
    if not isinstance(item, dict):
        raise RecordError(f"{where}: got {_kind(item)}, expected an object with 'question', 'tag'")
    text = item.get("question")
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"{where}: got question {text!r}, expected a text that is not empty")
    if item.get("question_type", kind) != kind:
        raise RecordError(
            f"{where}: got question_type {item['question_type']!r}, expected {kind!r}"
        )
    is_valid = item.get("is_valid", True)
    if not isinstance(is_valid, bool):
        raise RecordError(f"{where}: got is_valid {is_valid!r}, expected true or false")
    tag = item.get("tag", "")
    if not isinstance(tag, str):
        raise RecordError(f"{where}: got tag {tag!r}, expected a text")
    dependency = item.get("dependency", [])
    if not isinstance(dependency, list) or not all(type(i) is int for i in dependency):
        raise RecordError(f"{where}: got dependency {dependency!r}, expected a list of integers")
    return Question(text=text, tag=tag, is_valid=is_valid, dependency=tuple(dependency))


def _question_json(kind: str, question: Question) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "question_type": kind,
        "question": question.text,
        "is_valid": question.is_valid,
        "tag": question.tag,
    }
    return fields | ({"dependency": list(question.dependency)} if question.dependency else {})


def _optional_id(fields: dict) -> str | None:
    value = fields.get("id")
    if value is None or isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise RecordError(f"field 'id': got {value!r}, expected a text or an integer")


def _optional_index(fields: dict) -> int | None:
    value = fields.get("original_index")
    if value is not None and type(value) is not int:
        raise RecordError(f"field 'original_index': got {value!r}, expected an integer")
    return value


def _kind(value: Any) -> str:
    """Names a JSON value's type and content, for messages."""
    if value is None:
        return "null"
    return f"{type(value).__name__} {value!r}"[:80]
