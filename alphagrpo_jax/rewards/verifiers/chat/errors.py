"""Failures of chat requests."""

from alphagrpo_jax.rewards.verifiers.chat import keys
from alphagrpo_jax.runtime.errors import UserError

MAX_ERROR_CHARACTERS = 300


class ChatError(UserError, RuntimeError):
    """There is no usable reply; the message says why, without any key.

    Attributes:
      kind: "connection", "timeout", "busy", "status" (a server's fault), "refused" (this server
        rejects the request), "wrong request" (every server may), "reply" (malformed) or "answer"
        (a sound reply that does not answer the question).
      retryable: True if the same call may succeed later.
      retry_after: seconds that a busy server asked for.
      permanent: True if servers that work reject what the request is about: it never succeeds.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        retryable: bool,
        retry_after: float | None = None,
        permanent: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind, self.retryable, self.retry_after = kind, retryable, retry_after
        self.permanent = permanent


def chat_error(
    url: str,
    message: str,
    key: str,
    *,
    kind: str,
    retryable: bool,
    retry_after: float | None = None,
) -> ChatError:
    """Builds an error whose message is short, printable and holds no key.

    Args:
      url: of the server.
      message: says what is wrong.
      key: removed from the message.
      kind, retryable, retry_after: see `ChatError`.
    """
    text = keys.hidden(message, key)
    # A server's text may hold halves of surrogate pairs, which no terminal or file takes.
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) > MAX_ERROR_CHARACTERS:
        text = text[:MAX_ERROR_CHARACTERS] + "..."
    return ChatError(f"{url}: {text}", kind=kind, retryable=retryable, retry_after=retry_after)
