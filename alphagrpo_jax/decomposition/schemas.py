"""Forms of a language model's replies, one per stage, and the strict reading of a reply.

A reply is one JSON object of its stage's form and nothing else. Two wrappings that many models
cannot be kept from are taken off first: a leading `<think>...</think>` block, and one fence of
three backticks around the whole reply.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from alphagrpo_jax.decomposition.phrasing import QUALITY_TAGS, SEMANTIC_TAGS
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import control_tokens

MAX_ITEMS = 80  # tuples, and so questions, of one prompt
MAX_REPLY = 200_000  # characters; more is refused unread
MAX_PROBLEMS = 5  # told to the model at once
_NOT_SHAPE = {"title", "description", "pattern", "minimum", "maximum"} | {
    f"{bound}{quantity}" for bound in ("min", "max") for quantity in ("Length", "Items")
}


def _plain(text: str) -> str:
    if tokens := control_tokens(text):
        raise ValueError(f"holds the control tokens {tokens}, which no verifier may be sent")
    return text


# One line of text: what ends up in records and is shown to verifiers has no control characters.
Line = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=400, pattern=r"^[^\x00-\x1f]+$"
    ),
]
QuestionLine = Annotated[Line, pydantic.AfterValidator(_plain)]
Id = Annotated[int, Field(ge=1, le=10_000)]

_THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL)


class ReplyError(ValueError):
    """A reply that is not of its form; the message is told to the model."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SceneTuple(_Form):
    """One atomic fact of the prompt."""

    id: Id
    category: Literal["entity", "attribute", "relation", "action", "global", "other"]
    detail: Line
    arguments: list[Line] = Field(min_length=1, max_length=8)


class Tuples(_Form):
    """Reply of the stage "tuples"."""

    tuples: list[SceneTuple] = Field(min_length=1, max_length=MAX_ITEMS)


class TupleQuestion(_Form):
    """The question of one tuple."""

    id: Id
    question: QuestionLine


class Questions(_Form):
    """Reply of the stage "questions"."""

    questions: list[TupleQuestion] = Field(min_length=1, max_length=MAX_ITEMS)


class Parents(_Form):
    """The tuples that must hold for one tuple to make sense."""

    id: Id
    parents: list[Id] = Field(max_length=MAX_ITEMS)


class Dependencies(_Form):
    """Reply of the stage "dependencies"."""

    dependencies: list[Parents] = Field(min_length=1, max_length=MAX_ITEMS)


class Verdict(_Form):
    """The check of a semantic question against its prompt."""

    id: Id
    reason: Line
    necessary: bool  # every faithful image must fulfil it
    unambiguous: bool  # it has one meaning, answered by looking
    requested: bool  # it asks for nothing that the prompt does not ask for
    positive: bool  # yes is the good answer


class Verdicts(_Form):
    """Reply of the stage "validation"."""

    verdicts: list[Verdict] = Field(min_length=1, max_length=MAX_ITEMS)


class TagOf(_Form):
    """The tag of one semantic question."""

    id: Id
    tag: Literal[SEMANTIC_TAGS]  # pyright: ignore[reportInvalidTypeForm] (read by pydantic)


class TagsOf(_Form):
    """Reply of the stage "tags"."""

    tags: list[TagOf] = Field(min_length=1, max_length=MAX_ITEMS)


class QualityQuestion(_Form):
    """A question of how well the image is made."""

    question: QuestionLine
    tag: Literal[QUALITY_TAGS]  # pyright: ignore[reportInvalidTypeForm] (read by pydantic)


class QualityQuestions(_Form):
    """Reply of the stage "quality"."""

    questions: list[QualityQuestion] = Field(min_length=1, max_length=MAX_ITEMS)


class QualityVerdict(_Form):
    """The check of a quality question against its prompt."""

    id: Id
    reason: Line
    one_aspect: bool  # it asks for one thing
    adds_nothing: bool  # a faithful image need not show anything more for it
    positive: bool  # yes is the good answer


class QualityVerdicts(_Form):
    """Reply of the stage "quality_validation"."""

    verdicts: list[QualityVerdict] = Field(min_length=1, max_length=MAX_ITEMS)


Form = TypeVar("Form", bound=BaseModel)


def parse(reply: str, form: type[Form]) -> Form:
    """Reads a reply strictly as an instance of a form.

    Args:
      reply: the model's text.
      form: the stage's form.
    Raises:
      ReplyError: not one JSON object of that form; says what was got and where.
    """
    if len(reply) > MAX_REPLY:
        raise ReplyError(f"the reply has {len(reply)} characters, expected at most {MAX_REPLY}")
    text = _THINKING.sub("", reply).strip()
    fenced = _FENCE.match(text)
    text = fenced[1].strip() if fenced else text
    if not text.startswith("{"):
        raise ReplyError(f"expected one JSON object, got a reply that begins with {text[:60]!r}")
    try:
        return form.model_validate_json(text)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        listed = [f"{_where(p['loc'])}{p['msg']}" for p in problems[:MAX_PROBLEMS]]
        more = len(problems) - len(listed)
        tail = f"; and {more} more" if more > 0 else ""
        raise ReplyError("; ".join(listed) + tail) from error


def json_schema(form: type[BaseModel]) -> dict[str, Any]:
    """Returns a form's JSON schema, for servers that decode by one: its fields and their words.

    Lengths, ranges and patterns are left out, since not every server takes them; `parse` checks
    them.
    """
    return _shape(form.model_json_schema())


def _shape(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_shape(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # A field may be named like one of these; then it is a schema of its own.
    return {
        name: _shape(value)
        for name, value in schema.items()
        if name not in _NOT_SHAPE or isinstance(value, dict)
    }


def _where(path: tuple[str | int, ...]) -> str:
    """Returns "tuples[2].id: " for the path ("tuples", 2, "id"), "" for the empty path."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{text.removeprefix('.')}: " if text else ""
