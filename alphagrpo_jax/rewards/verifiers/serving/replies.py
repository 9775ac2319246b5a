"""Builds replies in the form of the API, whole or as a stream of chunks."""

import functools
import itertools
import json
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

from alphagrpo_jax.rewards.verifiers.serving.batcher import GreedyReply, ReplyToken
from alphagrpo_jax.rewards.verifiers.serving.requests import ChatRequest, ImageQuestion

LEAST_LOGPROB = -9999.0  # stands for minus infinity in the API, whose JSON has none
CACHED_TOKENS = 100_000  # spelled ones


class ReplyWriter:
    """Writes replies with one model's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes the tokenizer that decodes replies."""
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._spelling = functools.lru_cache(CACHED_TOKENS)(self._spell)

    def completion(
        self, request: ChatRequest, question: ImageQuestion, reply: GreedyReply, request_id: str
    ) -> dict[str, Any]:
        """Returns the whole reply.

        Args:
          request: the client's.
          question: the model's question.
          reply: of the model.
          request_id: echoed, so that the client can tell its replies apart.
        """
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self._text(reply.ids), "refusal": None},
            "finish_reason": self._finish(question, reply),
            "logprobs": self._logprobs(request, reply.tokens),
        }
        head = self._head("chat.completion", request, request_id)
        return head | {"choices": [choice], "usage": _usage(question, reply)}

    def chunks(
        self, request: ChatRequest, question: ImageQuestion, reply: GreedyReply, request_id: str
    ) -> Iterator[bytes]:
        """Yields the reply as server-sent events: a chunk per token, then the end.

        The arguments are those of `completion`. Joined, the chunks' texts are its text.
        """
        options = request.stream_options
        has_usage = options is not None and bool(options.include_usage)
        head = self._head("chat.completion.chunk", request, request_id)
        if has_usage:
            head["usage"] = None

        def event(delta: dict, *, finish: str | None = None, logprobs: dict | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
            return _event(head | {"choices": [choice]})

        yield event({"role": "assistant", "content": ""})
        for token, text in zip(reply.tokens, self._pieces(reply.ids), strict=True):
            yield event({"content": text}, logprobs=self._logprobs(request, (token,)))
        yield event({}, finish=self._finish(question, reply))
        if has_usage:
            yield _event(head | {"choices": [], "usage": _usage(question, reply)})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str, request: ChatRequest, request_id: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{request_id}",
            "object": kind,
            "created": int(time.time()),
            "model": request.model,
        }

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _pieces(self, ids: list[int]) -> list[str]:
        """Cuts a reply's text by its tokens; of a letter of several tokens the last one has it."""
        text, cuts = self._text(ids), [0]
        alone = [self._text([token]) for token in ids]
        if "".join(alone) == text:  # mostly so, and the general way takes long for long replies
            return alone
        for count in range(1, len(ids)):
            beginning = self._text(ids[:count])
            same = next(
                (
                    i
                    for i, pair in enumerate(zip(beginning, text, strict=False))
                    if len({*pair}) > 1
                ),
                min(len(beginning), len(text)),
            )
            cuts.append(max(same, cuts[-1]))
        cuts.append(len(text))
        return [text[start:end] for start, end in itertools.pairwise(cuts)]

    def _finish(self, question: ImageQuestion, reply: GreedyReply) -> str:
        ended = reply.ids[-1] in self._special or len(reply.ids) < question.max_tokens
        return "stop" if ended else "length"

    def _logprobs(
        self, request: ChatRequest, tokens: tuple[ReplyToken, ...]
    ) -> dict[str, Any] | None:
        if not request.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: ReplyToken) -> dict[str, Any]:
        """Returns a token of the reply with its likeliest candidates."""
        top = [self._spelled(index, value) for index, value in token.top]
        return self._spelled(token.id, token.logprob) | {"top_logprobs": top}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        """Returns a token as the API spells it: text, log-prob and bytes."""
        text, text_bytes = self._spelling(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": text_bytes}

    def _spell(self, token: int) -> tuple[str, list[int]]:
        text = self._tokenizer.decode([token])
        return text, list(text.encode())


def _usage(question: ImageQuestion, reply: GreedyReply) -> dict[str, int]:
    counts = question.prompt_tokens, len(reply.ids)
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return dict(zip(names, (*counts, sum(counts)), strict=True))


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def request_id_of(header: str | None) -> str:
    """Returns the id that a client sent if it is a plain word, else a new one.

    It comes back in a header and stands in logs, so it may hold neither line breaks nor blanks.
    """
    if header is not None and re.fullmatch(r"[\w.-]{1,100}", header, re.ASCII):
        return header
    return uuid.uuid4().hex
