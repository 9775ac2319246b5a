"""Puts questions about one image into one forward pass of the model."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.serving.requests import ImageQuestion, RequestError
from alphagrpo_jax.runtime.errors import InputError

MAX_OVERTAKEN_SECONDS = 0.2  # that the first in the queue lets larger groups pass
LINGER_SECONDS = 0.003  # wait of an idle model for further questions about the same image
_LOG = logging.getLogger(__name__)


class ReplyToken(NamedTuple):
    """A token of a reply and its likeliest candidates."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (id, log-prob), as many as were asked for


class GreedyReply(NamedTuple):
    """A greedy reply of the model."""

    tokens: tuple[ReplyToken, ...]  # at least one

    @property
    def ids(self) -> list[int]:
        """Returns the ids of the tokens."""
        return [token.id for token in self.tokens]


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A queued question and the future of its reply."""

    question: ImageQuestion
    outcome: asyncio.Future
    arrival: float  # time.monotonic()


AnswerFn = Callable[[list[ImageQuestion]], Sequence[GreedyReply]]


class Batcher:
    """Puts questions about the same image into one forward pass; one model, one thread.

    Attributes:
      questions: number of questions that the model answered.
      busy_seconds: time that the model took for them.
    """

    def __init__(self, answer: AnswerFn, *, max_batch: int, max_queue: int, seconds: float) -> None:
        """Starts nothing; `run` does the work.

        Args:
          answer: runs one pass over questions that may share it; called from one thread.
          max_batch: most questions per pass; 1 gives the same bits whatever arrives together.
          max_queue: most questions that wait; further ones are refused.
          seconds: how long a question may wait, since later no client would listen, and how long a
            pass may take until the model counts as stuck.
        """
        self._answer = answer
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

    async def ask(self, question: ImageQuestion) -> GreedyReply:
        """Waits for the model's reply.

        Raises:
          RequestError: the queue is full, the wait was too long, or the model failed.
        """
        if len(self._queue) >= self._max_queue:
            raise RequestError(
                f"{len(self._queue)} questions wait already; try again", status=503, kind="busy"
            )
        loop = asyncio.get_running_loop()
        waiting = _Waiting(question, loop.create_future(), time.monotonic())
        self._queue.append(waiting)
        self._arrived.set()
        # Not only when the next pass is taken: the running one may never end.
        timer = loop.call_later(self._seconds, self._refuse_as_late, waiting)
        try:
            return await waiting.outcome
        finally:
            timer.cancel()

    async def run(self) -> None:
        """Answers until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if not self._arrived.is_set():
                await self._arrived.wait()
                # A client sends an image's questions one by one: this lets them share a pass.
                # While a pass runs others gather without it.
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

    def _refuse_as_late(self, waiting: _Waiting) -> None:
        """Refuses a question that still waits; one that the model has taken is answered."""
        if waiting in self._queue and not waiting.outcome.done():
            self._queue.remove(waiting)
            message = f"waited for {self._seconds:.3g} s; try again"
            waiting.outcome.set_exception(RequestError(message, status=503, kind="late"))

    def _take(self) -> list[_Waiting]:
        """Removes the next pass's questions from the queue; refuses those that waited too long."""
        now = time.monotonic()
        for waiting in list(self._queue):
            if waiting.arrival + self._seconds <= now:
                self._refuse_as_late(waiting)
        self._queue = [waiting for waiting in self._queue if not waiting.outcome.done()]
        batch = self._queue[:1]
        if batch and batch[0].question.single:
            groups = [w.question.group for w in self._queue if w.question.single]
            group = batch[0].question.group
            # Full passes cost least; but nobody waits for long because others come in groups.
            if now - batch[0].arrival < MAX_OVERTAKEN_SECONDS:
                group = collections.Counter(groups).most_common(1)[0][0]
            alike = (w for w in self._queue if w.question.single and w.question.group == group)
            batch = list(alike)[: self._max_batch]
        batch_ids = set(map(id, batch))
        self._queue = [waiting for waiting in self._queue if id(waiting) not in batch_ids]
        if not self._queue:
            self._arrived.clear()
        return batch

    def _forward(self, questions: list[ImageQuestion]) -> Sequence[GreedyReply | RequestError]:
        """Returns a reply or an error for every question; runs on the model's thread."""
        try:
            return self._answer(questions)
        except RequestError as error:
            return [error] * len(questions)
        except InputError as error:
            if len(questions) == 1:
                return [RequestError(str(error))]
        except Exception as error:  # one failed pass must not end the server
            _LOG.exception("a forward pass of %d questions", len(questions))
            message = f"the model failed: {type(error).__name__}: {error}"
            return [RequestError(message, status=500, kind="model") for _ in questions]
        # One bad question must not fail those that came with it.
        return [self._forward([question])[0] for question in questions]


def answer(verifier: HFVerifier, questions: list[ImageQuestion]) -> list[GreedyReply]:
    """Runs one pass of a verifier; returns the reply to each question.

    Args:
      verifier: the model.
      questions: one, or several that are `single` and of one group.
    Raises:
      InputError: a question cannot be asked.
      FloatingPointError: the logits are not finite.
    """
    first = questions[0]
    if first.single:
        texts = [question.text for question in questions]
        logits = verifier.first_token_logits(first.image, texts, first.instruction)
        top = max(question.top_logprobs for question in questions)
        tokens = reply_tokens(logits.argmax(-1), logits, top)
        return [
            GreedyReply((token._replace(top=token.top[: question.top_logprobs]),))
            for token, question in zip(tokens, questions, strict=True)
        ]
    if first.prompt is None:
        arguments = (first.image, first.text, first.instruction, first.max_tokens)
        ids, logits = verifier.generate(*arguments)
    else:
        ids, logits = verifier.reply(first.image, first.prompt, first.max_tokens)
    return [GreedyReply(tuple(reply_tokens(ids, logits, first.top_logprobs)))]


def reply_tokens(ids: Tensor, logits: Tensor, top: int) -> list[ReplyToken]:
    """Reads tokens with their candidates.

    Args:
      ids: int[T].
      logits: float32[T, V].
      top: number of candidates.
    Raises:
      FloatingPointError: the logits are not finite.
    """
    # Single tokens may be masked by minus infinity, but not all, and none may be NaN.
    if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
        raise FloatingPointError("its logits are not finite")
    logprobs = logits.double().log_softmax(-1).float()
    values = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logprobs.shape[-1]))
    rows = zip(ids.tolist(), values, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        ReplyToken(token, value, tuple(zip(indices, top_values, strict=True)))
        for token, value, indices, top_values in rows
    ]
