"""Finds the token at which a reply that may think first begins its answer.

Local judges and endpoints are read by this one rule: the answer begins with the first token behind
the last end of thinking that is not blank, or with the first such token of a reply that neither
opens nor ends any thinking. Thinking that is still open at the reply's end has no answer.
"""

import re
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from alphagrpo_jax.rewards.verifiers.spelling import THINKING_TAGS, is_blank

_TAIL = 20  # tokens that surely hold a tag, even letter by letter
_ENDS = dict(THINKING_TAGS)  # by beginning
_TAG = re.compile("|".join(re.escape(tag) for pair in THINKING_TAGS for tag in pair))
_T = TypeVar("_T")


def opened_by(prompt: str) -> str:
    """Returns the end of the thinking that a prompt leaves open; "" if it leaves none."""
    # An example of thinking in a system turn is closed again.
    ends = [end for begin, end in THINKING_TAGS if prompt.rfind(begin) > prompt.rfind(end)]
    return ends[0] if ends else ""


class AnswerFinder(Generic[_T]):
    """Follows one reply, token by token.

    Attributes:
      open_end: what ends the thinking that is open now; "" outside of any.
      has_thought: True once any thinking has begun or ended.
      position: number of the answer's first token as far as the reply goes; None: not there yet.
      shared_token: a token that ends the thinking and begins the answer, which then has no token
        to be read; None: there is none.
    """

    def __init__(self, decode: Callable[[Sequence[_T]], str], open_end: str = "") -> None:
        """Begins a reply.

        Args:
          decode: returns the text of tokens, control tokens included.
          open_end: what ends the thinking that the prompt has opened; "" if none is known.
        """
        self._decode, self.open_end = decode, open_end
        self.has_thought = bool(open_end)
        self.position: int | None = None
        self.shared_token: _T | None = None
        self._tokens: list[_T] = []
        self._begin = 0  # number of the first token that may belong to the next tag

    @property
    def awaits_answer(self) -> bool:
        """Tells whether the next token may be the answer's first."""
        return not self.open_end and self.position is None and self.shared_token is None

    def append(self, token: _T) -> None:
        """Takes the next token."""
        number = len(self._tokens)
        self._tokens.append(token)
        if self.awaits_answer and not is_blank(self._decode([token])):
            self.position = number
        text = self._decode(self._tokens[max(self._begin, number + 1 - _TAIL) :])
        behind = 0
        for tag in _TAG.finditer(text):
            if self.open_end and tag[0] != self.open_end:
                continue  # the thinking speaks of tags
            # An end that nothing has opened: a template did, which an endpoint does not show.
            self.open_end = "" if self.open_end else _ENDS.get(tag[0], "")
            behind = tag.end()
        if behind:
            self.has_thought, self.position, self.shared_token = True, None, None
            self._begin = number + 1
            if not self.open_end and not is_blank(text[behind:]):
                self.shared_token = token
