"""Client of OpenAI-compatible chat endpoints (vLLM, SGLang, hosted, `serve_verifier`).

Every request has a deadline. A failure that may pass is retried after an exponential back-off, on
another server if there is one; a server that fails rests for a while (`endpoints`); replies are
parsed strictly (`replies`). A key never stands in an error, a log or a repr, even if a server sends
it back.
"""

import asyncio
import email.utils
import json
import logging
import threading
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import httpx2
import tenacity

from alphagrpo_jax.rewards.verifiers.chat import keys, replies
from alphagrpo_jax.rewards.verifiers.chat.endpoints import Endpoint, Endpoints
from alphagrpo_jax.rewards.verifiers.chat.replies import Completion
from alphagrpo_jax.runtime.backoff import Backoff
from alphagrpo_jax.runtime.errors import UsageError, UserError

MAX_REPLY_BYTES = 16 * 2**20
MAX_ERROR_CHARACTERS = 300
BUSY = (429, 503)  # overloaded, but working
PASSING = (408, 409, 425, 429)  # 4xx after which the same request may succeed later
WRONG_REQUEST = (400, 405, 413, 415, 422)  # no server would accept the request
MAX_RETRY_AFTER = 86400.0  # seconds; a longer Retry-After is ignored

# It would log a server's text at INFO, before a key in it can be removed.
logging.getLogger("httpx2").setLevel(logging.WARNING)
_T = TypeVar("_T")


