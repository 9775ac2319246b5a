"""Words of the shapes world: prompts, think texts, captions and edit instructions.

All texts are lower case except questions; positions are always two words, row then column.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.shapes.riddles import Riddle
from alphagrpo_jax.shapes.specs import INVERSE, NUMBERS, Group, Spec, pick

# Riddles of one group: kind ("color", "shape", "number") -> riddle.
GroupRiddles = Mapping[str, Riddle]

WRAPPERS = (
    "{x}",
    "draw {x}",
    "a picture of {x}",
    "{there} {x}",
    "an image with {x}",
    "please show {x}",
)
RELATION_PHRASES = {
    "left of": ("{a} to the left of {b}", "{a} left of {b}", "{a} on the left side of {b}"),
    "right of": ("{a} to the right of {b}", "{a} right of {b}", "{a} on the right side of {b}"),
    "above": ("{a} above {b}", "{a} higher than {b}", "{a} over {b}"),
    "below": ("{a} below {b}", "{a} lower than {b}", "{a} under {b}"),
}
RELATION_WRAPPERS = (*WRAPPERS, "a scene where {x}")
BACKGROUND_PHRASES = (
    "{x} on a {c} background",
    "{x} in front of a {c} background",
    "{x}, the background is {c}",
    "{x}, all on {c}",
    "a {c} background with {x}",
)
COLOR_PHRASES = ("in the colour of {x}", "with the colour of {x}", "in the color of {x}")


def article(words: str) -> str:
    """Prepends the indefinite article: "an orange circle"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(noun: str) -> str:
    """Returns the plural of a shape's name."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def position(obj: scenes.SceneObject) -> str:
    """Returns row and column in words: "top left", "middle center"."""
    return f"{scenes.ROWS[obj.row]} {scenes.COLUMNS[obj.col]}"


def name(shape: str | None, color: str | None, count: int = 1) -> str:
    """Returns color and shape in words, without article: "red circles", "circle", "red shape"."""
    noun = shape or "shape"
    noun = noun if count == 1 else plural(noun)
    return noun if color is None else f"{color} {noun}"


def counted(group: Group) -> str:
    """Returns a group in words: "a red circle", "two crosses"."""
    words = name(group.shape, group.color, group.count)
    return article(words) if group.count == 1 else f"{NUMBERS[group.count - 1]} {words}"


def implied(group: Group, riddles: GroupRiddles, rng: np.random.Generator) -> str:
    """Returns a group in words, with riddles in place of the attributes they imply."""
    if not riddles:
        return counted(group)
    many = group.count > 1 or "number" in riddles
    shape = None if "shape" in riddles else group.shape
    color = None if "color" in riddles else group.color
    words = name(shape, color, 2 if many else 1)
    if "shape" in riddles:
        words += f" {riddles['shape'].phrase}"
    if "color" in riddles:
        words += " " + pick(rng, COLOR_PHRASES).format(x=riddles["color"].phrase)
    if "number" in riddles:
        return f"as many {words} as {riddles['number'].phrase}"
    return f"{NUMBERS[group.count - 1]} {words}" if many else article(words)


def join(phrases: Sequence[str]) -> str:
    """Joins phrases as an enumeration: "a", "a and b", "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def prompt(spec: Spec, riddles: Sequence[GroupRiddles], rng: np.random.Generator) -> str:
    """Writes a prompt for `spec` in a random wording.

    Args:
      spec: meaning of the prompt.
      riddles: one mapping per group, empty where the group is named plainly.
      rng: picks the wording.
    """
    phrases = [implied(group, r, rng) for group, r in zip(spec.groups, riddles, strict=True)]
    wrappers = WRAPPERS
    if spec.relation is not None:
        relation, first, second = spec.relation.name, spec.relation.first, spec.relation.second
        if rng.random() < 0.15:  # the same relation told from its second object
            relation, first, second = INVERSE[relation], second, first
        phrase = pick(rng, RELATION_PHRASES[relation])
        words, wrappers = phrase.format(a=phrases[first], b=phrases[second]), RELATION_WRAPPERS
    else:
        words = join(phrases)
    if spec.background is not None:
        words = pick(rng, BACKGROUND_PHRASES).format(x=words, c=spec.background)
    single = words.startswith(("a ", "an "))
    wrapper = pick(rng, wrappers)
    if "where" in wrapper:
        words = f"there is {words}"
    return wrapper.format(x=words, there="there is" if single else "there are")


def layout(scene: scenes.Scene) -> str:
    """Describes a scene: "red circle top left, blue square middle right, white background"."""
    objects = [f"{obj.color} {obj.shape} {position(obj)}" for obj in scene.objects]
    return ", ".join([*objects, f"{scene.background} background"])


def think(scene: scenes.Scene, resolutions: Sequence[str] = ()) -> str:
    """Writes a think text: resolved riddles first, then the layout."""
    return f"<think> {', '.join([*resolutions, layout(scene)])} </think>"


def reflection(remarks: Sequence[str], scene: scenes.Scene) -> str:
    """Writes the think text of a repair: remarks as sentences, then the target layout."""
    return f"<think> {'. '.join([*remarks, layout(scene)])} </think>"
