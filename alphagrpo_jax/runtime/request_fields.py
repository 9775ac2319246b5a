"""Further fields of a chat request that a user gives as JSON."""

import json
from typing import Any

from alphagrpo_jax.runtime.errors import UsageError

# Fields of a chat request that the client sets itself: another value would change what is read.
CLIENT_FIELDS = frozenset({
    "logprobs", "max_completion_tokens", "max_tokens", "messages", "model", "n", "response_format",
    "seed", "stream", "stream_options", "temperature", "top_logprobs",
})  # fmt: skip


def extra_fields(text: str) -> dict[str, Any]:
    """Parses further fields of a chat request.

    Args:
      text: a JSON object, or "" for none.
    Raises:
      UsageError: it is no JSON object, or it has a field that the client sets itself.
    """
    expected = 'expected a JSON object such as {"chat_template_kwargs": {"enable_thinking": false}}'
    try:
        fields = json.loads(text, parse_constant=_refuse_constant) if text else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f"got {text[:80]!r}, which is not JSON ({error}); {expected}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"got {text[:80]!r}, {expected}")
    if taken := sorted(CLIENT_FIELDS & fields.keys()):
        raise UsageError(
            f"got the fields {taken}, which the client sets itself; leave them out "
            "(verifier.model, max_tokens and top_logprobs are options of their own)"
        )
    return fields


def _refuse_constant(name: str) -> None:
    """Refuses NaN and the infinities, which are not JSON."""
    raise ValueError(f"{name} is no JSON number")
