"""HTTP requests to chat servers: each has a deadline, and its reply is complete and bounded."""

import asyncio
import email.utils
import os
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from urllib.parse import urlsplit

import aiohttp
import certifi
from aiohttp.http import HttpProcessingError

from alphagrpo_jax.rewards.verifiers.chat import keys, replies
from alphagrpo_jax.rewards.verifiers.chat.errors import ChatError, chat_error

MAX_REPLY_BYTES = 64 * 2**20
BUSY = (429, 503)  # overloaded, but working
PASSING = (408, 409, 425, 429)  # 4xx after which the same request may succeed later
WRONG_REQUEST = (400, 413, 422)  # it may be what the request asks that no server accepts
MAX_RETRY_AFTER = 86400.0  # seconds; a longer Retry-After is ignored
LOCAL = ("127.0.0.1", "localhost", "::1")  # reached past any proxy


class Transport:
    """Connections to chat servers, which are kept open and used again.

    Used on one event loop, on which it is made.
    """

    def __init__(self, key: str) -> None:
        """Opens no connection yet.

        Args:
          key: sent to every server; "" sends none.
        """
        self._key = key
        context = ssl.create_default_context()
        context.load_verify_locations(certifi.where())  # where the system brings no certificates
        self._connector = aiohttp.TCPConnector(limit=0, ssl=context)
        self._direct, self._proxied = (self._session(trust_env=trusts) for trusts in (False, True))

    def _session(self, *, trust_env: bool) -> aiohttp.ClientSession:
        """Opens a session, with the proxies that the environment names or without any."""
        return aiohttp.ClientSession(
            connector=self._connector,
            connector_owner=False,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            timeout=aiohttp.ClientTimeout(total=None),  # deadlines cover whole requests
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=trust_env,
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._direct.close()
        await self._proxied.close()
        await self._connector.close()

    async def exchange(
        self,
        url: str,
        method: str,
        path: str,
        seconds: float,
        pieces: Sequence[bytes] = (),
        request_id: str = "",
    ) -> tuple[bytes, Mapping[str, str]]:
        """Returns the body, without the key, and the headers of a successful reply.

        Args:
          url: of the server.
          method: of HTTP.
          path: behind the URL.
          seconds: deadline, from connecting to the last byte.
          pieces: of the request's body, sent one behind the other.
          request_id: sent as X-Request-Id, if any.
        Raises:
          ChatError: no complete reply within `seconds`, or an error status.
        """
        headers = {"X-Request-Id": request_id} if request_id else {}
        if pieces:
            # Known although the body is sent in pieces: servers would get it chunked otherwise.
            headers["Content-Length"] = str(sum(map(len, pieces)))
            headers["Content-Type"] = "application/json"
        session = self._direct if urlsplit(url).hostname in LOCAL else self._proxied
        try:
            async with (
                asyncio.timeout(seconds),
                session.request(
                    method,
                    url + path,
                    data=_sent(pieces) if pieces else None,
                    headers=headers,
                    allow_redirects=False,
                ) as reply,
            ):
                received = bytearray()
                async for chunk in reply.content.iter_any():
                    received += chunk
                    if len(received) > MAX_REPLY_BYTES:
                        raise self._error(url, "a reply without end", kind="reply", retryable=True)
        except TimeoutError:
            message = f"no reply within {seconds:.3g} s"
            raise self._error(url, message, kind="timeout", retryable=True) from None
        except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            # Not chained: a traceback would show the server's text, in which a key may stand.
            message = f"{type(error).__name__}: {_reason(error)}".removesuffix(": ")
            raise self._error(url, message, kind="connection", retryable=True) from None
        body = keys.hidden_in_reply(bytes(received), self._key)
        if not 200 <= reply.status < 300:
            raise self._status_error(url, reply.status, reply.headers, body)
        return body, reply.headers

    def _status_error(
        self, url: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> ChatError:
        """Turns an error status into an error with its kind."""
        kind, retryable = "status", True
        if status in BUSY:
            kind = "busy"
        elif status in WRONG_REQUEST:
            kind, retryable = "wrong request", False
        elif status < 500 and status not in PASSING:
            kind, retryable = "refused", False
        message = f"HTTP status {status}: {replies.error_text(body)}".removesuffix(": ")
        after = seconds_of(headers.get("retry-after")) if kind == "busy" else None
        return self._error(url, message, kind=kind, retryable=retryable, retry_after=after)

    def _error(
        self,
        url: str,
        message: str,
        *,
        kind: str,
        retryable: bool,
        retry_after: float | None = None,
    ) -> ChatError:
        """Builds an error without the key."""
        return chat_error(
            url, message, self._key, kind=kind, retryable=retryable, retry_after=retry_after
        )


async def _sent(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    """Yields the pieces of a body, uncopied: an image is part of many bodies."""
    for piece in pieces:
        yield piece


def _reason(error: Exception) -> str:
    """Returns why a connection failed, as the system says it: "Connection refused"."""
    if isinstance(error, aiohttp.ClientConnectorError) and (error.os_error.errno or 0) > 0:
        return os.strerror(error.os_error.errno or 0)
    return str(error)


def seconds_of(value: str | None) -> float | None:
    """Parses Retry-After, seconds or a date, to seconds; returns None if it is malformed."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except (ValueError, TypeError, IndexError, OverflowError):  # whatever the text makes of it
            return None
    return max(seconds, 0.0) if seconds < MAX_RETRY_AFTER else None
