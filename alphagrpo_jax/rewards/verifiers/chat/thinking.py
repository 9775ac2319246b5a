"""Finds where the answer begins in a reply that may think first.

The rule is that of local judges (`answer_finder`), and a template's beginning of thinking, which no
reply shows, is taken into account: a reply without any tag is read at its first token only if the
judge itself has ended it. Or a server has split the reply and gives the thinking apart; then the
answer's tokens are those that spell its text at the end of the stream.
"""

import re

from alphagrpo_jax.rewards.verifiers.answer_finder import AnswerFinder
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import CONTROL
from alphagrpo_jax.rewards.verifiers.chat.replies import NoAnswerError, ReplyText
from alphagrpo_jax.rewards.verifiers.spelling import THINKING_TAGS, is_blank, spelled

END = re.compile("|".join(re.escape(end) for _, end in THINKING_TAGS))


def answer_position(reply: ReplyText) -> int:
    """Returns the number of the first token of the answer.

    Raises:
      NoAnswerError: the thinking was cut, nothing stands behind it, or its end is not certain.
    """
    finder: AnswerFinder[str] = AnswerFinder("".join)
    for token in reply.tokens:
        finder.append(token)
    if reply.reasoning.strip() and (finder.open_end or not finder.has_thought):
        return _position_of_text(reply)
    if finder.open_end or (not finder.has_thought and reply.finish_reason != "stop"):
        raise _no_end(reply, finder.open_end)
    if finder.shared_token is not None:
        raise NoAnswerError(
            f"the token {finder.shared_token[:40]!r} ends the thinking and begins the answer"
        )
    if finder.position is None:
        raise _nothing_behind(reply)
    return finder.position


def answer_text(text: str) -> str:
    """Returns the part of a reply's text that stands behind the thinking."""
    return END.split(text)[-1]


def _position_of_text(reply: ReplyText) -> int:
    """Returns the first token of an answer that a server has split off: it spells the text's start.

    Raises:
      NoAnswerError: the stream of tokens is not the thinking, then the answer.
    """
    text, tokens = reply.text.strip(), reply.tokens
    if not text:
        raise _nothing_behind(reply)
    end = len(tokens)
    while end and (is_blank(tokens[end - 1]) or CONTROL.fullmatch(tokens[end - 1].strip())):
        end -= 1  # the end of the turn, which is no part of the text
    answer, start = "", end
    while start and len(answer.strip()) < len(text):
        start -= 1
        answer = spelled("".join(tokens[start:end]))
    # Empty if the server gives the answer's tokens alone.
    before = spelled("".join(tokens[:start])).strip()
    if answer.strip() != text or (before and reply.reasoning.strip() not in before):
        raise NoAnswerError(
            f"the {len(tokens)} tokens do not end with the answer's text {text[:40]!r} behind the "
            "thinking, so its first token is not certain"
        )
    return start


def _no_end(reply: ReplyText, open_end: str) -> NoAnswerError:
    """Builds the failure of a reply whose thinking has not ended, as far as one can know."""
    count = len(reply.tokens)
    if reply.finish_reason == "length":
        return NoAnswerError(
            f"the thinking did not end within {count} tokens; raise verifier.max_tokens"
        )
    if open_end:
        return NoAnswerError(f"the thinking did not end: no {open_end!r} in {count} tokens")
    return NoAnswerError(
        f"no end of thinking in a reply of {count} tokens, and no finish_reason 'stop' (got "
        f"{reply.finish_reason!r}), so it may have been cut while the judge thought"
    )


def _nothing_behind(reply: ReplyText) -> NoAnswerError:
    """Builds the failure of a reply that ends with its thinking."""
    cut = "; raise verifier.max_tokens" if reply.finish_reason == "length" else ""
    return NoAnswerError(f"nothing stands behind the thinking of {len(reply.tokens)} tokens{cut}")