class ChatError(UserError, RuntimeError):
    """There is no usable reply; the message says why, without any key.

    Attributes:
      kind: "connection", "timeout", "busy", "status" (a server's fault), "refused" (this server
        rejects the request), "wrong request" (every server would) or "reply" (malformed).
      retryable: True if the same call may succeed later.
      retry_after: seconds that a busy server asked for.
    """

    def __init__(
        self, message: str, *, kind: str, retryable: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.retryable, self.retry_after = kind, retryable, retry_after


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
        self._timeout, self._max_attempts, self._backoff = timeout, max_attempts, backoff_seconds
        self._outage_attempts = max(max_attempts, outage_attempts or 0)
        self._key = keys.read_key(api_key_env)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="chat")
        self._thread.start()
        self._http = self._run(self._open())

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
          total_seconds: deadline of all requests of this call and the pauses between them; None:
            `timeout` for each of `max_attempts`.
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
        total = self._timeout * self._max_attempts if total_seconds is None else total_seconds
        return self._run(self._complete(body, total))

    def models(self, seconds: float | None = None) -> dict[str, list[str] | ChatError]:
        """Returns by URL the names of the models that each endpoint serves, or the failure.

        Args:
          seconds: deadline, if shorter than the timeout of a request.
        """
        return self._run(self._models(min(self._timeout, seconds or self._timeout)))

    def health(self) -> dict[str, bool]:
        """Returns by URL True for each endpoint that is not resting after a failure."""
        return self._endpoints.health()

    def close(self) -> None:
        """Closes all connections. May be called twice."""
        if self._loop.is_closed():
            return
        self._run(self._http.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # On the event loop's thread.

    async def _open(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx2.AsyncClient(
            headers=headers,
            timeout=None,  # deadlines cover whole requests, see `_exchange`
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100),
            mounts={"all://127.0.0.1": None, "all://localhost": None},  # past any proxy
        )

    async def _complete(self, body: dict[str, Any], total: float) -> Completion:
        """Retries until there is a reply, the attempts are used up, or the time is over."""
        failures: list[tuple[Endpoint, ChatError]] = []
        end = time.monotonic() + total
        out_of_time = tenacity.stop_before_delay(total)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._again),
            stop=lambda state: self._is_last(state) or out_of_time(state),
            wait=Backoff(self._backoff, longest_seconds=total),
            reraise=True,
        )
        try:
            async with asyncio.timeout(total):
                return await retrying(self._attempt, body, end, failures)
        except TimeoutError:
            reason = f"; the last failure: {failures[-1][1]}" if failures else ""
            raise ChatError(
                f"no reply within {total:.3g} s{reason}", kind="timeout", retryable=True
            ) from None

    def _again(self, error: BaseException) -> bool:
        """Returns True if another attempt may succeed."""
        if not isinstance(error, ChatError):
            return False
        # What one server refuses, e.g. for a wrong key, another may accept.
        return error.retryable or (error.kind == "refused" and len(self._endpoints.all) > 1)

    def _is_last(self, state: tenacity.RetryCallState) -> bool:
        """Returns True if the attempts are used up; an outage has a number of its own."""
        error = state.outcome.exception() if state.outcome else None
        outage = isinstance(error, ChatError) and error.kind in ("connection", "busy")
        limit = self._outage_attempts if outage else self._max_attempts
        return state.attempt_number >= limit

    async def _attempt(
        self, body: dict[str, Any], end: float, failures: list[tuple[Endpoint, ChatError]]
    ) -> Completion:
        """Sends one request to one server; waits for the end of its rest if all servers rest.

        Args:
          body: of the request.
          end: deadline of the call, `time.monotonic()`.
          failures: earlier attempts of this call; a failure of this one is appended.
        """
        endpoint = self._endpoints.pick(avoid=failures[-1][0] if failures else None)
        rest_seconds = endpoint.rests_until - time.monotonic()
        if rest_seconds > 0:
            # A sleep past the deadline would tell the caller later, and nothing else.
            if time.monotonic() + rest_seconds >= end:
                reason = failures[-1][1] if failures else "they failed at other requests just now"
                raise ChatError(
                    f"no endpoint is available within the time left: {reason}",
                    kind="busy",
                    retryable=True,
                )
            await asyncio.sleep(rest_seconds)
        started = time.monotonic()
        try:
            completion = await self._ask(endpoint, body)
        except ChatError as error:
            failures.append((endpoint, error))
            if error.kind != "wrong request":  # not the server's fault: it does not rest
                self._endpoints.failed(endpoint, started, error.retry_after)
            raise
        self._endpoints.succeeded(endpoint)
        return completion

    async def _ask(self, endpoint: Endpoint, body: dict[str, Any]) -> Completion:
        """Sends the request to this server and parses its reply."""
        request_id = f"agrpo-{uuid.uuid4().hex}"
        endpoint.in_flight += 1
        endpoint.served += 1
        try:
            content = json.dumps(body).encode()
            reply, headers = await self._exchange(
                endpoint.url, "POST", "/chat/completions", self._timeout, content, request_id
            )
        finally:
            endpoint.in_flight -= 1
        try:
            return replies.read_completion(
                reply,
                headers,
                request_id=request_id,
                model=self.model,
                endpoint=endpoint.url,
                want_candidates="top_logprobs" in body,
            )
        except replies.ChatReplyError as error:
            raise self._error(endpoint.url, str(error), kind="reply", retryable=True) from None

    async def _models(self, seconds: float) -> dict[str, list[str] | ChatError]:
        async def ask(url: str) -> list[str] | ChatError:
            try:
                body, _ = await self._exchange(url, "GET", "/models", seconds)
                return replies.read_models(body)
            except replies.ChatReplyError as error:
                return self._error(url, str(error), kind="reply", retryable=True)
            except ChatError as error:
                return error

        urls = [endpoint.url for endpoint in self._endpoints.all]
        return dict(zip(urls, await asyncio.gather(*map(ask, urls)), strict=True))

    async def _exchange(
        self,
        url: str,
        method: str,
        path: str,
        seconds: float,
        content: bytes = b"",
        request_id: str = "",
    ) -> tuple[bytes, Mapping[str, str]]:
        """Returns the body, without the key, and the headers of a successful reply.

        Raises:
          ChatError: no complete reply within `seconds`, or an error status.
        """
        headers = {"X-Request-Id": request_id} if request_id else {}
        if content:
            headers["Content-Type"] = "application/json"
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream(method, url + path, content=content, headers=headers) as reply,
            ):
                received = bytearray()
                async for chunk in reply.aiter_bytes():
                    received += chunk
                    if len(received) > MAX_REPLY_BYTES:
                        raise self._error(url, "a reply without end", kind="reply", retryable=True)
        except TimeoutError:
            message = f"no reply within {seconds:.3g} s"
            raise self._error(url, message, kind="timeout", retryable=True) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            # Not chained: a traceback would show the server's text, in which a key may stand.
            message = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise self._error(url, message, kind="connection", retryable=True) from None
        body = keys.hidden_in_reply(bytes(received), self._key)
        if not 200 <= reply.status_code < 300:
            raise self._status_error(url, reply, body)
        return body, reply.headers

    def _status_error(self, url: str, reply: httpx2.Response, body: bytes) -> ChatError:
        """Turns an error status into an error with its kind."""
        status = reply.status_code
        kind, retryable = "status", True
        if status in BUSY:
            kind = "busy"
        elif status in WRONG_REQUEST:
            kind, retryable = "wrong request", False
        elif status < 500 and status not in PASSING:
            kind, retryable = "refused", False
        message = f"HTTP status {status}: {replies.error_text(body)}".removesuffix(": ")
        after = _seconds(reply.headers.get("retry-after")) if kind == "busy" else None
        return self._error(url, message, kind=kind, retryable=retryable, retry_after=after)

    # Helpers.

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine on the event loop's thread and waits for its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread ends the request too
            raise

    def _error(self, url: str, message: str, **fields: Any) -> ChatError:
        """Builds an error whose message is short and holds no key."""
        text = keys.hidden(message, self._key)
        if len(text) > MAX_ERROR_CHARACTERS:
            text = text[:MAX_ERROR_CHARACTERS] + "..."
        return ChatError(f"{url}: {text}", **fields)


def _seconds(value: str | None) -> float | None:
    """Parses Retry-After, seconds or a date, to seconds; returns None if it is malformed."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if seconds < MAX_RETRY_AFTER else None
