"""Verifier over OpenAI-compatible chat endpoints (vLLM, SGLang, hosted, `serve_verifier`).

One question per request, at temperature 0; P(yes) comes from the log-probs of the reply's first
token. The question is data in the user's turn, the instruction stands in the system's, and the
reply's text is read only with `text_fallback`: nothing that a question or a picture says changes
how an answer is read. A question with a control token is not sent (see `chat.control_tokens`).
`chat.replies` lists what is checked in a reply.
"""

import base64
import concurrent.futures
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import tenacity
from PIL import Image

from alphagrpo_jax.config import extra_fields
from alphagrpo_jax.rewards.verifiers.base import Answer, Rating, VerifierLoadError, checked_image
from alphagrpo_jax.rewards.verifiers.chat.client import ChatClient, ChatError
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import control_tokens
from alphagrpo_jax.rewards.verifiers.chat.replies import Candidate, Completion
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.spelling import (
    FALLBACK_TOKENS,
    MIN_MASS,
    RATINGS,
    normalize_word,
)
from alphagrpo_jax.runtime.errors import InputError, UsageError

RATING_CANDIDATES = 20  # the most that servers commonly allow
RATING_TOKENS = 3  # "10" may be two
MAX_UNSPLIT = 0.02  # share of "1" up to which it counts as 1 although it may begin "10"
POLL_SECONDS = 1.0  # while waiting for servers to start
_T = TypeVar("_T")


