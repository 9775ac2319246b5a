"""Tells texts apart that can be written, and makes others writable.

JSON escapes and a command line's bytes can hold halves of characters (lone surrogates). UTF-8
cannot: such a text can be neither written, nor printed, nor tokenized.
"""


def is_writable(text: str) -> bool:
    """Tells whether UTF-8 can hold a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Replaces what UTF-8 cannot hold by its escape, so that the text can be shown."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
