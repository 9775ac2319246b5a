"""Parses replies of chat-completions endpoints strictly: anything unexpected is refused.

Two fields show that a reply belongs to its request: the id that was sent as X-Request-Id, if the
server echoes it in that header or in the reply's `id` (vLLM, `serve_verifier`), and `model`. A
server that sends neither cannot be checked.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

REQUEST_ID = re.compile(r"agrpo-[0-9a-f]{32}")  # ids of this client; servers' ids look different
SURPLUS = 1e-2  # by which the candidates' probabilities may exceed 1 in sum: rounded log-probs
MAX_LATER = 4  # tokens behind the one that is read, whose candidates are parsed too
# What hosted services append to a model's name: the date of its version.
DATE = re.compile(
    r"-(?:\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])"
    r"|(?:(?:19|20)\d\d)?(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))",
    re.ASCII,
)
_T = TypeVar("_T")


class ChatReplyError(ValueError):
    """The reply violates the chat-completions protocol; the message says what is wrong."""


class NoAnswerError(ChatReplyError):
    """The reply is sound, but does not answer the question; the message says why."""


class Candidate(NamedTuple):
    """A candidate of one token."""

    token: str  # as text, e.g. " Yes"
    logprob: float  # natural logarithm; at most 0, may be minus infinity


class Completion(NamedTuple):
    """A reply of a chat endpoint."""

    text: str
    finish_reason: str | None  # "stop", "length", ...
    candidates: tuple[Candidate, ...] | None  # of the token that is read; None if not requested
    usage: dict[str, int]  # numbers of tokens, as far as the server gives them
    endpoint: str  # URL of the server
    later: tuple[tuple[Candidate, ...], ...] = ()  # candidates of the tokens behind it


class ReplyText(NamedTuple):
    """The tokens of a reply and what the server says about them."""

    tokens: Sequence[str]  # at least one, as texts
    text: str  # of the answer
    reasoning: str  # of the thinking, if the server gives it apart; else ""
    finish_reason: str | None


class Wanted(NamedTuple):
    """Choice of what is read of a reply."""

    locate: Callable[[ReplyText], int] | None  # number of the token to read; None: the text alone


TEXT = Wanted(None)
FIRST_TOKEN = Wanted(lambda reply: 0)


def read_completion(
    body: bytes,
    headers: Mapping[str, str],
    *,
    request_id: str,
    model: str,
    endpoint: str,
    wanted: Wanted,
) -> Completion:
    """Parses the completion in a reply's body.

    Args:
      body: JSON of a `chat.completion` with one choice.
      headers: of the reply, lower-case names.
      request_id: the id that was sent.
      model: the model that was asked; "MODEL-date" in the reply is accepted too.
      endpoint: the server's URL.
      wanted: `TEXT`, or which token's log-probs are required.
    Raises:
      NoAnswerError: `wanted` finds no token that could answer.
      ChatReplyError: truncated or other JSON, an answer to another request or by another model, no
        choice or several, no text, no log-probs, or log-probs that are no probabilities.
    """
    reply = _expect(_parse(body), dict, "the reply")
    _check_ids(reply, headers, request_id, model)
    choices = _expect(reply.get("choices"), list, "choices")
    if len(choices) != 1:
        raise ChatReplyError(f"got {len(choices)} choices, expected 1")
    choice = _expect(choices[0], dict, "choices[0]")
    message = _expect(choice.get("message"), dict, "choices[0].message")
    text = message.get("content")
    if text is None and wanted.locate is not None:
        text = ""  # some servers give no text for an end token; the log-probs are the answer
    text = _expect(text, str, "choices[0].message.content")
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else None
    counts = reply.get("usage")
    usage = counts.items() if isinstance(counts, dict) else ()
    candidates: tuple[tuple[Candidate, ...], ...] = ()
    if wanted.locate is not None:
        rows = _token_rows(choice.get("logprobs"))
        tokens = [_expect(row.get("token"), str, f"token {i}") for i, row in enumerate(rows)]
        start = wanted.locate(ReplyText(tokens, text, _reasoning(message), reason))
        end = start + 1 + MAX_LATER
        candidates = tuple(
            _token(row, f"logprobs.content[{i}]") for i, row in enumerate(rows[start:end], start)
        )
    return Completion(
        text=text,
        finish_reason=reason,
        candidates=candidates[0] if candidates else None,
        usage={name: count for name, count in usage if type(count) is int},
        endpoint=endpoint,
        later=candidates[1:],
    )


def read_models(body: bytes) -> list[str]:
    """Parses the model names in a reply to GET /models.

    Raises:
      ChatReplyError: it is not such a reply.
    """
    data = _expect(_expect(_parse(body), dict, "the reply").get("data"), list, "data")
    return [_expect(_expect(row, dict, "data[]").get("id"), str, "data[].id") for row in data]


def error_text(body: bytes) -> str:
    """Returns the message of an error reply as one line; never raises."""
    text = body[:4000].decode(errors="replace")
    try:
        content = json.loads(text)
        content = content.get("error", content)
        content = content.get("message", content) if isinstance(content, dict) else content
        text = content if isinstance(content, str) else json.dumps(content)
    except (ValueError, AttributeError, RecursionError):
        pass  # not JSON, or no object: the text as it is
    return " ".join(text.split())


def _parse(body: bytes) -> Any:
    """Parses JSON.

    Raises:
      ChatReplyError: it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ChatReplyError(
            f"truncated or malformed JSON of {len(body)} bytes ({error})"
        ) from error


