"""Request parsing, batching and replies of `serve_verifier`, behind its routes."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import hashlib
import io
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image

from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.runtime.errors import InputError

MAX_PIXELS = 4096 * 4096
MAX_TOKENS = 256  # of a reply
LINGER_SECONDS = 0.003  # wait for further questions about the same image
_LOG = logging.getLogger(__name__)
LEAST_LOGPROB = -9999.0  # stands for minus infinity in the API, whose JSON has none
DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,", re.IGNORECASE)


class RequestError(Exception):
    """A request that is refused or failed.

    Attributes:
      status: of HTTP.
      kind: its name in the metrics.
    """

    def __init__(self, message: str, *, status: int = 400, kind: str = "bad_request") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class _ImageUrl(pydantic.BaseModel):
    url: str


class _ContentPart(pydantic.BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | None = None


class _Message(pydantic.BaseModel):
    role: Literal["system", "user"]
    content: str | list[_ContentPart]


class ChatRequest(pydantic.BaseModel):
    """The fields of a chat-completions request that this server reads; others are ignored."""

    model: str
    messages: list[_Message] = pydantic.Field(min_length=1, max_length=2)
    max_tokens: int | None = pydantic.Field(default=None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(default=None, ge=1)
    temperature: float = 0.0
    n: Literal[1] = 1
    stream: Literal[False] = False
    logprobs: bool = False
    top_logprobs: int = pydantic.Field(default=0, ge=0)


@dataclasses.dataclass(frozen=True)
class ImageQuestion:
    """A question about an image, ready for the model."""

    image: np.ndarray  # uint8[H, W, 3]
    text: str
    instruction: str  # "" for none
    max_tokens: int
    group: str  # equal for equal images and instructions

    @property
    def single(self) -> bool:
        """True if only the reply's first token is needed, so that others may share the batch."""
        return self.max_tokens == 1


def read_request(body: bytes, *, max_logprobs: int) -> tuple[ChatRequest, ImageQuestion]:
    """Parses and checks a request.

    Args:
      body: JSON.
      max_logprobs: most candidates of a token that a request may ask for.
    Returns:
      The request and its question.
    Raises:
      RequestError: this server cannot answer the request; the message says why.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise RequestError(f"{where}: {first['msg']}") from error
    if request.temperature != 0:
        raise RequestError(
            f"temperature: got {request.temperature}, expected 0; replies are greedy here"
        )
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true")
    if request.top_logprobs > max_logprobs:
        raise RequestError(
            f"top_logprobs: got {request.top_logprobs}, at most {max_logprobs} are given here "
            "(--max-logprobs)"
        )
    *systems, user = request.messages
    if user.role != "user" or any(message.role != "system" for message in systems):
        raise RequestError("messages: expected at most one of role system, then one of role user")
    instruction = _text_of(systems[0]) if systems else ""
    content = [] if isinstance(user.content, str) else user.content
    if [item.type for item in content] != ["image_url", "text"]:
        raise RequestError("messages: expected an image_url and then a text in the user's content")
    image_part, text_part = content
    if image_part.image_url is None or text_part.text is None:
        raise RequestError("messages: a part lacks the field of its type")
    limit = request.max_completion_tokens or request.max_tokens or MAX_TOKENS
    image, digest = read_image(image_part.image_url.url)
    return request, ImageQuestion(
        image=image,
        text=text_part.text,
        instruction=instruction,
        max_tokens=min(limit, MAX_TOKENS),
        group=f"{digest} {instruction}",
    )


def _text_of(message: _Message) -> str:
    """Returns the text of a system message.

    Raises:
      RequestError: it holds something else.
    """
    if isinstance(message.content, str):
        return message.content
    texts = [item.text for item in message.content if item.type == "text" and item.text is not None]
    if len(texts) != len(message.content):
        raise RequestError("messages: the system's content must be text")
    return "".join(texts)


def read_image(url: str) -> tuple[np.ndarray, str]:
    """Decodes a data URL.

    Returns:
      Pixels uint8[H, W, 3], and the sha256 of the encoded image.
    Raises:
      RequestError: another kind of URL (this server fetches nothing), or no image in it.
    """
    match = DATA_URL.match(url)
    if match is None:
        raise RequestError(
            f"image_url: got {url[:40]!r}..., expected data:image/png;base64,... (or jpeg, webp); "
            "nothing is fetched from the network"
        )
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as file:
            # Before the pixels are decoded: a small file can hold a very large image.
            if file.width * file.height > MAX_PIXELS:
                raise RequestError(
                    f"image_url: got {file.width}x{file.height} pixels, at most {MAX_PIXELS} in all"
                )
            image = np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"image_url: no readable image ({error})") from error
    return image, hashlib.sha256(data).hexdigest()


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A queued question and the future of its reply."""

    question: ImageQuestion
    outcome: asyncio.Future
    deadline: float


