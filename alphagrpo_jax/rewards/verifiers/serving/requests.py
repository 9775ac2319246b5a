"""Parses chat requests of ordinary clients.

A field that is null counts as left out. A field is read, or it cannot change the reply and is
ignored, or the request is refused with the field's name: nothing that would change an answer is
passed over. Replies are greedy, also without a temperature, although the protocol's default is 1.
"""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from alphagrpo_jax.rewards.verifiers.prompt_limits import PromptLimits
from alphagrpo_jax.rewards.verifiers.prompting import is_too_long
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.errors import InputError

MAX_PIXELS = 4096 * 4096
MAX_TEXT = 1_000_000  # letters of a request's texts; more would keep the tokenizer busy for long
DEFAULT_TOKENS = 16  # of a reply, where the request does not say
CACHED_BYTES = 256 * 2**20  # of decoded images

# Fields that cannot change a greedy reply to one client: who asks, how it is booked, and how tokens
# would be sampled.
IGNORED = frozenset(
    {
        "cache_salt", "include_reasoning", "metadata", "min_p", "parallel_tool_calls", "prediction",
        "priority", "prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier",
        "seed", "service_tier", "store", "top_k", "top_p", "user",
    }
)  # fmt: skip
# Fields that change the reply, and the values with which they do not. All others are refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop": ([],),
    "stop_token_ids": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}


class RequestError(Exception):
    """A request that is refused or failed.

    Attributes:
      status: of HTTP.
      kind: its name in the metrics.
      param: the field at fault, or None.
      code: its name in the protocol, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "bad_request",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code


class _Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)


class _ImageUrl(_Fields):
    url: str
    detail: Literal["auto", "high", "original"] | None = None  # the image is read whole


def _as_url(value: object) -> object:
    """Writes a plain text, as some clients send it, as an object with a URL."""
    return {"url": value} if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    """Writes a plain text as a list of one part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _ContentPart(_Fields):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[_ImageUrl | None, pydantic.BeforeValidator(_as_url)] = None
    uuid: str | None = None  # of a cache


class _Message(_Fields):
    role: Literal["system", "developer", "user"]
    content: Annotated[list[_ContentPart], pydantic.BeforeValidator(_as_parts)]
    name: str | None = None


