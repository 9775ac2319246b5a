"""Verifier over OpenAI-compatible chat endpoints (vLLM, SGLang, hosted, `serve_verifier`).

One question per request, at temperature 0; P(yes) comes from the log-probs of one token of the
reply, the first or the first behind its thinking. The question is data in the user's turn, the
instruction stands in the system's, and the reply's text is read only with `text_fallback`: nothing
that a question or a picture says changes how an answer is read. A question with a control token is
not sent (see `chat.control_tokens`). `chat.replies` lists what is checked in a reply.

The requests about all images share one event loop, the limit `concurrency`, and the connections.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import tenacity

from alphagrpo_jax.rewards.verifiers import png
from alphagrpo_jax.rewards.verifiers.base import (
    Answer,
    Rating,
    TextResult,
    VerifierLoadError,
    VerifierRequest,
    checked_image,
)
from alphagrpo_jax.rewards.verifiers.chat import replies, thinking
from alphagrpo_jax.rewards.verifiers.chat.client import ChatClient
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import control_tokens
from alphagrpo_jax.rewards.verifiers.chat.errors import ChatError
from alphagrpo_jax.rewards.verifiers.chat.rejections import Subject
from alphagrpo_jax.rewards.verifiers.chat.replies import Completion, NoAnswerError
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.reading import read_answer, read_rating
from alphagrpo_jax.rewards.verifiers.spelling import FALLBACK_TOKENS, MIN_MASS
from alphagrpo_jax.runtime.errors import InputError, UsageError
from alphagrpo_jax.runtime.request_fields import extra_fields

RATING_CANDIDATES = 20  # the most that servers commonly allow
RATING_TOKENS = 3  # "10" may be two
POLL_SECONDS = 1.0  # while waiting for servers to start
AFTER_THINKING = replies.Wanted(thinking.answer_position)
ENCODERS = 2  # threads that encode images beside the event loop
# Stands for the image while a request's text is made. No text of ours or a user's has it.
_IMAGE = "\x00image\x00"

_LOG = logging.getLogger(__name__)


class _Question(NamedTuple):
    """A text that is asked about an image, and how its reply is read."""

    text: str
    instruction: str
    fields: dict[str, Any]  # of the request, beside model and messages
    read: Callable[[Completion], TextResult]


class OpenAIVerifier:
    """A `base.Verifier` over chat endpoints that serve one model.

    `answer` and `rate` wait for their replies; `start` does not, so that a pool has many images
    under way at once.

    Attributes:
      capacity: number of texts under way that keeps `concurrency` requests in flight, while images
        are encoded and failed requests wait.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str,
        *,
        api_key_env: str = "",
        concurrency: int = 64,
        question_seconds: float = 30.0,
        answer_seconds: float = 60.0,
        start_seconds: float = 60.0,
        must_serve: bool = True,
        wait: bool = True,
        max_attempts: int = 3,
        outage_attempts: int = 10,
        backoff_seconds: float = 0.2,
        top_logprobs: int = 5,
        text_fallback: bool = False,
        instruction: str = AUDIT_INSTRUCTION,
        min_mass: float = MIN_MASS,
        read: Literal["first", "after_thinking"] = "first",
        max_tokens: int = 2048,
        extra_body: str = "",
    ) -> None:
        """Waits until one of the endpoints serves the model.

        Args:
          endpoints: base URLs such as "http://host:8000/v1".
          model: the name by which they serve it.
          api_key_env: environment variable that holds the key; "" sends none.
          concurrency: most requests in flight, over all images and endpoints.
          question_seconds: deadline of one request, from the moment it is sent.
          answer_seconds: deadline of all requests about one question and the pauses between them,
            from the moment the first is sent; for `answer` and `rate`.
          start_seconds: how long to wait for a first endpoint.
          must_serve: raise an error if none does; False where others can answer meanwhile.
          wait: False leaves the waiting to a call of `await_servers`.
          max_attempts: most requests per question.
          outage_attempts: most requests per question while no server can be reached; with their
            pauses, 10 wait out an outage of about 100 s if the deadline allows.
          backoff_seconds: see `chat.client.ChatClient`.
          top_logprobs: candidates of the token that is read (AlphaGRPO: 5); spellings of yes and no
            beyond them do not count.
          text_fallback: if neither yes nor no is a candidate, a text that is exactly yes or no
            counts as 1 or 0, and one that is exactly a number as that rating.
          instruction: system turn of every yes/no question; "" for none.
          min_mass: P(yes) + P(no) below which a question has no answer.
          read: token that is read, the first or the first behind the end of the thinking.
          max_tokens: most tokens of a reply with read="after_thinking".
          extra_body: further fields of every request, a JSON object as text.
        Raises:
          ValueError: wrong endpoints, model, key or numbers.
          VerifierLoadError: no endpoint answers in time, or one serves other models only.
        """
        if min(concurrency, top_logprobs) < 1:
            got = f"got concurrency={concurrency} and top_logprobs={top_logprobs}"
            raise UsageError(f"{got}, expected at least 1 each")
        self._extra = extra_fields(extra_body)
        self._client = ChatClient(
            endpoints,
            model,
            api_key_env=api_key_env,
            timeout=question_seconds,
            max_attempts=max_attempts,
            outage_attempts=outage_attempts,
            backoff_seconds=backoff_seconds,
            concurrency=concurrency,
        )
        self.capacity = concurrency + concurrency // 2 + 1
        self._answer_seconds, self._top, self._must_serve = answer_seconds, top_logprobs, must_serve
        self._text_fallback, self._min_mass = text_fallback, min_mass
        self._instruction = instruction
        # With thinking a reply needs room for it, and without that a token or a few are enough.
        self._thinking_tokens = max_tokens if read == "after_thinking" else None
        self._wanted = AFTER_THINKING if read == "after_thinking" else replies.FIRST_TOKEN
        self._encoders = concurrent.futures.ThreadPoolExecutor(ENCODERS, "encode")
        if wait:
            with contextlib.ExitStack() as stack:
                stack.callback(self.close)
                self.await_servers(start_seconds)
                stack.pop_all()

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers in the questions' order; `image` is uint8[H, W, 3].

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """
        request = VerifierRequest(questions=tuple(questions))
        work = self._request(image, request, self._answer_seconds, lambda: None, stops=False)
        return [
            Answer(result.number, result.failure, result.mass, result.permanent)
            for result in self._client.run(work)
        ]

    def rate(self, image: np.ndarray, questions: Sequence[str]) -> list[Rating]:
        """Rates by the expected value over the numbers 0 to 10; see `read_rating`.

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """
        request = VerifierRequest(rated=tuple(questions))
        work = self._request(image, request, self._answer_seconds, lambda: None, stops=False)
        return [Rating(result.number, result.failure) for result in self._client.run(work)]

    def start(
        self,
        image: np.ndarray,
        request: VerifierRequest,
        seconds: float,
        on_answer: Callable[[], None],
    ) -> "concurrent.futures.Future[list[TextResult]]":
        """Asks everything about an image in the background, until a text has failed.

        Args:
          image: uint8[H, W, 3].
          request: the texts, at least one.
          seconds: deadline of all requests about one text, from the moment the first is sent.
          on_answer: called on the event loop's thread whenever a text has been answered.
        Returns:
          One result per text; behind a failure some may have neither number nor failure.
        """
        return self._client.start(self._request(image, request, seconds, on_answer, stops=True))

    def await_servers(self, seconds: float) -> None:
        """Waits until an endpoint serves the model; the others may come later.

        Without `must_serve` it does not wait, but looks once for servers of other models.

        Raises:
          VerifierLoadError: none does in time although one must, none can come to do so, or one
            serves other models only.
          CancelledError: the verifier was closed.
        """
        self._client.run(self._await_servers(seconds if self._must_serve else 0.0))

    def close(self) -> None:
        """Ends all requests and closes all connections. Any thread may call it, also twice."""
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    # On the client's event loop.

    async def _request(
        self,
        image: np.ndarray,
        request: VerifierRequest,
        seconds: float,
        on_answer: Callable[[], None],
        *,
        stops: bool,
    ) -> list[TextResult]:
        """Sends one request per text, concurrently, and returns the results in order.

        Args:
          image, request, seconds, on_answer: see `start`.
          stops: leave out what has not been answered when a text has failed.
        """
        loop = asyncio.get_running_loop()
        url = await loop.run_in_executor(self._encoders, encoded_url, image)
        tasks = [
            loop.create_task(self._ask(url, text, kind, seconds, on_answer))
            for text, kind in zip(request.texts, request.kinds, strict=True)
        ]
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(
                    pending, return_when=asyncio.FIRST_COMPLETED if stops else asyncio.ALL_COMPLETED
                )
                if stops and any(task.result().number is None for task in done):
                    break
            return [task.result() if task.done() else TextResult(None) for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(
        self, url: bytes, text: str, kind: str, seconds: float, on_answer: Callable[[], None]
    ) -> TextResult:
        """Asks one text about an image."""
        if kind == "score":
            return TextResult(None, "chat servers answer questions, they give no scores")
        question = self._yes_no(text) if kind == "question" else self._rating(text)
        try:
            pieces = self._pieces(url, question)
        except InputError as error:
            return TextResult(None, str(error), permanent=True)
        try:
            result = await self._client.ask(
                pieces,
                self._wanted,
                question.read,
                subject=Subject(kind, text),
                total_seconds=seconds,
            )
        except ChatError as error:
            return TextResult(None, str(error), permanent=error.permanent)
        on_answer()
        return result

    def _yes_no(self, text: str) -> _Question:
        """Describes a question that is answered by yes or no."""

        def read(reply: Completion) -> TextResult:
            answer = read_answer(reply, text_fallback=self._text_fallback, min_mass=self._min_mass)
            return _answered(answer.p_yes, answer.failure, answer.mass)

        tokens = FALLBACK_TOKENS if self._text_fallback else 1
        return _Question(text, self._instruction, self._fields(tokens, self._top), read)

    def _rating(self, text: str) -> _Question:
        """Describes a question that asks for a number."""

        def read(reply: Completion) -> TextResult:
            rating = read_rating(reply, text_fallback=self._text_fallback)
            return _answered(rating.value, rating.failure)

        fields = self._fields(RATING_TOKENS, RATING_CANDIDATES)
        return _Question(text, RATE_INSTRUCTION, fields, read)

    def _fields(self, tokens: int, candidates: int) -> dict[str, Any]:
        """Returns a request's fields, for a reply of so many tokens, with or without thinking."""
        return self._extra | {
            "max_tokens": self._thinking_tokens or tokens,
            "logprobs": True,
            "top_logprobs": candidates,
        }

    def _pieces(self, url: bytes, question: _Question) -> list[bytes]:
        """Returns the body of a request in pieces: the image's is shared by all its questions.

        Raises:
          InputError: the question cannot be asked; see `messages`.
        """
        turns = messages(_IMAGE, question.text, question.instruction)
        body = {"model": self._client.model, "messages": turns, "temperature": 0.0}
        head, _, tail = json.dumps(body | question.fields).partition(json.dumps(_IMAGE)[1:-1])
        return [head.encode(), url, tail.encode()]

    async def _await_servers(self, seconds: float) -> None:
        """See `await_servers`."""
        end = time.monotonic() + seconds

        def notice(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1 and self._must_serve and state.outcome:
                reason = state.outcome.exception()
                _LOG.warning("waiting up to %.0f s for a chat server: %s", seconds, reason)

        polling = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_NoServerYetError),
            stop=tenacity.stop_before_delay(seconds),
            wait=tenacity.wait_fixed(POLL_SECONDS),
            before_sleep=notice,
            reraise=True,
        )
        try:
            await polling(self._check_servers, end)
        except _NoServerYetError as error:
            if self._must_serve:
                raise VerifierLoadError(
                    f"no endpoint serves {self._client.model!r} after {seconds:.3g} s: {error}; "
                    "start a server (launch/verifiers.sh) or correct verifier.endpoints"
                ) from error

    async def _check_servers(self, end: float) -> None:
        """Returns if an endpoint serves the model now.

        Args:
          end: of the waiting, `time.monotonic()`.
        Raises:
          _NoServerYetError: none does, but one may be starting.
          VerifierLoadError: an endpoint serves other models only, or each refuses.
        """
        failures = []
        # Even with no time left a reachable server must get the chance to be found.
        request_seconds = max(end - time.monotonic(), POLL_SECONDS)
        for url, models in (await self._client.ask_models(request_seconds)).items():
            if isinstance(models, ChatError):
                failures.append(models)
            elif self._client.model not in models:
                raise VerifierLoadError(
                    f"{url} serves {models[:5]}, expected {self._client.model!r} among its "
                    "models; set verifier.model to the served name"
                )
            else:
                return
        message = "; ".join(str(error) for error in failures)
        if any(error.retryable for error in failures):
            raise _NoServerYetError(message)
        raise VerifierLoadError(
            f"no endpoint serves {self._client.model!r}: {message}; correct verifier.endpoints or "
            "verifier.api_key_env"
        )


