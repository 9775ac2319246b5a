"""Recognizes words and numbers in tokens, whatever model or server they come from."""

import re
import unicodedata

MIN_MASS = 0.2  # P(yes) + P(no) below which the model has not answered the question
RATINGS = tuple(str(value) for value in range(11))
FALLBACK_TOKENS = 8  # generated where a reply's text is read
# What stands around the thinking of a reply, by family: Qwen, GLM and many others; Mistral;
# Cohere; Kimi; Seed.
THINKING_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
)
# What remains of a blank, a line feed, a tab and a carriage return in raw tokens.
_BLANK_MARKS = "▁ĠĊĉč"


def _byte_level_alphabet() -> dict[str, int]:
    """Returns the bytes that the characters of raw byte-level tokens stand for, as of GPT-2.

    Printable bytes stand for themselves, all others for characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's raw tokens of single bytes


def spelled(text: str) -> str:
    """Returns what raw tokens spell, their blanks included; any other text stays as it is."""
    return _decode_byte_level(text).replace("▁", " ")


def is_blank(token: str) -> bool:
    """Tells whether a token, raw or not, spells nothing but blanks: "ĊĊ", "▁", "<0x0A>", " "."""
    return not spelled(token).strip()


def normalize_word(text: str) -> str:
    """Lower-cases a text and strips blanks and punctuation at both ends: " Yes." -> "yes".

    Raw tokens are read as what they spell: "ĠYes", "ĊYes", "▁Yes" and "âĢľYes" are "yes".
    """
    text = _decode_byte_level(text)
    # P, Z, C: punctuation, separators, control characters. Lower-casing comes last: it would turn
    # the marks into letters.
    drop = {
        c for c in text if c.isspace() or unicodedata.category(c)[0] in "PZC" or c in _BLANK_MARKS
    }
    return text.strip("".join(drop)).lower()


def _decode_byte_level(text: str) -> str:
    """Returns what a raw byte-level token spells; any other text stays as it is."""
    if (byte := _BYTE_TOKEN.fullmatch(text)) and int(byte[1], 16) < 0x80:
        return chr(int(byte[1], 16))
    if not all(character in _BYTES for character in text):
        return text
    try:
        return bytes(_BYTES[character] for character in text).decode()
    except UnicodeDecodeError:
        return text