class _StreamOptions(_Fields):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Fields):
    """The fields of a chat-completions request that this server reads."""

    model: str
    messages: list[_Message] = pydantic.Field(min_length=1)
    max_tokens: int | None = pydantic.Field(default=None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(default=None, ge=1)
    temperature: float | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = pydantic.Field(default=None, ge=0)


@dataclasses.dataclass(frozen=True)
class ImageQuestion:
    """A question about an image, ready for the model."""

    image: np.ndarray  # uint8[H, W, 3]
    text: str
    instruction: str  # "" for none
    prompt: str | None  # the complete prompt where text stands before the image, else None
    prompt_tokens: int  # with those of the image
    max_tokens: int
    top_logprobs: int  # candidates that are wanted of each token
    group: str  # equal for equal images and instructions

    @property
    def single(self) -> bool:
        """True if only the reply's first token is needed, so that others may share the batch."""
        return self.max_tokens == 1 and self.prompt is None


class RequestReader:
    """Parses requests; remembers the images of the last ones, as each question brings its own."""

    def __init__(self, limits: PromptLimits, *, max_logprobs: int, max_tokens: int) -> None:
        """Takes the model's limits, and those of `serve_verifier`'s flags."""
        self._limits, self._max_logprobs, self._max_tokens = limits, max_logprobs, max_tokens
        self._images = _ImageCache(CACHED_BYTES)

    def read(self, body: bytes) -> tuple[ChatRequest, ImageQuestion]:
        """Parses and checks a request; safe from several threads.

        Args:
          body: JSON.
        Returns:
          The request and its question.
        Raises:
          RequestError: this server cannot answer the request; the message says why.
        """
        request = _parse(body)
        self._check_options(request)
        *systems, user = request.messages
        if user.role != "user" or len(systems) > 1 or any(m.role == "user" for m in systems):
            raise RequestError(
                "messages: expected at most one of role system or developer, then one of role user",
                param="messages",
            )
        instruction = "".join(_texts(systems[0])) if systems else ""
        content, url = _user_content(user)
        if sum(len(item.get("text", "")) for item in content) + len(instruction) > MAX_TEXT:
            raise _too_long(f"the texts are longer than {MAX_TEXT} letters")
        image, digest = self._images.read(url)
        try:
            prompt = self._limits.prompt(content, instruction)
            prompt_tokens = self._limits.count(prompt, *image.shape[:2])
        except InputError as error:
            raise RequestError(str(error), param="messages") from error
        limit = request.max_completion_tokens or request.max_tokens or DEFAULT_TOKENS
        limit = min(limit, self._max_tokens)
        context = self._limits.context_tokens
        if is_too_long(prompt_tokens, context):
            raise _too_long(
                f"the prompt has {prompt_tokens} tokens with the image, and the model's context "
                f"{context}"
            )
        if context is not None:  # whatever is left, the prompt's last token gives a first one
            limit = min(limit, max(1, context - prompt_tokens))
        return request, ImageQuestion(
            image=image,
            text="".join(item.get("text", "") for item in content),
            instruction=instruction,
            prompt=None if content[0]["type"] == "image" else prompt,
            prompt_tokens=prompt_tokens,
            max_tokens=limit,
            top_logprobs=request.top_logprobs or 0,
            group=f"{digest} {instruction}",
        )

    def _check_options(self, request: ChatRequest) -> None:
        """Refuses options that are not supported.

        Raises:
          RequestError: one of them.
        """
        if request.temperature:
            raise RequestError(
                f"temperature: got {request.temperature}, expected 0; replies are greedy here",
                param="temperature",
            )
        if request.top_logprobs and not request.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if (request.top_logprobs or 0) > self._max_logprobs:
            raise RequestError(
                f"top_logprobs: got {request.top_logprobs}, at most {self._max_logprobs} are given "
                "here (--max-logprobs)",
                param="top_logprobs",
            )
        if request.stream_options is not None and not request.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")


class _ImageCache:
    """Keeps the images that were decoded last, by their URLs."""

    def __init__(self, size: int) -> None:
        """Takes the most bytes that URLs and pixels may have together."""
        self._size, self._used, self._lock = size, 0, threading.Lock()
        self._entries: collections.OrderedDict[str, tuple[np.ndarray, str]]
        self._entries = collections.OrderedDict()

    def read(self, url: str) -> tuple[np.ndarray, str]:
        """Decodes a data: URL, or remembers what it holds.

        Returns:
          Pixels uint8[H, W, 3], read as every command reads files; and the URL's digest.
        Raises:
          RequestError: another kind of URL (this server fetches nothing), or no image in it.
        """
        with self._lock:
            if url in self._entries:
                self._entries.move_to_end(url)
                return self._entries[url]
        if not url[:5].lower() == "data:":
            raise RequestError(
                f"image_url: got {url[:40]!r}..., expected data:image/png;base64,... (or jpeg, "
                "webp, ...); nothing is fetched from the network",
                param="messages",
            )
        try:
            image = np.asarray(images_lib.from_data_url(url, max_pixels=MAX_PIXELS))
        except images_lib.ImageError as error:
            raise RequestError(f"image_url: {error}", param="messages") from error
        entry = image, hashlib.sha256(url.encode()).hexdigest()
        with self._lock:
            if url not in self._entries:
                self._entries[url] = entry
                self._used += image.nbytes + len(url)
            while self._used > self._size and len(self._entries) > 1:
                old_url, (old_image, _) = self._entries.popitem(last=False)
                self._used -= old_image.nbytes + len(old_url)
        return entry


def _parse(body: bytes) -> ChatRequest:
    """Parses a request's JSON, and refuses fields that would change the reply.

    Raises:
      RequestError: it is not JSON or has a field, at any place, that is not supported.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = f"{where or 'the body'}: {first['msg']}"
        raise RequestError(message, param=where or None) from error
    for name, value in (request.model_extra or {}).items():
        if value is not None and name not in IGNORED and value not in NEUTRAL.get(name, ()):
            raise _unsupported(name, value)
    for message in request.messages:
        urls = (part.image_url for part in message.content)
        _refuse_extras("messages", message, *message.content, *urls)
    _refuse_extras("stream_options", request.stream_options)
    return request


def _refuse_extras(where: str, *items: object) -> None:
    """Refuses all fields that are not declared, unless they are null.

    Raises:
      RequestError: there is one.
    """
    for item in items:
        extras = item.model_extra if isinstance(item, pydantic.BaseModel) else None
        for name, value in (extras or {}).items():
            if value is not None:
                raise _unsupported(f"{where}: {name}", value)


def _unsupported(name: str, value: object) -> RequestError:
    neutral = NEUTRAL.get(name)
    if neutral is None:
        return RequestError(f"{name}: not supported here; leave it out", param=name)
    expected = " or ".join(repr(item) for item in neutral)
    return RequestError(
        f"{name}: got {str(value)[:100]}, which would change the reply and is not supported here; "
        f"leave it out (or give {expected})",
        param=name,
    )


def _too_long(reason: str) -> RequestError:
    return RequestError(
        f"messages: {reason}; expected a shorter question",
        kind="too_long",
        param="messages",
        code="context_length_exceeded",
    )


def _texts(message: _Message) -> Iterable[str]:
    """Returns the texts of a system message.

    Raises:
      RequestError: it holds something else.
    """
    texts = [item.text for item in message.content if item.type == "text" and item.text is not None]
    if len(texts) != len(message.content):
        raise RequestError("messages: the system's content must be text", param="messages")
    return texts


def _user_content(message: _Message) -> tuple[Sequence[dict[str, str]], str]:
    """Returns what the chat template gets of the user's turn, in the client's order, and the URL.

    Texts between which no image stands are joined as they are.

    Raises:
      RequestError: not exactly one image, or no text.
    """
    content: list[dict[str, str]] = []
    urls: list[str] = []
    for part in message.content:
        if part.type == "image_url":
            if part.image_url is None or part.text is not None:
                raise RequestError("messages: an image_url part needs image_url", param="messages")
            urls.append(part.image_url.url)
            content.append({"type": "image"})
        elif part.text is None or part.image_url is not None:
            raise RequestError("messages: a text part needs text", param="messages")
        elif content and content[-1]["type"] == "text":
            content[-1]["text"] += part.text
        else:
            content.append({"type": "text", "text": part.text})
    texts = [item for item in content if item["type"] == "text"]
    content = [item for item in content if item["type"] == "image" or item["text"]]
    if len(urls) != 1 or not any(item["text"].strip() for item in texts):
        raise RequestError(
            f"messages: got {len(urls)} images and {len(texts)} texts in the user's content, "
            "expected one image_url and a text that is not empty, in any order",
            param="messages",
        )
    return content, urls[0]
