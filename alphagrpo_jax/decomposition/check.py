"""Validates a file of records line by line; every finding names its line."""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from alphagrpo_jax.decomposition import phrasing
from alphagrpo_jax.decomposition.pipeline import find_cycle
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import control_tokens
from alphagrpo_jax.runtime.records import (
    Question,
    Record,
    RecordError,
    check_encoding,
    parse_line,
    parse_record,
    strip_mark,
)

_HAS_QUESTIONS = {"semantic_questions", "quality_questions"}
REQUIRED = ("question_type", "question", "is_valid", "tag")  # of a question, as released


class Finding(NamedTuple):
    """Something wrong ("error") or doubtful ("warning") on a line of a file."""

    path: str
    line: int  # from 1
    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.severity}: {self.message}"


def check_file(
    path: str | os.PathLike, refusal: Callable[[str], str | None] | None = None
) -> tuple[list[Finding], int]:
    """Returns the findings of a file in the order of its lines, and its number of readable records.

    A record with an answer and no questions is checked as one of the answering task, without them.

    Errors: what `records.parse_record` refuses (form, empty lists, dependencies on no question,
    no valid question, texts that UTF-8 cannot hold), unknown tags, dependency circles, prompts, ids
    or questions that occur twice, questions whose good answer is no, prompts or questions that hold
    control tokens, questions that the verifier cannot be asked. Warnings: fields left out,
    questions marked invalid, dependencies on those, doubtful wording, an original_index that occurs
    twice, blank lines.

    Args:
      path: of the file.
      refusal: returns why a verifier cannot be asked a question, or None if it can; None: there is
        no verifier to be asked.
    """
    path = pathlib.Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        return [Finding(str(path), 1, "error", f"cannot be read: {error.strerror}")], 0
    first_lines: dict[tuple[str, str], int] = {}
    findings, count = [], 0
    try:
        check_encoding(content[:4], path)
    except RecordError as error:
        return [Finding(str(path), 1, "error", str(error))], 0
    lines = [strip_mark(line) for line in content.split(b"\n")]
    if not lines[-1]:
        lines.pop()
    elif content:
        message = "the last line has no line end: perhaps it was cut short"
        findings.append(Finding(str(path), len(lines), "warning", message))
    for number, line in enumerate(lines, start=1):
        try:
            record, problems = _read_line(line)
        except RecordError as error:
            findings.append(Finding(str(path), number, "error", str(error)))
            continue
        if record is not None:
            count += 1
            problems += _repetition_problems(record, number, first_lines)
            problems += _record_problems(record, refusal)
        findings += [Finding(str(path), number, severity, text) for severity, text in problems]
    if not count and not findings:
        findings.append(Finding(str(path), 1, "error", "no records, expected at least one"))
    return sorted(findings, key=lambda finding: finding.line), count


_Problem = tuple[str, str]  # severity, message


def _read_line(line: bytes) -> tuple[Record | None, list[_Problem]]:
    """Returns the record on a line (None for a blank line), and warnings of fields it leaves out.

    Raises:
      RecordError: the line holds no record.
    """
    if not line.strip():
        return None, [("warning", "blank line")]
    fields = parse_line(line, object_pairs_hook=_unique)
    answers = isinstance(fields, dict) and "answer" in fields and not _HAS_QUESTIONS & set(fields)
    record = parse_record(fields, form="answer" if answers else "questions")
    problems: list[_Problem] = []
    for kind in ("semantic", "quality"):
        for index, item in enumerate(fields.get(f"{kind}_questions", [])):
            missing = [name for name in REQUIRED if name not in item]
            if missing:
                where = f"{kind}_questions[{index}]"
                problems.append(("warning", f"{where}: no field {', '.join(missing)}"))
    return record, problems


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Builds a JSON object whose names differ, which `json` does not demand."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RecordError(f"fields {twice} occur twice in one object, expected once")
    return fields


def _repetition_problems(
    record: Record, number: int, first_lines: dict[tuple[str, str], int]
) -> Iterator[_Problem]:
    """Yields a problem for each prompt or id that an earlier line has too.

    Args:
      record: on the line.
      number: of the line.
      first_lines: (field, value) -> the line that has it first; new values are added.
    """
    # One wish may be made for many images: with an image it is the pair that must be new.
    prompt = f"{phrasing.normalize_text(record.prompt)}\n{record.image or ''}"
    marks = [("error", "prompt", prompt, record.prompt)]
    if record.id is not None:
        marks.append(("error", "id", record.id, record.id))
    if record.original_index is not None:
        index = str(record.original_index)
        marks.append(("warning", "original_index", index, index))
    for severity, name, value, display in marks:
        first = first_lines.setdefault((name, value), number)
        if first != number:
            yield severity, f"{name} {display!r} is that of line {first} too"


def _record_problems(
    record: Record, refusal: Callable[[str], str | None] | None
) -> Iterator[_Problem]:
    if tokens := control_tokens(record.prompt):
        yield "error", f"prompt {record.prompt!r} holds the control tokens {tokens}"
    texts: dict[str, str] = {}
    for kind, questions in (("semantic", record.semantic), ("quality", record.quality)):
        for index, question in enumerate(questions):
            where = f"{kind}_questions[{index}]"
            first = texts.setdefault(phrasing.normalize_text(question.text), where)
            if first != where:
                yield "error", f"{where}: question {question.text!r} is asked by {first} too"
            reason = None if refusal is None else refusal(question.text)
            if reason is not None:
                yield "error", f"{where}: {reason}"
            for severity, text in _question_problems(record, kind, question):
                yield severity, f"{where}: {text}"
    cycle = find_cycle({i: question.dependency for i, question in enumerate(record.semantic)})
    if cycle:
        yield "error", f"dependencies form a circle through the semantic questions {cycle}"


def _question_problems(record: Record, kind: str, question: Question) -> Iterator[_Problem]:
    tags: Sequence[str] = phrasing.TAGS[kind]
    if question.tag not in tags:
        yield "error", f"got tag {question.tag!r}, expected one of {', '.join(tags)}"
    if tokens := control_tokens(question.text):
        yield "error", f"question {question.text!r} holds the control tokens {tokens}"
    fault = phrasing.negation_fault(question.text, record.prompt)
    if fault:
        yield "error", f"question {question.text!r} {fault}"
    else:
        doubt = phrasing.wording_doubt(question.text, record.prompt)
        if doubt:
            yield "warning", f"question {question.text!r} {doubt}"
    if not question.is_valid:
        yield "warning", f"question {question.text!r} is marked invalid and never asked"
    if len(set(question.dependency)) < len(question.dependency):
        yield "warning", f"got dependency {list(question.dependency)}, expected each index once"
    unasked = [i for i in question.dependency if not record.semantic[i].is_valid]
    if unasked and question.is_valid:
        yield "warning", f"depends on questions that are never asked: {unasked}"
