"""Exact checkers: what is true of a generated image, by rule."""

from collections.abc import Callable, Mapping

import numpy as np

from alphagrpo_jax.prompts import PromptSet
from alphagrpo_jax.runtime.errors import InputError, UserError
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.shapes import checker

# An image and its record -> which facts hold, or None where the record describes none.
FactCheck = Callable[[np.ndarray, Record], Mapping[str, bool] | None]


def shapes_facts(image: np.ndarray, record: Record) -> Mapping[str, bool] | None:
    """The exact checker of the shapes world; None for records without "facts"."""
    return checker.facts(image, record.extra["facts"]) if "facts" in record.extra else None


CHECKERS: dict[str, FactCheck] = {"shapes": shapes_facts, "": lambda image, record: None}


def check_records(
    prompts: PromptSet, check: FactCheck, size: tuple[int, int], *, source: str
) -> None:
    """Tries the exact checker on a blank image for every prompt, before anything is sampled.

    Args:
      prompts: the held-out set.
      check: the exact checker.
      size: height and width of the images to come, pixels.
      source: what to call the set in an error.
    Raises:
      InputError: facts of another form, or an image size that the checker does not read.
    """
    blank = np.zeros((*size, 3), np.uint8)
    for number, record in enumerate(prompts.records, start=1):
        try:
            check(blank, record)
        except UserError as error:
            raise InputError(
                f"{source}, record {number} ({record.prompt!r}): the exact checker cannot read "
                f'its "facts" in images of {size[0]}x{size[1]} pixels: {error}; leave "facts" '
                "out, or set eval.checker='' to evaluate by reward alone"
            ) from error
