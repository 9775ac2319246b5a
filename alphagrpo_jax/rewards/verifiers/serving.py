"""What `serve_verifier` does behind its routes: reads requests, batches them, writes replies."""

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
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image

from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.runtime.errors import InputError

MAX_PIXELS = 4096 * 4096
MAX_TOKENS = 256  # of a reply
LINGER_SECONDS = 0.003  # for questions about the same image that arrive together
_LOG = logging.getLogger(__name__)
LEAST_LOGPROB = -9999.0  # what the API says for a probability of zero
DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,", re.IGNORECASE)


class RequestError(Exception):
    """A request that is not answered; `status` is HTTP's, `kind` names it in the metrics."""

    def __init__(self, message: str, *, status: int = 400, kind: str = "bad_request") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class _ImageUrl(pydantic.BaseModel):
    url: str


class _Part(pydantic.BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | None = None


class _Message(pydantic.BaseModel):
    role: Literal["system", "user"]
    content: str | list[_Part]


class ChatRequest(pydantic.BaseModel):
    """The fields of a chat-completions request that count here; others are left alone."""

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
class Question:
    """One question about one image, ready for the model."""

    image: np.ndarray  # uint8[H, W, 3]
    text: str
    instruction: str  # "" for none
    max_tokens: int
    group: str  # equal for equal images and instructions

    @property
    def single(self) -> bool:
        """Whether the first token is all that is asked for, so that others may share its batch."""
        return self.max_tokens == 1


def read_request(body: bytes, *, max_logprobs: int) -> tuple[ChatRequest, Question]:
    """The request and its question.

    Args:
      body: JSON.
      max_logprobs: most candidates of a token that may be asked for.
    Raises:
      RequestError: it is not a request that can be answered here; the message says why.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
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
    parts = [] if isinstance(user.content, str) else user.content
    if [part.type for part in parts] != ["image_url", "text"]:
        raise RequestError("messages: expected an image_url and then a text in the user's content")
    image_part, text_part = parts
    if image_part.image_url is None or text_part.text is None:
        raise RequestError("messages: a part lacks the field of its type")
    limit = request.max_completion_tokens or request.max_tokens or MAX_TOKENS
    image, digest = read_image(image_part.image_url.url)
    return request, Question(
        image=image,
        text=text_part.text,
        instruction=instruction,
        max_tokens=min(limit, MAX_TOKENS),
        group=f"{digest} {instruction}",
    )


def _text_of(message: _Message) -> str:
    if isinstance(message.content, str):
        return message.content
    if any(part.type != "text" or part.text is None for part in message.content):
        raise RequestError("messages: the system's content must be text")
    return "".join(part.text for part in message.content)


def read_image(url: str) -> tuple[np.ndarray, str]:
    """Pixels uint8[H, W, 3] of a data URL, and a digest of it.

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
    question: Question
    outcome: asyncio.Future
    deadline: float


class Batcher:
    """Puts questions about the same image into one forward pass; one model, one thread."""

    def __init__(
        self, verifier: HFVerifier, *, max_batch: int, max_queue: int, seconds: float
    ) -> None:
        """Starts nothing; `run` does the work.

        Args:
          verifier: its model answers.
          max_batch: most questions per pass; 1 gives the same bits whatever arrives together.
          max_queue: questions that may wait; further ones are refused.
          seconds: that a question may wait, since later nobody would listen, and that a pass may
            take until the model counts as stuck.
        """
        self._verifier = verifier
        self._max_batch, self._max_queue, self._seconds = max_batch, max_queue, seconds
        self._queue: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "model")
        self.questions = 0  # that the model answered
        self.busy_seconds = 0.0
        self._started: float | None = None  # of the pass under way

    def __len__(self) -> int:
        """Questions that wait."""
        return len(self._queue)

    @property
    def stuck(self) -> bool:
        """Whether the model has been busy with one pass for longer than a question may wait."""
        return self._started is not None and time.monotonic() - self._started > self._seconds

    async def ask(self, question: Question) -> tuple[list[int], torch.Tensor]:
        """Ids of the reply's tokens and their log-probs float32[T, V].

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
        """Answers for ever; ends by being cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await asyncio.sleep(LINGER_SECONDS)
            batch = self._take()
            if not batch:
                continue
            self._started = time.monotonic()
            questions = [waiting.question for waiting in batch]
            found = await loop.run_in_executor(self._thread, self._forward, questions)
            self.busy_seconds += time.monotonic() - self._started
            self._started = None
            for waiting, outcome in zip(batch, found, strict=True):
                if waiting.outcome.done():
                    continue  # its client is gone
                if isinstance(outcome, Exception):
                    waiting.outcome.set_exception(outcome)
                else:
                    self.questions += 1
                    waiting.outcome.set_result(outcome)

    def _take(self) -> list[_Waiting]:
        """The questions of the next pass; those that waited for too long are refused."""
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
        taken = set(map(id, batch))
        self._queue = [waiting for waiting in self._queue if id(waiting) not in taken]
        if not self._queue:
            self._arrived.clear()
        return batch

    def _forward(
        self, questions: list[Question]
    ) -> list[tuple[list[int], torch.Tensor] | RequestError]:
        """On the model's thread: an outcome for every question, whatever happens."""
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

    def _answer(self, questions: list[Question]) -> list[tuple[list[int], torch.Tensor]]:
        first = questions[0]
        if first.single:
            texts = [question.text for question in questions]
            logits = self._verifier.first_token_logits(first.image, texts, first.instruction)
            rows = [(None, row[None]) for row in logits]
        else:
            rows = [
                self._verifier.generate(
                    first.image, first.text, first.instruction, first.max_tokens
                )
            ]
        outcomes = []
        for ids, logits in rows:
            if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
                raise FloatingPointError("its logits are not finite")
            ids = logits.argmax(-1) if ids is None else ids
            outcomes.append((ids.tolist(), logits.double().log_softmax(-1).float().cpu()))
        return outcomes


def completion(
    verifier: HFVerifier,
    request: ChatRequest,
    question: Question,
    ids: list[int],
    logprobs: torch.Tensor,
    request_id: str,
) -> dict[str, Any]:
    """The reply in the form of the API.

    Args:
      verifier: whose tokenizer spells the tokens.
      request: what was asked for.
      question: what the model was asked.
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
    best = row.topk(min(top, len(row)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return _spelled(tokenizer, token, float(row[token])) | {
        "top_logprobs": [_spelled(tokenizer, index, value) for index, value in pairs]
    }


def _spelled(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {
        "token": text,
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(text.encode()),
    }


def request_id_of(sent: str | None) -> str:
    """The id that a client sent, if it is a plain word, else a new one."""
    if sent is not None and re.fullmatch(r"[\w.-]{1,100}", sent, re.ASCII):
        return sent
    return uuid.uuid4().hex