class OpenAIVerifier:
    """A `base.Verifier` over chat endpoints that serve one model."""

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str,
        *,
        api_key_env: str = "",
        concurrency: int = 8,
        question_seconds: float = 30.0,
        answer_seconds: float = 60.0,
        start_seconds: float = 60.0,
        must_serve: bool = True,
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
          concurrency: most requests at once.
          question_seconds: deadline of one request.
          answer_seconds: deadline of all of an image's questions, including retries.
          start_seconds: how long to wait for a first endpoint.
          must_serve: raise an error if none serves in time; False where other workers can answer
            meanwhile.
          max_attempts: most requests per question.
          outage_attempts: most requests per question while no server can be reached; with the
            pauses between them, 10 wait out an outage of about 100 s if the deadline allows.
          backoff_seconds: see `chat.client.ChatClient`.
          top_logprobs: candidates of the first token (AlphaGRPO: 5); spellings of yes and no
            beyond them do not count.
          text_fallback: if neither yes nor no is a candidate, a text that is exactly yes or no
            counts as 1 or 0, and one that is exactly a number as that rating.
          instruction: system turn of every yes/no question.
          min_mass: P(yes) + P(no) below which a question has no answer.
          read: token that is read, the first or the first behind the end of the thinking.
          max_tokens: most tokens of a reply with read="after_thinking".
          extra_body: further fields of every request, a JSON object as text.
        Raises:
          ValueError: wrong endpoints, model, key or numbers.
          VerifierLoadError: no endpoint answers in time, or one serves other models only.
        """
        if concurrency < 1 or not top_logprobs >= 1:
            raise UsageError(
                f"got concurrency={concurrency} and top_logprobs={top_logprobs}, expected at "
                "least 1 each"
            )
        self._client = ChatClient(
            endpoints,
            model,
            api_key_env=api_key_env,
            timeout=question_seconds,
            max_attempts=max_attempts,
            outage_attempts=outage_attempts,
            backoff_seconds=backoff_seconds,
        )
        self._answer_seconds, self._top = answer_seconds, top_logprobs
        self._text_fallback = text_fallback
        self._instruction, self._min_mass = instruction, min_mass
        self._read, self._max_tokens = read, max_tokens
        self._extra = extra_fields(extra_body)
        self._threads = concurrent.futures.ThreadPoolExecutor(concurrency, "question")
        try:
            self._await_servers(start_seconds, must_serve=must_serve)
        except VerifierLoadError:
            self.close()
            raise

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        """Answers in the questions' order; `image` is uint8[H, W, 3].

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """
        tokens = FALLBACK_TOKENS if self._text_fallback else 1

        def read(reply: Completion) -> Answer:
            return read_answer(reply, text_fallback=self._text_fallback, min_mass=self._min_mass)

        def fail(reason: str) -> Answer:
            return Answer(None, reason)

        options = {"max_tokens": tokens, "top_logprobs": self._top}
        return self._ask(image, questions, self._instruction, options, read, fail)

    def rate(self, image: np.ndarray, questions: Sequence[str]) -> list[Rating]:
        """Rates by the expected value over the numbers 0 to 10; see `read_rating`.

        Raises:
          ValueError: the image is not uint8[H, W, 3].
        """

        def read(reply: Completion) -> Rating:
            return read_rating(reply, text_fallback=self._text_fallback)

        def fail(reason: str) -> Rating:
            return Rating(None, reason)

        options = {"max_tokens": RATING_TOKENS, "top_logprobs": RATING_CANDIDATES}
        return self._ask(image, questions, RATE_INSTRUCTION, options, read, fail)

    def close(self) -> None:
        """Closes all connections."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def _ask(
        self,
        image: np.ndarray,
        questions: Sequence[str],
        instruction: str,
        options: dict[str, Any],
        read: Callable[[Completion], _T],
        fail: Callable[[str], _T],
    ) -> list[_T]:
        """Sends one request per question, concurrently, and returns the results in order.

        Args:
          image: uint8[H, W, 3].
          questions: Q.
          instruction: the system's turn.
          options: of `ChatClient.complete`.
          read: turns a reply into a result.
          fail: turns the reason of a failure into a result.
        """
        url, end = data_url(image), time.monotonic() + self._answer_seconds

        def ask(question: str) -> _T:
            # With few threads a question may have waited for others past the image's deadline.
            remaining = end - time.monotonic()
            if remaining <= 0:
                return fail(f"not asked within {self._answer_seconds:.3g} s")
            try:
                turns = messages(url, question, instruction)
            except InputError as error:
                return fail(str(error))
            try:
                return read(self._client.complete(turns, total_seconds=remaining, **options))
            except ChatError as error:
                return fail(str(error))

        return list(self._threads.map(ask, questions))

    def _await_servers(self, seconds: float, *, must_serve: bool) -> None:
        """Waits until an endpoint serves the model; the others may come later.

        Raises:
          VerifierLoadError: none does in time although one must, none can come to do so, or one
            serves other models only.
        """
        polling = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_NoServerYetError),
            stop=tenacity.stop_before_delay(seconds),
            wait=tenacity.wait_fixed(POLL_SECONDS),
            reraise=True,
        )
        try:
            polling(self._check_servers, time.monotonic() + seconds, seconds)
        except _NoServerYetError as error:
            if must_serve:
                raise VerifierLoadError(str(error)) from error

    def _check_servers(self, end: float, seconds: float) -> None:
        """Returns if an endpoint serves the model now.

        Args:
          end: of the waiting, `time.monotonic()`.
          seconds: of the waiting in all, for messages.
        Raises:
          _NoServerYetError: none does, but one may be starting.
          VerifierLoadError: an endpoint serves other models only, or each refuses.
        """
        failures = []
        # Even with no time left a reachable server must get the chance to be found.
        request_seconds = max(end - time.monotonic(), POLL_SECONDS)
        for url, models in self._client.models(request_seconds).items():
            if isinstance(models, ChatError):
                failures.append(models)
            elif self._client.model not in models:
                raise VerifierLoadError(
                    f"{url} serves {models[:5]}, expected {self._client.model!r} among its "
                    "models; set verifier.model to the served name"
                )
            else:
                return
        message = (
            f"no endpoint serves {self._client.model!r} after {seconds:.3g} s: "
            + "; ".join(str(error) for error in failures)
            + "; start a server (launch/verifiers.sh) or correct verifier.endpoints"
        )
        if any(error.retryable for error in failures):
            raise _NoServerYetError(message)
        raise VerifierLoadError(message)


