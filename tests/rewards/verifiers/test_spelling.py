"""Words are recognized in tokens as models print them and as servers send them, raw."""

import pytest

from alphagrpo_jax.rewards.verifiers.spelling import normalize_word


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (" Yes.", "yes"),
        ("NO!\n", "no"),
        ("**No**", "no"),
        ("\u2581yes", "yes"),
        ("\u2581Yes", "yes"),
        ("\u2581\u2581No", "no"),
        ("\u0120Yes", "yes"),  # raw byte-level: a blank
        ("\u010aYes", "yes"),  # a line feed
        ("\u010a\u010aNO", "no"),
        ("\u010d\u010aNo", "no"),  # a carriage return and a line feed
        ("\u0109yes", "yes"),  # a tab
        ("\u0120yes,", "yes"),
        ("\u00e2\u0122\u013eYes", "yes"),  # a typographic quotation mark's three bytes
        ("\u0120\u2581No", "no"),  # both kinds
        ("\u00e4\u00bb\u012c", "\u4eca"),  # a Chinese word's bytes
        ("\u0418\u0414\u0410", "\u0438\u0434\u0430"),
        ("s\u00ed", "s\u00ed"),  # printable bytes that are no text
        ("y es", "y es"),
        ("yes sir", "yes sir"),
        ("\u0120", ""),
        ("...", ""),
        ("", ""),
    ],
)
def test_words_are_stripped_and_lower_case(text, word):
    assert normalize_word(text) == word
