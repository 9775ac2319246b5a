"""A client of OpenAI-compatible chat endpoints (vLLM, SGLang, hosted, `serve_verifier`).

Every request has a deadline; what may be an accident is tried again after an exponential back-off,
on another server if there is one; a server that fails is left out for a while (`endpoints`); what
comes back is read strictly (`replies`). A key never stands in an error, a log or a repr, even if a
server sends it back.
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
from alphagrpo_jax.runtime.errors import UsageError, UserError

MAX_REPLY_BYTES = 16 * 2**20
MAX_ERROR_CHARACTERS = 300
BUSY = (429, 503)  # the server works, but not now
PASSING = (408, 409, 425, 429)  # of the 4xx: the same request may succeed later
WRONG_REQUEST = (400, 405, 413, 415, 422)  # no server would take it
MAX_RETRY_AFTER = 86400.0  # seconds; a server that asks for more is not believed

# It would log a server's own words at INFO, before a key in them can be cut out.
logging.getLogger("httpx2").setLevel(logging.WARNING)
_T = TypeVar("_T")


class ChatError(UserError, RuntimeError):
    """No usable reply; the message says why, without any key.

    Attributes:
      kind: "connection", "timeout", "busy", "status" (a server's fault), "refused" (this server
        will not have it), "wrong request" (no server would) or "reply" (not what it should be).
      retryable: whether the same call may succeed later.
    """

    def __init__(
        self, message: str, *, kind: str, retryable: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.retryable, self.retry_after = kind, retryable, retry_after


class ChatClient:
    """Chat completions from one of several servers; may be used by many threads at once."""

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
          model: the name that the servers know it by.
          api_key_env: environment variable that holds the key; "" sends none.
          timeout: seconds for one request, from connecting to the last byte.
          max_attempts: most requests for one call.
          outage_attempts: most requests for one call while servers cannot be reached or are busy,
            since an outage passes and a bad reply seldom does; None: `max_attempts`.
          backoff_seconds: before the second request, and the rest of a server that failed once;
            both double with every further failure, with jitter.
        Raises:
          ValueError: wrong endpoints, or a key that is missing or no key.
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
          top_logprobs: how many candidates of the first token must come with their log-probs.
          schema: a JSON schema that the server shall hold the text to (response_format).
          seed: of sampling, for servers that know it.
          total_seconds: for all requests of this call and the pauses between them; None:
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
            named = {"name": "reply", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        if seed is not None:
            body["seed"] = seed
        total = self._timeout * self._max_attempts if total_seconds is None else total_seconds
        return self._run(self._complete(body, total))

    def models(self, seconds: float | None = None) -> dict[str, list[str] | ChatError]:
        """What each endpoint says it serves (GET /models), or why it says nothing, by URL.

        Args:
          seconds: to wait for them, if less than the timeout of a request.
        """
        return self._run(self._models(min(self._timeout, seconds or self._timeout)))

    def health(self) -> dict[str, bool]:
        """Which endpoints are not left out because of a failure, by URL."""
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
        """Tries until there is a reply, the attempts are used up, or the time is over."""
        last: list[tuple[Endpoint, ChatError]] = []
        end = time.monotonic() + total
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._again),
            stop=tenacity.stop_any(self._is_last, tenacity.stop_before_delay(total)),
            wait=tenacity.wait_exponential_jitter(
                multiplier=self._backoff, max=total, jitter=self._backoff
            ),
            reraise=True,
        )
        try:
            async with asyncio.timeout(total):
                return await retrying(self._attempt, body, end, last)
        except TimeoutError:
            why = f"; the last failure: {last[-1][1]}" if last else ""
            raise ChatError(
                f"no reply within {total:.3g} s{why}", kind="timeout", retryable=True
            ) from None

    def _again(self, error: BaseException) -> bool:
        """Whether another attempt makes sense; one server's refusal is not another's."""
        if not isinstance(error, ChatError):
            return False
        return error.retryable or (error.kind == "refused" and len(self._endpoints.all) > 1)

    def _is_last(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception()
        outage = isinstance(error, ChatError) and error.kind in ("connection", "busy")
        limit = self._outage_attempts if outage else self._max_attempts
        return state.attempt_number >= limit

    async def _attempt(
        self, body: dict[str, Any], end: float, last: list[tuple[Endpoint, ChatError]]
    ) -> Completion:
        """One request to one server, after that server's rest if all of them rest."""
        endpoint = self._endpoints.pick(avoid=last[-1][0] if last else None)
        rest = endpoint.rests_until - time.monotonic()
        if rest > 0:
            if time.monotonic() + rest >= end:
                why = last[-1][1] if last else "they failed at other requests just now"
                raise ChatError(
                    f"no endpoint is available within the time left: {why}",
                    kind="busy",
                    retryable=True,
                )
            await asyncio.sleep(rest)
        started = time.monotonic()
        try:
            completion = await self._ask(endpoint, body)
        except ChatError as error:
            last.append((endpoint, error))
            if error.kind != "wrong request":
                self._endpoints.failed(endpoint, started, error.retry_after)
            raise
        self._endpoints.succeeded(endpoint)
        return completion

    async def _ask(self, endpoint: Endpoint, body: dict[str, Any]) -> Completion:
        request_id = f"agrpo-{uuid.uuid4().hex}"
        endpoint.in_flight += 1
        endpoint.served += 1
        try:
            sent = json.dumps(body).encode()
            content, headers = await self._exchange(
                endpoint.url, "POST", "/chat/completions", self._timeout, sent, request_id
            )
        finally:
            endpoint.in_flight -= 1
        try:
            return replies.read_completion(
                content,
                headers,
                request_id=request_id,
                model=self.model,
                endpoint=endpoint.url,
                want_candidates="top_logprobs" in body,
            )
        except replies.ReplyError as error:
            raise self._error(endpoint.url, str(error), kind="reply", retryable=True) from None

    async def _models(self, seconds: float) -> dict[str, list[str] | ChatError]:
        async def ask(url: str) -> list[str] | ChatError:
            try:
                body, _ = await self._exchange(url, "GET", "/models", seconds)
                return replies.read_models(body)
            except replies.ReplyError as error:
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
        """Body, without the key, and headers of a successful reply that comes within `seconds`.

        Raises:
          ChatError: as its kinds say.
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
                async for part in reply.aiter_bytes():
                    received += part
                    if len(received) > MAX_REPLY_BYTES:
                        raise self._error(url, "a reply without end", kind="reply", retryable=True)
        except TimeoutError:
            message = f"no reply within {seconds:.3g} s"
            raise self._error(url, message, kind="timeout", retryable=True) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            # Its text may hold what the server sent, so it is not chained either.
            message = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise self._error(url, message, kind="connection", retryable=True) from None
        body = keys.hidden_in_reply(bytes(received), self._key)
        if not 200 <= reply.status_code < 300:
            raise self._status_error(url, reply, body)
        return body, reply.headers

    def _status_error(self, url: str, reply: httpx2.Response, body: bytes) -> ChatError:
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
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller's thread ends the request too
            raise

    def _error(self, url: str, message: str, **fields: Any) -> ChatError:
        text = keys.hidden(message, self._key)
        if len(text) > MAX_ERROR_CHARACTERS:
            text = text[:MAX_ERROR_CHARACTERS] + "..."
        return ChatError(f"{url}: {text}", **fields)


def _seconds(value: str | None) -> float | None:
    """Retry-After, seconds or a date, in seconds; None for nonsense (the own back-off holds)."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if seconds < MAX_RETRY_AFTER else None