class Batcher:
    """Puts questions about the same image into one forward pass; one model, one thread.

    Attributes:
      questions: number of questions that the model answered.
      busy_seconds: time that the model took for them.
    """

    def __init__(
        self, verifier: HFVerifier, *, max_batch: int, max_queue: int, seconds: float
    ) -> None:
        """Starts nothing; `run` does the work.

        Args:
          verifier: answers the questions.
          max_batch: most questions per pass; 1 gives the same bits whatever arrives together.
          max_queue: most questions that wait; further ones are refused.
          seconds: how long a question may wait, since later no client would listen, and how long a
            pass may take until the model counts as stuck.
        """
        self._verifier = verifier
        self._max_batch, self._max_queue, self._seconds = max_batch, max_queue, seconds
        self._queue: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "model")
        self.questions = 0
        self.busy_seconds = 0.0
        self._started: float | None = None  # beginning of the running pass

    def __len__(self) -> int:
        """Returns the number of waiting questions."""
        return len(self._queue)

    @property
    def stuck(self) -> bool:
        """True while one pass has been running for longer than a question may wait."""
        return self._started is not None and time.monotonic() - self._started > self._seconds

    async def ask(self, question: ImageQuestion) -> tuple[list[int], torch.Tensor]:
        """Waits for the model's reply.

        Returns:
          Ids of the reply's T tokens, and log-probs float32[T, V].
        Raises:
          RequestError: the queue is full, the wait was too long, or the model failed.
        """
        if len(self._queue) >= self._max_queue:
            raise RequestError(
                f"{len(self._queue)} questions wait already; try again", status=503, kind="busy"
            )
        outcome = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(question, outcome, time.monotonic() + self._seconds))
        self._arrived.set()
        return await outcome

    async def run(self) -> None:
        """Answers until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            # A client sends an image's questions one by one: this lets them share a pass.
            await asyncio.sleep(LINGER_SECONDS)
            batch = self._take()
            if not batch:
                continue
            self._started = time.monotonic()
            questions = [waiting.question for waiting in batch]
            outcomes = await loop.run_in_executor(self._thread, self._forward, questions)
            self.busy_seconds += time.monotonic() - self._started
            self._started = None
            for waiting, outcome in zip(batch, outcomes, strict=True):
                if waiting.outcome.done():
                    continue  # its client has disconnected
                if isinstance(outcome, Exception):
                    waiting.outcome.set_exception(outcome)
                else:
                    self.questions += 1
                    waiting.outcome.set_result(outcome)

    def _take(self) -> list[_Waiting]:
        """Removes the next pass's questions from the queue; refuses those that waited too long."""
        now = time.monotonic()
        for waiting in self._queue:
            if waiting.deadline <= now and not waiting.outcome.done():
                message = f"waited for {self._seconds:.3g} s; try again"
                waiting.outcome.set_exception(RequestError(message, status=503, kind="late"))
        self._queue = [waiting for waiting in self._queue if not waiting.outcome.done()]
        batch = self._queue[:1]
        if batch and batch[0].question.single:
            first = batch[0].question
            alike = (
                w for w in self._queue if w.question.single and w.question.group == first.group
            )
            batch = list(alike)[: self._max_batch]
        batch_ids = set(map(id, batch))
        self._queue = [waiting for waiting in self._queue if id(waiting) not in batch_ids]
        if not self._queue:
            self._arrived.clear()
        return batch

    def _forward(
        self, questions: list[ImageQuestion]
    ) -> Sequence[tuple[list[int], torch.Tensor] | RequestError]:
        """Returns a reply or an error for every question; runs on the model's thread."""
        try:
            return self._answer(questions)
        except InputError as error:
            if len(questions) == 1:
                return [RequestError(str(error))]
        except Exception as error:  # one failed pass must not end the server
            _LOG.exception("a forward pass of %d questions", len(questions))
            message = f"the model failed: {type(error).__name__}: {error}"
            return [RequestError(message, status=500, kind="model") for _ in questions]
        # One bad question must not fail those that came with it.
        return [self._forward([question])[0] for question in questions]

    def _answer(self, questions: list[ImageQuestion]) -> list[tuple[list[int], torch.Tensor]]:
        """Runs one pass; returns ids and log-probs float32[T, V] of each reply."""
        first = questions[0]
        if first.single:
            texts = [question.text for question in questions]
            logits = self._verifier.first_token_logits(first.image, texts, first.instruction)
            replies = [(row[None].argmax(-1), row[None]) for row in logits]
        else:
            replies = [
                self._verifier.generate(
                    first.image, first.text, first.instruction, first.max_tokens
                )
            ]
        outcomes = []
        for ids, logits in replies:
            # Single tokens may be masked by minus infinity, but not all, and none may be NaN.
            if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
                raise FloatingPointError("its logits are not finite")
            outcomes.append((ids.tolist(), logits.double().log_softmax(-1).float().cpu()))
        return outcomes


