"""Recognises errors that say that a device has too little memory."""

import re

# Memories of a TPU's core that no configuration's size fills: running out of them is a fault.
_SMALL_MEMORIES = re.compile(r"\b(vmem|smem|cmem|sflag)\b", re.IGNORECASE)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# By name: commands that need neither library do not import it for this. Of JAX and of PyTorch.
_CLASSES = ("JaxRuntimeError", "XlaRuntimeError", "OutOfMemoryError", "AcceleratorError")


def is_shortage(error: BaseException) -> bool:
    """Tells whether an error of compiling or running a function is about memory."""
    return type(error).__name__ in _CLASSES and needed_bytes(str(error)) is not None


def needed_bytes(message: str) -> float | None:
    """Reads from a compiler's error how much memory a function needs, its arguments included.

    Returns:
      Bytes; infinity where the message has no number; None where it is another error.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    hbm = r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
    if _SMALL_MEMORIES.search(message) and not re.search(hbm, message):
        return None
    if re.search(r"allocat\w+ [\d.]+", message):  # what was asked for last, not what is needed
        return float("inf")
    patterns = (
        hbm,
        r"total memory required for [\w ]+ \(([\d.]+)([KMGT])\)",
        r"requires? ([\d.]+)([KMGT])",
        r"([\d.]+)([KMGT])i?B?\b",
    )
    for pattern in patterns:
        if match := re.search(pattern, message):
            return float(match[1]) * _UNITS[match[2]]
    return float("inf")
