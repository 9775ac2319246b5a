"""Reads from images what their prompts leave open: backgrounds, places, colors and shapes."""

from collections.abc import Mapping

import numpy as np

from alphagrpo_jax.shapes import checker
from alphagrpo_jax.shapes.specs import Spec


def open_choices(image: np.ndarray, spec: Spec | Mapping) -> dict[str, list[str]]:
    """Lists the choices that an image makes where its prompt leaves them open.

    A place is open where no relation is asked for, color and shape of an object where it fits only
    groups that name none.

    Args:
      image: uint8[48, 48, 3].
      spec: a `Spec` or its JSON form, as records carry it under "facts".
    Returns:
      Values by "background", "place", "color" and "shape"; empty where nothing is open or known.
    Raises:
      InputError: see `checker.parse`.
    """
    spec = spec if isinstance(spec, Spec) else Spec.from_json(spec)
    parsed = checker.parse(image)
    choices: dict[str, list[str]] = {"background": [], "place": [], "color": [], "shape": []}
    if spec.background is None and parsed.background is not None:
        choices["background"].append(parsed.background)
    for obj in parsed.objects:
        if spec.relation is None:
            choices["place"].append(f"{obj.row} {obj.col}")
        groups = [group for group in spec.groups if group.matches(obj)]
        if groups and all(group.color is None for group in groups):
            choices["color"].append(obj.color)
        if groups and all(group.shape is None for group in groups):
            choices["shape"].append(obj.shape)
    return choices
