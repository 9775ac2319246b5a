"""Exact checkers: what is true of a generated image, by rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alphagrpo_jax.config import RewardOptions
from alphagrpo_jax.prompts import PromptSet
from alphagrpo_jax.runtime.errors import InputError, UserError
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.shapes import checker, diversity

# An image and its record -> which facts hold, or None where the record describes none.
FactCheck = Callable[[np.ndarray, Record], Mapping[str, bool] | None]
# An image and its record -> the choices it makes where the prompt leaves them open, by name.
ReadChoices = Callable[[np.ndarray, Record], Mapping[str, Sequence[str]]]


def shapes_facts(image: np.ndarray, record: Record) -> Mapping[str, bool] | None:
    """The exact checker of the shapes world; None for records without "facts"."""
    return checker.facts(image, record.extra["facts"]) if "facts" in record.extra else None


def shapes_choices(image: np.ndarray, record: Record) -> Mapping[str, Sequence[str]]:
    """The open choices of the shapes world; none for records without "facts"."""
    facts = record.extra.get("facts")
    return {} if facts is None else diversity.open_choices(image, facts)


class Checker(NamedTuple):
    """Reads facts and open choices from images, by rule."""

    facts: FactCheck
    choices: ReadChoices


CHECKERS = {
    "shapes": Checker(shapes_facts, shapes_choices),
    "": Checker(lambda image, record: None, lambda image, record: {}),
}


def check_scored(
    prompts: PromptSet, options: RewardOptions, size: tuple[int, int], *, source: str
) -> None:
    """Checks that scorers can score the images of all prompts, before anything is drawn.

    Args:
      prompts: a training or held-out set.
      options: with the scorers.
      size: height and width of the images to come, pixels.
      source: what to call the set in an error.
    Raises:
      InputError: a record without the facts that "exact" needs, or an edit without a caption.
    """
    for spec in options.scorers:
        if spec.kind == "exact":
            check_records(prompts, shapes_facts, size, source=source)
        for number, record in enumerate(prompts.records, start=1):
            where = f"{source}, record {number} ({record.prompt!r}), score {spec.name}"
            if spec.kind == "exact" and "facts" not in record.extra:
                raise InputError(
                    f'{where}: got a record without "facts", which the exact checker needs; leave '
                    "the score out, or use records of the shapes world"
                )
            is_instruction = prompts.task.name == "ti2i" and not record.extra.get("caption")
            if spec.reads_prompts and is_instruction:
                raise InputError(
                    f"{where}: the prompt of an edit is an instruction, which describes no image; "
                    'give each record a "caption", a text that describes the image as it should '
                    "become, or leave the score out"
                )


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
