"""Interface of chat models for the decomposer: messages in, text out, failures by kind."""

from collections.abc import Sequence
from typing import Literal, Protocol

import pydantic

from alphagrpo_jax.runtime.errors import UserError

Message = dict[str, str]  # "role": system, user or assistant; "content"

# "silent": no reply whatever the request: unreachable, busy, failing, or access is denied.
# "refused": the model rejects this request. "cut": the reply is too long. "failed": all others.
Kind = Literal["silent", "refused", "cut", "failed"]


class LanguageModel(Protocol):
    """Anything that continues a chat."""

    def complete(
        self, messages: Sequence[Message], form: type[pydantic.BaseModel] | None = None
    ) -> str:
        """Returns the complete reply to a chat.

        Args:
          messages: the chat.
          form: schema that the reply should have; a model may ignore it.
        Raises:
          LanguageModelError: there is no reply.
        """
        ...


class LanguageModelError(UserError, RuntimeError):
    """There is no reply; the message says why, without secrets.

    Attributes:
      kind: see `Kind`.
      retryable: True if the same call may succeed later.
    """

    def __init__(self, message: str, *, kind: Kind, retryable: bool) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.retryable = retryable
