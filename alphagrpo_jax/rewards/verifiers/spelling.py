"""Recognizes words and numbers in tokens, whatever model or server they come from."""

import unicodedata

MIN_MASS = 1e-3  # P(yes) + P(no) below which the model has not answered the question
RATINGS = tuple(str(value) for value in range(11))
FALLBACK_TOKENS = 8  # generated where a reply's text is read


def normalize_word(text: str) -> str:
    """Lower-cases a text and strips blanks and punctuation at both ends: " Yes." -> "yes"."""
    text = text.lower()
    # P, Z, C: punctuation, separators, control characters; the last two: tokenizers' blank marks.
    drop = {c for c in text if c.isspace() or unicodedata.category(c)[0] in "PZC" or c in "▁Ġ"}
    return text.strip("".join(drop))