def completion(
    verifier: HFVerifier,
    request: ChatRequest,
    question: ImageQuestion,
    ids: list[int],
    logprobs: torch.Tensor,
    request_id: str,
) -> dict[str, Any]:
    """Builds the reply in the form of the API.

    Args:
      verifier: its tokenizer decodes the tokens.
      request: the client's request.
      question: the model's question.
      ids: of the reply's tokens, T >= 1.
      logprobs: float32[T, V].
      request_id: echoed, so that the client can tell its replies apart.
    """
    tokenizer = verifier.tokenizer
    ended = ids[-1] in tokenizer.all_special_ids or len(ids) < question.max_tokens
    choice: dict[str, Any] = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": tokenizer.decode(ids, skip_special_tokens=True),
        },
        "finish_reason": "stop" if ended else "length",
        "logprobs": None,
    }
    if request.logprobs:
        rows = zip(ids, logprobs, strict=True)
        content = [_token(tokenizer, token, row, request.top_logprobs) for token, row in rows]
        choice["logprobs"] = {"content": content}
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": {"completion_tokens": len(ids)},
    }


def _token(tokenizer: Any, token: int, row: torch.Tensor, top: int) -> dict[str, Any]:
    """Returns a token of the reply with its `top` likeliest candidates."""
    best = row.topk(min(top, len(row)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return _spelled(tokenizer, token, float(row[token])) | {
        "top_logprobs": [_spelled(tokenizer, index, value) for index, value in pairs]
    }


def _spelled(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    """Returns a token as the API spells it: text, log-prob and bytes."""
    text = tokenizer.decode([token])
    return {
        "token": text,
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(text.encode()),
    }


def request_id_of(header: str | None) -> str:
    """Returns the id that a client sent if it is a plain word, else a new one.

    It comes back in a header and stands in logs, so it may hold neither line breaks nor blanks.
    """
    if header is not None and re.fullmatch(r"[\w.-]{1,100}", header, re.ASCII):
        return header
    return uuid.uuid4().hex