class _NoServerYetError(Exception):
    """No endpoint serves the model, but one may be starting."""


def data_url(image: np.ndarray) -> str:
    """Encodes an image as a PNG, which is lossless, in a data URL.

    Raises:
      ValueError: the image is not uint8[H, W, 3].
    """
    file = io.BytesIO()
    Image.fromarray(checked_image(image)).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def messages(url: str, question: str, instruction: str) -> list[dict[str, Any]]:
    """Returns a chat: the instruction as the system's turn, image and question as the user's.

    Raises:
      ValueError: the question holds a control token, which a server would read as one.
    """
    if tokens := control_tokens(question):
        raise InputError(
            f"got the control tokens {tokens} in the question {question!r}; "
            "a question is plain text"
        )
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": content}]


def read_answer(reply: Completion, *, text_fallback: bool, min_mass: float = MIN_MASS) -> Answer:
    """Computes P(yes) / (P(yes) + P(no)) over the first token's candidates.

    Args:
      reply: with log-probs; all spellings of a word are summed.
      text_fallback: if neither is a candidate, a text that is exactly yes or no counts as 1 or 0.
      min_mass: P(yes) + P(no) below which neither counts as a candidate.
    """
    candidates = reply.candidates or ()
    yes, no = (_mass(candidates, word) for word in ("yes", "no"))
    if yes + no >= min_mass:
        return Answer(yes / (yes + no), mass=min(yes + no, 1.0))
    text = normalize_word(reply.text)
    if text_fallback and text in ("yes", "no"):
        return Answer(float(text == "yes"))
    tokens = [candidate.token[:40] for candidate in candidates[:5]]
    return Answer(None, f"neither yes nor no among the candidates {tokens} (mass {yes + no:.2g})")


def read_rating(reply: Completion, *, text_fallback: bool) -> Rating:
    """Computes the expected value over the numbers 0 to 10.

    Many tokenizers write "10" as "1", "0". Where "10" is no candidate, the mass of "1" is split
    between 1 and 10 by the second token's candidates. These are known only if "1" was the token
    generated; otherwise a small share of "1" counts as 1, and a larger one is a failure.

    Args:
      reply: with log-probs of the first token, and of the later ones if there are any.
      text_fallback: if no number can be read from the log-probs, a text that is exactly a number
        counts as that rating.
    """
    candidates = reply.candidates or ()
    mass = [_mass(candidates, number) for number in RATINGS]
    total = sum(mass)
    if total >= MIN_MASS:
        if mass[10] or not mass[1]:
            return Rating(_mean(mass))
        if reply.later and _begins_with_one(candidates):
            ten = mass[1] * _mass(reply.later[0], "0")
            ends = (c for c in reply.later[0] if not normalize_word(c.token)[:1].isdigit())
            mass[1], mass[10] = mass[1] * sum(math.exp(c.logprob) for c in ends), ten
            if sum(mass) >= MIN_MASS:
                return Rating(_mean(mass))
        elif mass[1] <= MAX_UNSPLIT * total:
            return Rating(_mean(mass))
    text = normalize_word(reply.text)
    if text_fallback and text in RATINGS:
        return Rating(float(text))
    return Rating(None, f"no number from 0 to 10 can be read (mass {total:.2g})")


def _begins_with_one(candidates: Sequence[Candidate]) -> bool:
    """Returns True if the greedy first token, i.e. the likeliest, is "1"."""
    return normalize_word(max(candidates, key=lambda c: c.logprob).token) == "1"


def _mass(candidates: Iterable[Candidate], word: str) -> float:
    """Sums the probabilities of the candidates that spell a word."""
    return sum(math.exp(c.logprob) for c in candidates if normalize_word(c.token) == word)


def _mean(mass: Sequence[float]) -> float:
    """Computes the expected number, where `mass[n]` is the mass of n."""
    return sum(value * share for value, share in enumerate(mass)) / sum(mass)
