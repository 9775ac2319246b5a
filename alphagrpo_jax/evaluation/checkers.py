"""Exact checkers: what is true of a generated image, by rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alphagrpo_jax.config import RewardOptions
from alphagrpo_jax.prompts import PromptSet
from alphagrpo_jax.runtime.errors import InputError, UserError
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.shapes import checker, diversity
from alphagrpo_jax.shapes.specs import Spec


class ImageReading(NamedTuple):
    """Facts and open choices that rules read from an image."""

    facts: Mapping[str, bool] | None  # which hold; None where the record describes none
    choices: Mapping[str, Sequence[str]]  # made where the prompt leaves them open, by name


ImageReader = Callable[[np.ndarray, Record], ImageReading]
NOTHING = ImageReading(None, {})


def read_shapes(image: np.ndarray, record: Record) -> ImageReading:
    """Reads an image of the shapes world; nothing for records without "facts"."""
    if "facts" not in record.extra:
        return NOTHING
    parsed, spec = checker.parse(image), Spec.from_json(record.extra["facts"])
    return ImageReading(checker.parsed_facts(parsed, spec), diversity.open_choices(parsed, spec))


CHECKERS: dict[str, ImageReader] = {
    "shapes": read_shapes,
    "": lambda image, record: NOTHING,
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
            check_records(prompts, read_shapes, size, source=source)
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
    prompts: PromptSet, check: ImageReader, size: tuple[int, int], *, source: str
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
