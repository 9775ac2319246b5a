"""Memory of the texts that chat servers reject: tells a hopeless text from a stray error status.

A proxy may reject any request now and then, or all of them for a while, and a server every request
with a field that it does not know. None of this is the fault of a text. Used by one event loop.
"""

import collections
import dataclasses
from typing import NamedTuple

# Rejections of a text in a row, about any images. A proxy that rejects 5 % of all requests makes so
# many by chance once in 60 million questions.
REJECTIONS = 6
ROUNDS = 3  # of them with answers to other texts in between: an outage makes one round only


class Subject(NamedTuple):
    """Tells requests about one text from those about others."""

    kind: str  # requests of one kind have the same fields
    text: str


@dataclasses.dataclass
class _Rejected:
    """A text that servers have rejected since it was last accepted."""

    rejections: int = 0
    rounds: int = 0
    # By server, the number of its answers to texts of this kind when the newest round began.
    answers: dict[str, int] = dataclasses.field(default_factory=dict)


class Rejections:
    """Counts by text how often servers reject it while they answer others of its kind."""

    def __init__(self) -> None:
        """Starts without any."""
        self._rejected: dict[Subject, _Rejected] = {}
        self._answers: collections.Counter[tuple[str, str]] = collections.Counter()

    def accepted(self, subject: Subject, url: str, *, answered: bool) -> None:
        """Books that a server has taken a text.

        Args:
          subject: the text, with its kind.
          url: of the server.
          answered: whether the reply was an answer, too.
        """
        self._rejected.pop(subject, None)
        self._answers[url, subject.kind] += answered

    def rejected(self, subject: Subject, url: str) -> None:
        """Books that a server has rejected a text."""
        rejected = self._rejected.setdefault(subject, _Rejected())
        rejected.rejections += 1
        answers = self._answers[url, subject.kind]
        if not rejected.rounds or answers > rejected.answers.get(url, answers):
            rejected.rounds += 1
            rejected.answers[url] = answers
        rejected.answers.setdefault(url, answers)

    def is_hopeless(self, subject: Subject) -> bool:
        """Tells whether no server accepts this text, although they work."""
        rejected = self._rejected.get(subject, _Rejected())
        return rejected.rejections >= REJECTIONS and rejected.rounds >= ROUNDS
