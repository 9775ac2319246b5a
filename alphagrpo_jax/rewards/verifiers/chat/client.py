"""Client of OpenAI-compatible chat endpoints (vLLM, SGLang, hosted, `serve_verifier`).

Every request has a deadline, which counts from the moment it is sent. A failure that may pass is
retried after an exponential back-off, on another server if there is one; a server that fails rests
for a while (`endpoints`); replies are parsed strictly (`replies`). A key never stands in an error,
a log or a repr, even if a server sends it back.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from alphagrpo_jax.rewards.verifiers.chat import keys, replies
from alphagrpo_jax.rewards.verifiers.chat.endpoints import Endpoint, Endpoints
from alphagrpo_jax.rewards.verifiers.chat.errors import ChatError, chat_error
from alphagrpo_jax.rewards.verifiers.chat.rejections import Rejections, Subject
from alphagrpo_jax.rewards.verifiers.chat.replies import Completion, NoAnswerError, Wanted
from alphagrpo_jax.rewards.verifiers.chat.transport import Transport
from alphagrpo_jax.runtime.backoff import Backoff
from alphagrpo_jax.runtime.errors import UsageError

MOST_REJECTIONS = 2  # of a request itself by servers in one call: another attempt seldom helps
_T = TypeVar("_T")


class ChatClient:
    """Gets chat completions from one of several servers; thread-safe."""

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str,
        *,
        api_key_env: str = "",
        timeout: float = 30.0,
        max_attempts: int = 4,
        outage_attempts: int | None = None,
        backoff_seconds: float = 0.2,
        concurrency: int | None = None,
    ) -> None:
        """Opens no connection yet.

        Args:
          endpoints: base URLs such as "http://host:8000/v1" of servers of the same model.
          model: the name by which the servers know it.
          api_key_env: environment variable that holds the key; "" sends none.
          timeout: seconds for one request, from connecting to the last byte.
          max_attempts: most requests for one call.
          outage_attempts: most requests for one call while servers cannot be reached or are busy,
            since an outage passes and a bad reply seldom does; None: `max_attempts`.
          backoff_seconds: pause before the second request, and rest of a server that failed once;
            both double with every further failure, with jitter.
          concurrency: most requests in flight, over all calls and servers; None: as many as there
            are calls.
        Raises:
          ValueError: wrong endpoints, or a key that is missing or malformed.
        """
        if not model or not isinstance(model, str):
            raise UsageError(f"got model {model!r}, expected the name that the servers know")
        if not timeout > 0 or max_attempts < 1:
            raise UsageError(
                f"got timeout={timeout} s and max_attempts={max_attempts}, expected a positive "
                "time and at least 1 attempt"
            )
        self.model = model
        self._endpoints = Endpoints(endpoints, rest_seconds=backoff_seconds)
        self._rejections = Rejections()
        self._timeout, self._max_attempts = timeout, max_attempts
        self._backoff = Backoff(backoff_seconds)
        self._outage_attempts = max(max_attempts, outage_attempts or 0)
        self._key = keys.read_key(api_key_env)
        self._slots = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="chat")
        self._thread.start()
        self._closing = threading.Lock()
        self._transport = self.run(self._open())

    def __repr__(self) -> str:
        urls = [endpoint.url for endpoint in self._endpoints.all]
        return f"ChatClient({urls}, {self.model!r})"

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_logprobs: int = 0,
        schema: Mapping[str, Any] | None = None,
        seed: int | None = None,
        total_seconds: float | None = None,
    ) -> Completion:
        """Asks for one completion; waits for it.

        Args:
          messages: in the form of the chat-completions API.
          max_tokens: most new tokens; None leaves it to the server.
          temperature: 0 is greedy.
          top_logprobs: number of candidates of each token to return with their log-probs.
          schema: JSON schema that the server should decode by (response_format).
          seed: of sampling, for servers that support it.
          total_seconds: see `ask`.
        Raises:
          ChatError: no usable reply within these attempts and this time.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
        }
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        if schema is not None:
            json_schema = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        if seed is not None:
            body["seed"] = seed
        wanted = replies.FIRST_TOKEN if top_logprobs else replies.TEXT
        pieces = [json.dumps(body).encode()]
        return self.run(self.ask(pieces, wanted, lambda reply: reply, total_seconds=total_seconds))

    async def ask(
        self,
        pieces: Sequence[bytes],
        wanted: Wanted,
        read: Callable[[Completion], _T],
        *,
        subject: Subject | None = None,
        total_seconds: float | None = None,
    ) -> _T:
        """Asks for one completion and returns what `read` makes of it; on the client's event loop.

        Args:
          pieces: of the request's body, one behind the other.
          wanted: what is read of the reply.
          read: turns the reply into the result; a `NoAnswerError` counts against the server.
          subject: tells requests about one text from those about others: without it no error is
            `permanent`.
          total_seconds: deadline of all requests of this call and the pauses between them, without
            the waits for a slot among `concurrency`; None: `timeout` for each of `max_attempts`.
        Raises:
          ChatError: no usable reply within these attempts and this time.
        """
        default = self._timeout * self._max_attempts
        seconds = default if total_seconds is None else total_seconds
        call = _Call(pieces, wanted, seconds, subject)
        while True:
            try:
                return await self._attempt(call, read)
            except ChatError as error:
                pause_seconds = self._pause_seconds(call)
                if self._is_last(error, call) or pause_seconds >= call.seconds_left:
                    if subject is not None and error.kind == "wrong request":
                        error.permanent = self._rejections.is_hopeless(subject)
                    raise
            await call.sleep(pause_seconds)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine on the event loop's thread and waits for its result."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread ends the request too
            raise

    def start(self, work: Coroutine[Any, Any, _T]) -> "concurrent.futures.Future[_T]":
        """Starts a coroutine on the event loop's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def models(self, seconds: float | None = None) -> dict[str, list[str] | ChatError]:
        """Returns by URL the names of the models that each endpoint serves, or the failure.

        Args:
          seconds: deadline, if shorter than the timeout of a request.
        """
        return self.run(self.ask_models(min(self._timeout, seconds or self._timeout)))

    def health(self) -> dict[str, bool]:
        """Returns by URL True for each endpoint that is not resting after a failure."""
        return self._endpoints.health()

    def close(self) -> None:
        """Ends all requests and closes all connections. May be called twice, and by any thread."""
        with self._closing:
            if self._loop.is_closed():
                return
            self.run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # On the event loop's thread.

    async def ask_models(self, seconds: float) -> dict[str, list[str] | ChatError]:
        """Returns what `models` does; on the client's event loop."""

        async def ask(url: str) -> list[str] | ChatError:
            try:
                body, _ = await self._transport.exchange(url, "GET", "/models", seconds)
                return replies.read_models(body)
            except replies.ChatReplyError as error:
                return self._error(url, str(error), kind="reply")
            except ChatError as error:
                return error

        urls = [endpoint.url for endpoint in self._endpoints.all]
        return dict(zip(urls, await asyncio.gather(*map(ask, urls)), strict=True))

    async def _open(self) -> Transport:
        return Transport(self._key)

    async def _end(self) -> None:
        """Cancels everything under way and closes the connections."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()

    def _is_last(self, error: ChatError, call: "_Call") -> bool:
        """Returns True if no other attempt can succeed, or the attempts are used up."""
        if error.kind == "wrong request":
            again = call.rejections < MOST_REJECTIONS
        else:
            # What one server refuses, e.g. for a wrong key, another may accept.
            elsewhere = error.kind == "refused" and len(self._endpoints.all) > 1
            again = error.retryable or elsewhere
        # An outage has a number of its own.
        outage = error.kind in ("connection", "busy")
        limit = self._outage_attempts if outage else self._max_attempts
        return not again or len(call.failures) >= limit

    def _pause_seconds(self, call: "_Call") -> float:
        """Returns the back-off before the next attempt; none where another server can take over."""
        if self._endpoints.has_other(call.failures[-1][0]):
            return 0.0
        return self._backoff.seconds(len(call.failures))

    async def _attempt(self, call: "_Call", read: Callable[[Completion], _T]) -> _T:
        """Sends one request to one server; waits for the end of its rest if all servers rest."""
        while True:
            async with self._slots:
                endpoint = self._endpoints.pick(call.last_endpoint)
                rest_seconds = endpoint.rests_until - time.monotonic()
                if rest_seconds <= 0:
                    return await self._ask_endpoint(endpoint, call, read)
            # Asleep, a request leaves its slot to others.
            if rest_seconds >= call.seconds_left:
                reason = call.reason or "they failed at other requests just now"
                error = ChatError(
                    f"no endpoint is available within the time left: {reason}",
                    kind="busy",
                    retryable=True,
                )
                call.failures.append((endpoint, error))
                raise error
            await call.sleep(rest_seconds)

    async def _ask_endpoint(
        self, endpoint: Endpoint, call: "_Call", read: Callable[[Completion], _T]
    ) -> _T:
        """Sends the request to this server, reads its reply, and books how that went."""
        started = time.monotonic()
        endpoint.in_flight += 1
        endpoint.served += 1
        try:
            result = await self._exchange(endpoint, call, read)
        except ChatError as error:
            if error.kind == "answer":
                # One hard question, asked again and again, says little about the server.
                if not call.was_unanswered_at(endpoint):
                    self._endpoints.unanswered(endpoint, started)
            elif error.kind != "wrong request":  # not the server's fault: it does not rest
                self._endpoints.failed(endpoint, started, error.retry_after)
            if call.subject and error.kind == "wrong request":
                self._rejections.rejected(call.subject, endpoint.url)
            elif call.subject and error.kind == "answer":
                self._rejections.accepted(call.subject, endpoint.url, answered=False)
            call.failures.append((endpoint, error))
            raise
        finally:
            endpoint.in_flight -= 1
            call.seconds_spent += time.monotonic() - started
        self._endpoints.succeeded(endpoint)
        if call.subject:
            self._rejections.accepted(call.subject, endpoint.url, answered=True)
        return result

    async def _exchange(
        self, endpoint: Endpoint, call: "_Call", read: Callable[[Completion], _T]
    ) -> _T:
        """Sends the request and turns every failure into a `ChatError`."""
        request_id = f"agrpo-{uuid.uuid4().hex}"
        seconds = min(self._timeout, call.seconds_left)
        try:
            body, headers = await self._transport.exchange(
                endpoint.url, "POST", "/chat/completions", seconds, call.pieces, request_id
            )
            reply = replies.read_completion(
                body,
                headers,
                request_id=request_id,
                model=self.model,
                endpoint=endpoint.url,
                wanted=call.wanted,
            )
            return read(reply)
        except NoAnswerError as error:
            raise self._error(endpoint.url, str(error), kind="answer") from None
        except replies.ChatReplyError as error:
            raise self._error(endpoint.url, str(error), kind="reply") from None
        except ChatError as error:
            if error.kind == "timeout" and seconds < self._timeout and call.reason:
                raise ChatError(
                    f"no reply within {call.total_seconds:.3g} s; the last failure: {call.reason}",
                    kind="timeout",
                    retryable=True,
                ) from None
            raise

    def _error(self, url: str, message: str, *, kind: str) -> ChatError:
        """Builds an error about a reply."""
        return chat_error(url, message, self._key, kind=kind, retryable=True)


class _Call:
    """State of one call: what is asked, and how its attempts went."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        wanted: Wanted,
        total_seconds: float,
        subject: Subject | None,
    ) -> None:
        self.pieces, self.wanted, self.total_seconds = pieces, wanted, total_seconds
        self.subject = subject
        self.seconds_spent = 0.0  # by requests and pauses
        self.failures: list[tuple[Endpoint, ChatError]] = []

    @property
    def seconds_left(self) -> float:
        """Seconds until the call's deadline, while a request or a pause is under way."""
        return self.total_seconds - self.seconds_spent

    @property
    def last_endpoint(self) -> Endpoint | None:
        """The server that failed last."""
        return self.failures[-1][0] if self.failures else None

    @property
    def reason(self) -> str:
        """Message of the last failure, "" if there was none."""
        return str(self.failures[-1][1]) if self.failures else ""

    @property
    def rejections(self) -> int:
        """Number of attempts at which a server rejected the request itself."""
        return sum(error.kind == "wrong request" for _, error in self.failures)

    def was_unanswered_at(self, endpoint: Endpoint) -> bool:
        """Returns True if this server has replied without an answer before."""
        return any(
            failed_endpoint is endpoint and error.kind == "answer"
            for failed_endpoint, error in self.failures
        )

    async def sleep(self, seconds: float) -> None:
        """Sleeps on the call's time."""
        self.seconds_spent += seconds
        await asyncio.sleep(seconds)
