"""Random numbers of a run on the host: one stream for each purpose, no two of which coincide."""

import enum

import numpy as np

WORD_BITS, TAG_BITS = 32, 8  # of a word of numpy's entropy, and of the tag in the last one


class Stream(enum.IntEnum):
    """Purposes of random numbers; the value is the tag that their generators carry."""

    ORDER = 0  # of the prompts, by epoch
    TASKS = 1  # of a mixed run, by update
    INITIAL_IMAGE = 2  # to be repaired, by position in the data


def generator(
    stream: Stream, *, seed: int, number: int, task_number: int = 0
) -> np.random.Generator:
    """Returns the generator of one purpose.

    Its entropy has exactly four words: numpy fills shorter ones up with zeros, so that without the
    padding `[seed, 1]` and `[seed, 1, 0]` would be one stream.

    Args:
      stream: the purpose.
      seed: of the run, in [0, 2^32).
      number: of the epoch, the update or the position, in [0, 2^64).
      task_number: of the task among those of the run, in [0, 2^24).
    Raises:
      ValueError: a number outside its range.
    """
    limits = {"seed": WORD_BITS, "number": 2 * WORD_BITS, "task_number": WORD_BITS - TAG_BITS}
    numbers = {"seed": seed, "number": number, "task_number": task_number}
    for name, bits in limits.items():
        if not 0 <= numbers[name] < 1 << bits:
            raise ValueError(f"got {name}={numbers[name]}, expected it in [0, 2^{bits})")
    high, low = divmod(number, 1 << WORD_BITS)
    return np.random.default_rng([seed, low, high, task_number << TAG_BITS | stream])
