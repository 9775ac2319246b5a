"""Load balancer: the next request goes to the least loaded of the servers that work.

A server that fails rests for a while that doubles with every further failure; then one request
tries it. A server whose replies hold no answer fails as well once several in a row do, since
single questions may be hard for any server. Used by one event loop only, so nothing here is locked.
Times are `time.monotonic()`.
"""

import dataclasses
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from alphagrpo_jax.runtime.backoff import Backoff
from alphagrpo_jax.runtime.errors import UsageError

LONGEST_REST = 150.0  # in units of the first rest: 30 s by default
UNANSWERED = 3  # replies without an answer, in a row, from which on a server counts as failing


@dataclasses.dataclass(eq=False)
class Endpoint:
    """A server, its load and its failures."""

    url: str  # up to and including "/v1", without a slash at its end
    in_flight: int = 0  # requests that wait for a reply
    served: int = 0  # requests so far
    failures: int = 0  # in a row
    rests_until: float = 0.0
    last_failure: float = -1.0
    unavailable_until: float = 0.0  # what the server itself asked for
    unanswered: int = 0  # replies without an answer, in a row


class Endpoints:
    """A non-empty list of servers of the same model."""

    def __init__(self, urls: Sequence[str], *, rest_seconds: float) -> None:
        """Creates one `Endpoint` per URL.

        Args:
          urls: base URLs such as "http://host:8000/v1".
          rest_seconds: rest of a server after its first failure; doubles, with jitter of +-50%.
        Raises:
          ValueError: see `checked_urls`.
        """
        self.all = [Endpoint(url) for url in checked_urls(urls)]
        self._rest_seconds = rest_seconds
        self._backoff = Backoff(rest_seconds)

    def pick(self, avoid: Endpoint | None = None) -> Endpoint:
        """Returns the least loaded server that works, else the one whose rest ends first.

        Args:
          avoid: the server that failed at this request last; returned only if no other works.
        """
        now = time.monotonic()
        working = [endpoint for endpoint in self.all if endpoint.rests_until <= now]
        if not working:
            return min(self.all, key=lambda endpoint: endpoint.rests_until)
        preferred = [endpoint for endpoint in working if endpoint is not avoid] or working
        # After a rest one request tries the server; the others would only fail with it.
        tried = [
            endpoint for endpoint in preferred if not (endpoint.failures and endpoint.in_flight)
        ]
        return min(tried or preferred, key=lambda endpoint: (endpoint.in_flight, endpoint.served))

    def has_other(self, endpoint: Endpoint) -> bool:
        """Tells whether another server than this one works."""
        now = time.monotonic()
        return any(server is not endpoint and server.rests_until <= now for server in self.all)

    def succeeded(self, endpoint: Endpoint) -> None:
        """Books an answer: forgets the server's failures, and ends a rest that it did not ask for.

        The answer may be to a request that was sent before the server said that it is busy.
        """
        endpoint.failures, endpoint.unanswered = 0, 0
        endpoint.rests_until = endpoint.unavailable_until

    def unanswered(self, endpoint: Endpoint, started: float) -> None:
        """Books a sound reply without an answer; several in a row are a failure.

        Args:
          endpoint: the server.
          started: when the request was sent.
        """
        endpoint.unanswered += 1
        # A rest of the only server would help nobody: there is none that could answer instead.
        if endpoint.unanswered >= UNANSWERED and len(self.all) > 1:
            self.failed(endpoint, started, None)

    def failed(self, endpoint: Endpoint, started: float, retry_after: float | None) -> None:
        """Books a failure: the server rests.

        Args:
          endpoint: the server.
          started: when the request was sent.
          retry_after: seconds that the server itself asked for.
        """
        now = time.monotonic()
        # Of requests that were in flight together only the first failure counts: one hiccup would
        # look like many, and the rest would double each time.
        if started > endpoint.last_failure:
            endpoint.last_failure = now
            endpoint.failures += 1
            seconds = self._backoff.seconds(endpoint.failures)
            rest_seconds = min(seconds, LONGEST_REST * self._rest_seconds)
            endpoint.rests_until = max(now + rest_seconds, endpoint.unavailable_until)
        if retry_after is not None:
            endpoint.unavailable_until = max(endpoint.unavailable_until, now + retry_after)
            endpoint.rests_until = max(endpoint.rests_until, endpoint.unavailable_until)

    def health(self) -> dict[str, bool]:
        """Returns by URL True for each server that is not resting."""
        now = time.monotonic()
        return {endpoint.url: endpoint.rests_until <= now for endpoint in self.all}


def checked_urls(urls: Sequence[str]) -> list[str]:
    """Checks base URLs and removes slashes at their ends.

    Raises:
      ValueError: no URL, one twice, or one that is not http(s)://HOST[:PORT][/PATH].
    """
    if isinstance(urls, str) or not urls:
        raise UsageError(f"got endpoints {urls!r}, expected a list of at least 1 base URL")
    names = [checked_url(url) for url in urls]
    if len(set(names)) < len(names):
        raise UsageError(f"got endpoints {names}, expected each of them once")
    return names


def checked_url(url: str) -> str:
    """Checks a base URL and removes slashes at its end.

    Raises:
      ValueError: it is not http(s)://HOST[:PORT][/PATH]; one with a user or password is refused
        and not shown, since URLs stand in logs and configurations.
    """
    expected = "expected http(s)://HOST[:PORT][/PATH], e.g. http://127.0.0.1:8000/v1"
    if not isinstance(url, str):
        raise UsageError(f"got endpoint {url!r}, {expected}")
    try:
        address = urlsplit(url)
        port = address.port
    except ValueError as error:
        raise UsageError(f"got endpoint {url!r} ({error}), {expected}") from error
    if "@" in url or address.query or address.fragment:
        raise UsageError(
            "got an endpoint with a user, password, query or fragment in its URL, "
            f"{expected}; give a key by the environment variable that api_key_env names"
        )
    if address.scheme not in ("http", "https") or not address.hostname or port == 0:
        raise UsageError(f"got endpoint {url!r}, {expected}")
    return url.rstrip("/")