class _NoServerYetError(Exception):
    """No endpoint serves the model, but one may be starting."""


def _answered(number: float | None, failure: str | None, mass: float | None = None) -> TextResult:
    """Returns the result that has been read from a reply.

    Raises:
      NoAnswerError: none could be read, which counts against the server.
    """
    if number is None:
        raise NoAnswerError(failure or "no answer")
    return TextResult(number, mass=mass)


def encoded_url(image: np.ndarray) -> bytes:
    """Encodes an image as `data_url` does, as it stands inside JSON."""
    # Base64 has no letter that JSON would escape.
    return b"data:image/png;base64," + base64.b64encode(png.encode(checked_image(image)))


def data_url(image: np.ndarray) -> str:
    """Encodes an image as a PNG, which is lossless, in a data URL.

    Raises:
      ValueError: the image is not uint8[H, W, 3].
    """
    return encoded_url(image).decode()


def messages(url: str, question: str, instruction: str) -> list[dict[str, Any]]:
    """Returns a chat: the instruction, if any, as the system's turn, then image and question.

    Raises:
      InputError: the question holds a control token, which a server would read as one, or half of
        a surrogate pair, which no server could read.
    """
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"got a question that UTF-8 cannot hold ({error}): {question!r}; mend its text"
        ) from error
    if tokens := control_tokens(question):
        raise InputError(
            f"got the control tokens {tokens} in the question {question!r}; "
            "a question is plain text"
        )
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    system = [{"role": "system", "content": instruction}] if instruction else []
    return [*system, {"role": "user", "content": content}]
