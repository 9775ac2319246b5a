"""Reads API keys from environment variables, and removes them from everything that is shown."""

import json
import os
import re

from alphagrpo_jax.config import check_key_name
from alphagrpo_jax.runtime.errors import UsageError

MIN_LENGTH = 5  # a shorter one would be cut out of words that merely contain it
HIDDEN = "[key]"


def read_key(name: str) -> str:
    """Reads the key from an environment variable; returns "" if `name` is "".

    Raises:
      ValueError: `name` is not the name of a variable, or the variable is not set or holds no key;
        the message shows neither the key nor anything that may be one.
    """
    check_key_name(name)
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(
            f"the environment variable {name}, which api_key_env names, is not set or blank; "
            "export it, or set api_key_env to '' for servers without a key"
        )
    if len(key) < MIN_LENGTH or not all("!" <= letter <= "~" for letter in key):
        raise UsageError(
            f"the environment variable {name} holds no key: expected at least {MIN_LENGTH} "
            "printable ASCII characters without blanks"
        )
    return key


def hidden(text: str, key: str) -> str:
    """Replaces a key in a text for display by `[key]`; `key` "" replaces nothing."""
    if not key:
        return text
    # A server may send it back with JSON escapes, inside a text that is not JSON.
    plain = _unescaped(text)
    return (plain if key in plain else text).replace(key, HIDDEN)


def hidden_in_reply(body: bytes, key: str) -> bytes:
    """Replaces a key in a server's reply by `[key]`, however JSON may spell its letters."""
    if not key:
        return body
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False)  # one spelling of each letter
    except (ValueError, RecursionError):
        return body.replace(key.encode(), HIDDEN.encode())
    return text.replace(json.dumps(key)[1:-1], HIDDEN).encode(errors="surrogatepass")


def _unescaped(text: str) -> str:
    """Resolves backslashes as JSON does, in any text, also in a fragment of JSON."""
    letters = re.sub(r"\\u00([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", letters)
