"""Reads from images what their prompts leave open: backgrounds, places, colors and shapes."""

from alphagrpo_jax.shapes.checker import ParsedImage
from alphagrpo_jax.shapes.specs import Spec


def open_choices(parsed: ParsedImage, spec: Spec) -> dict[str, list[str]]:
    """Lists the choices that an image makes where its prompt leaves them open.

    A place is open where no relation is asked for, color and shape of an object where it fits only
    groups that name none.

    Args:
      parsed: the image, from `checker.parse`.
      spec: what its prompt asks for.
    Returns:
      Values by "background", "place", "color" and "shape"; empty where nothing is open or known.
    """
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
