"""A language model as the decomposer asks it: messages in, text out, failures by kind."""

from collections.abc import Sequence
from typing import Literal, Protocol

import pydantic

from alphagrpo_jax.runtime.errors import UserError

Message = dict[str, str]  # "role": system, user or assistant; "content"

# "silent": the model cannot be reached, is busy, fails or lets nobody in, whatever the request.
# "refused": it will not have this request. "cut": its reply is too long. "failed": the rest.
Kind = Literal["silent", "refused", "cut", "failed"]


class LanguageModel(Protocol):
    """Anything that continues a chat."""

    def complete(
        self, messages: Sequence[Message], form: type[pydantic.BaseModel] | None = None
    ) -> str:
        """The reply to a chat, whole.

        Args:
          messages: the chat.
          form: that the reply should have; a model may make use of it or not.
        Raises:
          LanguageModelError: there is none.
        """
        ...


class LanguageModelError(UserError, RuntimeError):
    """No reply; the message says why, without secrets. `retryable`: another try may help."""

    def __init__(self, message: str, *, kind: Kind, retryable: bool) -> None:
        super().__init__(message)
        self.kind, self.retryable = kind, retryable
