"""Reads the reply of a chat-completions endpoint strictly: what is not as it should be is refused.

What shows that a reply belongs to its request: the id that was sent as X-Request-Id, where a server
echoes it in that header or in the reply's `id` (vLLM, `serve_verifier`), and the reply's `model`.
A server that gives neither cannot be checked.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

REQUEST_ID = re.compile(r"agrpo-[0-9a-f]{32}")  # ours; ids of other forms are a server's own
SURPLUS = 1e-2  # by which candidates' probabilities may exceed 1 in sum: rounded log-probs


class ReplyError(ValueError):
    """A reply that is not what the protocol promises; the message says what is wrong."""


class Candidate(NamedTuple):
    """One candidate of the first token."""

    token: str  # as text, e.g. " Yes"
    logprob: float  # natural; at most 0, may be minus infinity


class Completion(NamedTuple):
    """The reply of a chat endpoint."""

    text: str
    finish_reason: str | None  # "stop", "length", ...
    candidates: tuple[Candidate, ...] | None  # of the first token; None if not asked for
    usage: dict[str, int]  # tokens, as far as the server says
    endpoint: str  # who answered
    later: tuple[tuple[Candidate, ...], ...] = ()  # of the tokens after the first


def read_completion(
    body: bytes,
    headers: Mapping[str, str],
    *,
    request_id: str,
    model: str,
    endpoint: str,
    want_candidates: bool,
) -> Completion:
    """The completion in a reply's body.

    Args:
      body: JSON of a `chat.completion` with one choice.
      headers: of the reply, lower-case names.
      request_id: that was sent.
      model: that was asked for; a reply by "MODEL-date" is taken as its.
      endpoint: the server's URL.
      want_candidates: whether log-probs of the first token must be there.
    Raises:
      ReplyError: truncated or other JSON, an answer to another request or by another model, no
        choice or several, no text, no log-probs, or log-probs that are no probabilities.
    """
    reply = _expect(_parse(body), dict, "the reply")
    _check_ids(reply, headers, request_id, model)
    choices = _expect(reply.get("choices"), list, "choices")
    if len(choices) != 1:
        raise ReplyError(f"got {len(choices)} choices, expected 1")
    choice = _expect(choices[0], dict, "choices[0]")
    message = _expect(choice.get("message"), dict, "choices[0].message")
    text = message.get("content")
    if text is None and want_candidates:
        text = ""  # some servers give no text for an end token; the log-probs are the answer
    reason = choice.get("finish_reason")
    counts = reply.get("usage")
    usage = counts.items() if isinstance(counts, dict) else ()
    tokens = _candidates(choice.get("logprobs")) if want_candidates else ()
    return Completion(
        text=_expect(text, str, "choices[0].message.content"),
        finish_reason=reason if isinstance(reason, str) else None,
        candidates=tokens[0] if want_candidates else None,
        usage={name: count for name, count in usage if type(count) is int},
        endpoint=endpoint,
        later=tokens[1:],
    )


def read_models(body: bytes) -> list[str]:
    """The names in a reply to GET /models.

    Raises:
      ReplyError: it is not such a reply.
    """
    data = _expect(_expect(_parse(body), dict, "the reply").get("data"), list, "data")
    return [_expect(_expect(row, dict, "data[]").get("id"), str, "data[].id") for row in data]


def error_text(body: bytes) -> str:
    """What an error reply says, as one line of at most 300 characters; never raises."""
    text = body[:4000].decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        found = found.get("message", found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, AttributeError, RecursionError):
        pass  # not JSON, or no object: as it is
    return " ".join(text.split())


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"truncated or malformed JSON of {len(body)} bytes ({error})") from error


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        got = "nothing" if value is None else type(value).__name__
        raise ReplyError(f"{where}: got {got}, expected {kind.__name__}")
    return value


def _check_ids(
    reply: dict[str, Any], headers: Mapping[str, str], request_id: str, model: str
) -> None:
    for place in (headers.get("x-request-id"), reply.get("id")):
        found = REQUEST_ID.findall(place) if isinstance(place, str) else []
        if any(other != request_id for other in found):
            raise ReplyError(f"answer to another request: got {found[0]}, expected {request_id}")
    by = reply.get("model")
    if isinstance(by, str) and by != model and not by.startswith(f"{model}-"):
        raise ReplyError(f"answer by another model: got {by[:100]!r}, expected {model!r}")


def _candidates(logprobs: Any) -> tuple[tuple[Candidate, ...], ...]:
    """Candidates of every token, at least one."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content:
        raise ReplyError("no log-probs: the server must support logprobs and top_logprobs")
    return tuple(_token(row, f"logprobs.content[{i}]") for i, row in enumerate(content))


def _token(row: Any, where: str) -> tuple[Candidate, ...]:
    """Candidates of one token; it counts too where it is not listed among the likeliest."""
    rows = _expect(_expect(row, dict, where).get("top_logprobs"), list, f"{where}.top_logprobs")
    if not rows:
        raise ReplyError("no log-probs: top_logprobs is empty")
    found = [_candidate(candidate) for candidate in rows]
    if row.get("token") not in {candidate.token for candidate in found}:
        found.append(_candidate(row))
    total = sum(math.exp(candidate.logprob) for candidate in found)
    if total > 1.0 + SURPLUS:
        raise ReplyError(f"log-probs: probabilities of the candidates sum to {total:.4g}")
    return tuple(found)


def _candidate(row: Any) -> Candidate:
    row = _expect(row, dict, "a candidate")
    token, logprob = row.get("token"), row.get("logprob")
    if type(logprob) not in (int, float) or not logprob <= SURPLUS:  # also true for NaN
        raise ReplyError(f"log-probs: got {logprob!r}, expected a number of at most 0")
    return Candidate(_expect(token, str, "a candidate's token"), min(float(logprob), 0.0))