def _expect(value: Any, kind: type[_T], where: str) -> _T:
    """Returns the value if it is of this type.

    Raises:
      ChatReplyError: it is not.
    """
    if not isinstance(value, kind):
        got = "nothing" if value is None else type(value).__name__
        raise ChatReplyError(f"{where}: got {got}, expected {kind.__name__}")
    return value


def _check_ids(
    reply: dict[str, Any], headers: Mapping[str, str], request_id: str, model: str
) -> None:
    """Checks that a reply belongs to its request.

    Raises:
      ChatReplyError: it answers another request or comes from another model.
    """
    for field in (headers.get("x-request-id"), reply.get("id")):
        echoed = REQUEST_ID.findall(field) if isinstance(field, str) else []
        if any(echoed_id != request_id for echoed_id in echoed):
            raise ChatReplyError(
                f"answer to another request: got {echoed[0]}, expected {request_id}"
            )
    name = reply.get("model")
    if isinstance(name, str) and not _is_model(name, model):
        raise ChatReplyError(f"answer by another model: got {name[:100]!r}, expected {model!r}")


def _is_model(name: str, model: str) -> bool:
    """Tells whether a reply's model is the one asked for, or a dated version of it."""
    return name.startswith(model) and (
        len(name) == len(model) or DATE.fullmatch(name, len(model)) is not None
    )


def _reasoning(message: dict[str, Any]) -> str:
    """Returns the thinking, which servers give under one of two names, or "" without any."""
    fields = (message.get("reasoning_content"), message.get("reasoning"))
    return next((field for field in fields if isinstance(field, str)), "")


def _token_rows(logprobs: Any) -> list[dict[str, Any]]:
    """Returns the rows of all tokens, at least one."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        raise ChatReplyError("no log-probs: the server must support logprobs and top_logprobs")
    return [_expect(row, dict, f"logprobs.content[{i}]") for i, row in enumerate(content)]


def _token(row: dict[str, Any], where: str) -> tuple[Candidate, ...]:
    """Parses the candidates of one token, including the token itself if it is not listed."""
    rows = _expect(row.get("top_logprobs"), list, f"{where}.top_logprobs")
    if not rows:
        raise ChatReplyError("no log-probs: top_logprobs is empty")
    candidates = [_candidate(candidate) for candidate in rows]
    if row["token"] not in {candidate.token for candidate in candidates}:
        candidates.append(_candidate(row))
    total = sum(math.exp(candidate.logprob) for candidate in candidates)
    if total > 1.0 + SURPLUS:
        raise ChatReplyError(f"log-probs: probabilities of the candidates sum to {total:.4g}")
    return tuple(candidates)


def _candidate(row: Any) -> Candidate:
    """Parses one candidate; a log-prob slightly above 0 becomes 0."""
    row = _expect(row, dict, "a candidate")
    token, logprob = row.get("token"), row.get("logprob")
    if type(logprob) not in (int, float) or not logprob <= SURPLUS:  # also true for NaN
        # Not the repr of whatever it is: that of a list nested deeply fails itself.
        got = logprob if isinstance(logprob, float | int) else type(logprob).__name__
        raise ChatReplyError(f"log-probs: got {got}, expected a number of at most 0")
    try:
        number = min(float(logprob), 0.0)
    except OverflowError:  # an integer of hundreds of digits
        raise ChatReplyError("log-probs: got an integer beyond all floats") from None
    return Candidate(_expect(token, str, "a candidate's token"), number)
