"""Detects and defuses texts that chat servers read as control tokens: ends of turns, roles, images.

Servers turn them into the real tokens wherever they stand, even inside a user's text. So a question
with one is refused, and a policy's text is quoted so that it cannot hold one.
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
# With one of these a token or the end of a string can begin. Some tokenizers first normalize
# full-width forms to them (NFKC), so letters are compared after normalization.
DELIMITERS = frozenset('<["\\')


def control_tokens(text: str) -> list[str]:
    """Returns the known control tokens in a text, sorted."""
    return sorted(set(CONTROL.findall(unicodedata.normalize("NFKC", text))))


def quoted(text: str) -> str:
    """Quotes a text as a JSON string that nothing in it can end and that holds no control token.

    The policy in training wrote it: whatever could sway a verifier would be learnt.
    """
    literal = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[<\[]|[^\x00-\x7f]", _escaped, literal)


def _escaped(match: re.Match) -> str:
    """Returns a letter as it is if it is harmless, else its JSON escape."""
    letter = match[0]
    harmless = DELIMITERS.isdisjoint(unicodedata.normalize("NFKC", letter))
    return letter if harmless else f"\\u{ord(letter):04x}"
