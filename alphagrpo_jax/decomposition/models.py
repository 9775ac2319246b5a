"""Opens the language model that decomposes prompts: behind endpoints, or local."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import pydantic

from alphagrpo_jax.decomposition import schemas
from alphagrpo_jax.rewards.verifiers.chat import client
from alphagrpo_jax.rewards.verifiers.chat.base import (
    Kind,
    LanguageModel,
    LanguageModelError,
    Message,
)
from alphagrpo_jax.runtime.errors import UsageError

# Of `chat.ChatError`, as far as it is not the server that is away.
_KINDS: dict[str, Kind] = {"wrong request": "refused", "reply": "failed"}


@dataclasses.dataclass(frozen=True)
class LanguageModelOptions:
    """Options of a language model behind endpoints or of a local one."""

    model: str = ""  # the name that the servers know it by
    api_key_env: str = ""  # environment variable that holds the key; "" sends none
    timeout_seconds: float = 120.0  # of one request
    max_tokens: int = 4096  # of one reply
    device: str = "cpu"  # of a local model
    dtype: str = "auto"  # of its weights
    json_schema: bool = False  # whether servers shall hold replies to their form while decoding


class ServedModel:
    """A model behind one or more OpenAI-compatible endpoints; for many threads at once."""

    def __init__(self, endpoints: Sequence[str], options: LanguageModelOptions) -> None:
        """Opens no connection yet.

        Raises:
          UsageError: wrong endpoints, no model, or the key is not set.
        """
        # One attempt only: `limits.PatientModel` repeats, and every request keeps the pace.
        self._client = client.ChatClient(
            endpoints,
            options.model,
            api_key_env=options.api_key_env,
            timeout=options.timeout_seconds,
            max_attempts=1,
        )
        self._max_tokens, self._json_schema = options.max_tokens, options.json_schema

    def complete(
        self, messages: Sequence[Message], form: type[pydantic.BaseModel] | None = None
    ) -> str:
        """Continues a chat greedily, see `chat.base.LanguageModel`."""
        schema = schemas.json_schema(form) if form is not None and self._json_schema else None
        try:
            reply = self._client.complete(messages, max_tokens=self._max_tokens, schema=schema)
        except client.ChatError as error:
            kind = _KINDS.get(error.kind, "silent")
            raise LanguageModelError(str(error), kind=kind, retryable=error.retryable) from error
        if reply.finish_reason == "length":
            raise LanguageModelError(
                f"the reply was cut at {self._max_tokens} tokens; raise --max-tokens",
                kind="cut",
                retryable=False,
            )
        return reply.text

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


@contextlib.contextmanager
def open_model(llm: str, options: LanguageModelOptions) -> Iterator[LanguageModel]:
    """Opens the language model that a description names, and closes it with the context.

    Args:
      llm: "openai:URL[,URL...]" or "hf:FOLDER".
      options: see there.
    Raises:
      UsageError: another description, or options that do not fit it.
      LanguageModelError: a local model cannot be loaded.
    """
    kind, _, location = llm.partition(":")
    if kind == "openai" and location:
        served = ServedModel(location.split(","), options)
        try:
            yield served
        finally:
            served.close()
    elif kind == "hf" and location:
        # Imported here, so that no other kind has to wait for torch.
        from alphagrpo_jax.rewards.verifiers.chat.local import HFChat

        yield HFChat(
            location, device=options.device, dtype=options.dtype, max_tokens=options.max_tokens
        )
    else:
        raise UsageError(f"got --llm {llm!r}, expected openai:URL[,URL...], hf:FOLDER or shapes")
