"""Load balancer: the next request goes to the least loaded of the servers that work.

A server that fails rests for a while that doubles with every further failure; then it is tried
again. Used by one event loop only, so nothing here is locked. Times are `time.monotonic()`.
"""

import dataclasses
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from alphagrpo_jax.runtime.backoff import Backoff
from alphagrpo_jax.runtime.errors import UsageError

LONGEST_REST = 150.0  # in units of the first rest: 30 s by default


@dataclasses.dataclass(eq=False)
class Endpoint:
    """A server, its load and its failures."""

    url: str  # up to and including "/v1", without a slash at its end
    in_flight: int = 0  # requests that wait for a reply
    served: int = 0  # requests so far
    failures: int = 0  # in a row
    rests_until: float = 0.0
    last_failure: float = -1.0


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
        preferred = [endpoint for endpoint in working if endpoint is not avoid]
        if working:
            return min(preferred or working, key=lambda e: (e.in_flight, e.served))
        return min(self.all, key=lambda endpoint: endpoint.rests_until)

    def succeeded(self, endpoint: Endpoint) -> None:
        """Books an answer: ends the server's rest and forgets its failures."""
        endpoint.failures, endpoint.rests_until = 0, 0.0

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
            endpoint.rests_until = now + min(seconds, LONGEST_REST * self._rest_seconds)
        if retry_after is not None:
            endpoint.rests_until = max(endpoint.rests_until, now + retry_after)

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
