"""Finds where the answer begins in a reply that thinks first.

The token that is read is the first one behind the end of the thinking that is not blank. The end is
`</think>`, or what another family writes (`spelling.THINKING_TAGS`), in the stream of tokens; or a
server has split the reply itself and gives the thinking apart, and then the answer's tokens are
those that spell its text at the end of the stream. Where neither is certain there is no answer.
"""

import re

from alphagrpo_jax.rewards.verifiers.chat.control_tokens import CONTROL
from alphagrpo_jax.rewards.verifiers.chat.replies import NoAnswerError, ReplyText
from alphagrpo_jax.rewards.verifiers.spelling import THINKING_TAGS

END = re.compile("|".join(re.escape(end) for _, end in THINKING_TAGS))


def answer_position(reply: ReplyText) -> int:
    """Returns the number of the first token of the answer.

    Raises:
      NoAnswerError: the thinking was cut, nothing stands behind it, or its end is not certain.
    """
    stream = "".join(reply.tokens)
    ends = list(END.finditer(stream))
    if len(ends) > 1:
        raise NoAnswerError(f"the thinking ends {len(ends)} times, so its end is not certain")
    if ends:
        return _first_behind(reply, ends[0].end())
    if not reply.reasoning.strip():
        if reply.finish_reason == "length":
            raise NoAnswerError(
                f"the thinking did not end within {len(reply.tokens)} tokens; raise "
                "verifier.max_tokens"
            )
        raise NoAnswerError(
            f"no end of thinking (</think>) in a reply of {len(reply.tokens)} tokens; "
            "verifier.read='first' is for models that do not think"
        )
    return _position_of_text(reply)


def answer_text(text: str) -> str:
    """Returns the part of a reply's text that stands behind the thinking."""
    return END.split(text)[-1]


def _first_behind(reply: ReplyText, end: int) -> int:
    """Returns the first token that is not blank behind the first `end` characters."""
    start = 0
    for number, token in enumerate(reply.tokens):
        if start >= end and token.strip():
            return number
        # A token may hold the last letters of the end and blanks, but not the answer's first too.
        if start < end < start + len(token) and token[end - start :].strip():
            raise NoAnswerError(f"the token {token[:40]!r} ends the thinking and begins the answer")
        start += len(token)
    raise _nothing_behind(reply)


def _position_of_text(reply: ReplyText) -> int:
    """Returns the first token of an answer that a server has split off: it spells the text's start.

    Raises:
      NoAnswerError: the stream of tokens is not the thinking, then the answer.
    """
    text, tokens = reply.text.strip(), reply.tokens
    if not text:
        raise _nothing_behind(reply)
    end = len(tokens)
    while end and (not tokens[end - 1].strip() or CONTROL.fullmatch(tokens[end - 1].strip())):
        end -= 1  # the end of the turn, which is no part of the text
    spelled, start = "", end
    while start and len(spelled.lstrip()) < len(text):
        start -= 1
        spelled = tokens[start] + spelled
    before = "".join(tokens[:start]).strip()  # empty if the server gives the answer's tokens alone
    if spelled.strip() != text or (before and reply.reasoning.strip() not in before):
        raise NoAnswerError(
            f"the {len(tokens)} tokens do not end with the answer's text {text[:40]!r} behind the "
            "thinking, so its first token is not certain"
        )
    return start


def _nothing_behind(reply: ReplyText) -> NoAnswerError:
    """Builds the failure of a reply that ends with its thinking."""
    cut = "; raise verifier.max_tokens" if reply.finish_reason == "length" else ""
    return NoAnswerError(f"nothing stands behind the thinking of {len(reply.tokens)} tokens{cut}")
