"""Texts that chat servers read as control tokens: ends of turns, roles, images.

Servers turn them into the real tokens wherever they stand, also within a user's text. So a question
that holds one is refused, and what a policy wrote is quoted so that it can hold none.
"""

import json
import re
import unicodedata

CONTROL = re.compile(
    r"<\|[^<>]*\|>"  # Qwen, Llama 3, Phi, GLM, DeepSeek
    r"|</?(?:s|bos|eos|pad|unk|mask|image|img|video|audio|IMG_CONTEXT|box|quad|ref)>"
    r"|<(?:start|end)_of_\w+>|<\w+_soft_token>"  # Gemma
    r"|<<?/?SYS>>?"  # Llama 2
    # Mistral
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|IMG(?:_BREAK|_END)?)\]"
)
# Some tokenizers bring full-width forms into these first.
DELIMITERS = frozenset('<["\\')


def control_tokens(text: str) -> list[str]:
    """The control tokens in a text, as far as they are known."""
    return sorted(set(CONTROL.findall(unicodedata.normalize("NFKC", text))))


def quoted(text: str) -> str:
    """A text as a JSON string that nothing inside it can end, and in which no token can begin."""
    whole = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[<\[]|[^\x00-\x7f]", _escaped, whole)


def _escaped(match: re.Match) -> str:
    letter = match[0]
    harmless = DELIMITERS.isdisjoint(unicodedata.normalize("NFKC", letter))
    return letter if harmless else f"\\u{ord(letter):04x}"
