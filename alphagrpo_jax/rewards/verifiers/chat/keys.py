"""API keys: where they come from, and that nothing shows them."""

import json
import os
import re

from alphagrpo_jax.config import check_key_name
from alphagrpo_jax.runtime.errors import UsageError

MIN_LENGTH = 5  # shorter ones could not be cut out of texts without harm
HIDDEN = "[key]"


def read_key(name: str) -> str:
    """The key in an environment variable, "" for no variable.

    Raises:
      ValueError: what is given is no name of a variable, or the variable is not set or cannot hold
        a key; the message shows neither the key nor what may be one.
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
    """A text that is only shown, with `[key]` in the place of a key, "" for none."""
    if not key:
        return text
    plain = _unescaped(text)
    return (plain if key in plain else text).replace(key, HIDDEN)


def hidden_in_reply(body: bytes, key: str) -> bytes:
    """A server's reply without a key in it, however JSON may have spelt its letters."""
    if not key:
        return body
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False)  # one spelling of each letter
    except (ValueError, RecursionError):
        return body.replace(key.encode(), HIDDEN.encode())
    return text.replace(json.dumps(key)[1:-1], HIDDEN).encode(errors="surrogatepass")


def _unescaped(text: str) -> str:
    """Backslashes resolved as JSON does, also where the text is none or a part of one."""
    letters = re.sub(r"\\u00([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", letters)
