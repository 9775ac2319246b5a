"""Reads prompts of the shapes world back: the inverse of `language.prompt`.

Understands what `language` writes, plain and with riddles, whatever the case; and writes the exact
record of such a prompt, so that no language model is needed to decompose it.
"""

import hashlib
import re
from collections.abc import Mapping

import numpy as np

from alphagrpo_jax.shapes import language, prompts, riddles, scenes
from alphagrpo_jax.shapes.requests import Request
from alphagrpo_jax.shapes.riddles import Riddle
from alphagrpo_jax.shapes.specs import BACKGROUNDS, COLORS, NUMBERS, Group, Relation, Spec

EXAMPLE = "a red circle to the left of a blue square on a white background"
_KINDS = ("shape", "color", "number")
_RIDDLES = {
    kind: {riddle.phrase: riddle for riddle in riddles.RIDDLES if riddle.kind == kind}
    for kind in _KINDS
}


class GrammarError(ValueError):
    """A text that is no prompt of the shapes world; the message says which part."""


def _one_of(options: Mapping[str, object] | tuple[str, ...]) -> str:
    return "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))


def _template(text: str, **parts: str) -> str:
    """A pattern of a wording, its fields replaced by patterns."""
    escaped = re.escape(text).replace(r"\{", "{").replace(r"\}", "}")
    return escaped.format(**parts)


_NOUN = "|".join(
    rf"{noun}|{language.plural(noun)}" for noun in sorted((*scenes.SHAPES, "shape"), key=len)
)
_COLOR_RIDDLE = "|".join(
    _template(phrase, x=f"(?:{_one_of(_RIDDLES['color'])})") for phrase in language.COLOR_PHRASES
)
_GROUP = re.compile(
    rf"(?P<count>an?|as many|{'|'.join(NUMBERS)}) (?:(?P<color>{_one_of(COLORS)}) )?"
    rf"(?P<noun>{_NOUN})(?: (?P<shape_riddle>{_one_of(_RIDDLES['shape'])}))?"
    rf"(?: (?P<color_riddle>{_COLOR_RIDDLE}))?"
    rf"(?: as (?P<number_riddle>{_one_of(_RIDDLES['number'])}))?"
)
_FIELDS = {"x": "(?P<x>.+)", "a": "(?P<a>.+)", "b": "(?P<b>.+)", "there": "there (?:is|are)"}
_FIELDS["c"] = f"(?P<c>{_one_of(BACKGROUNDS)})"
# The bare "{x}" comes last: it fits everything.
_WRAPPERS = [
    re.compile(_template(wrapper, **_FIELDS))
    for wrapper in sorted(language.RELATION_WRAPPERS, key=len, reverse=True)
]
_BACKGROUNDS = [re.compile(_template(each, **_FIELDS)) for each in language.BACKGROUND_PHRASES]
_RELATIONS = [
    (name, re.compile(_template(phrase, **_FIELDS)))
    for name, phrases in language.RELATION_PHRASES.items()
    for phrase in sorted(phrases, key=len, reverse=True)
]


def parse(text: str) -> Request:
    """What a prompt asks for.

    Args:
      text: the prompt; case, surplus blanks and a full stop at its end do not matter.
    Raises:
      GrammarError: it is no prompt of the shapes world, or asks for what cannot be told apart or
        drawn.
    """
    words = " ".join(text.lower().split()).removesuffix(".")
    for wrapper in _WRAPPERS:
        found = wrapper.fullmatch(words)
        if found:
            words = found["x"]
            break
    words = words.removeprefix("there is ").removeprefix("there are ")
    background = None
    for pattern in _BACKGROUNDS:
        found = pattern.fullmatch(words)
        if found:
            words, background = found["x"], found["c"]
            break
    words = words.removeprefix("there is ").removeprefix("there are ")
    relation = None
    parts = re.split(r", | and ", words)
    for name, pattern in _RELATIONS:
        found = pattern.fullmatch(words)
        if found:
            relation, parts = Relation(name, 0, 1), [found["a"], found["b"]]
            break
    read = [_group(part, text) for part in parts]
    spec = Spec(tuple(group for group, _ in read), relation, background)
    _check(spec, text)
    used = tuple(own for _, own in read)
    kinds = [kind for own in used for kind in own]
    if not kinds:
        return Request(text, "plain", _plain_type(spec), spec, used)
    return Request(text, "implied", kinds[0] if len(kinds) == 1 else "two", spec, used)


def record(text: str) -> dict:
    """The record of a prompt, in the form of `prompts.record`; a function of the text alone.

    Raises:
      GrammarError: see `parse`.
    """
    request = parse(text)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return prompts.record(request, np.random.default_rng(seed))


def _group(words: str, text: str) -> tuple[Group, dict[str, Riddle]]:
    """A group in words, with its riddles by kind."""
    found = _GROUP.fullmatch(words)
    if found is None:
        raise GrammarError(
            f"got {words!r} in the prompt {text!r}, which the grammar of the shapes world does not "
            f"know; expected the likes of {EXAMPLE!r}, with shapes {', '.join(scenes.SHAPES)} and "
            f"colours {', '.join(COLORS)}; another --llm takes any prompt"
        )
    used: dict[str, Riddle] = {}
    if found["shape_riddle"]:
        used["shape"] = _RIDDLES["shape"][found["shape_riddle"]]
    if found["color_riddle"]:
        thing = re.sub(r"^\w+ the colou?r of ", "", found["color_riddle"])
        used["color"] = _RIDDLES["color"][thing]
    if found["number_riddle"]:
        used["number"] = _RIDDLES["number"][found["number_riddle"]]
    counted, noun = found["count"], _singular(found["noun"])
    if (
        (counted == "as many") != ("number" in used)
        or ("color" in used and found["color"])
        or ("shape" in used and noun != "shape")
        or (found["noun"] == noun) != (counted in ("a", "an", "one"))
    ):
        raise GrammarError(
            f"got {words!r} in the prompt {text!r}, which says a number, colour or shape twice or "
            "not at all, or a singular for a plural"
        )
    count = 1 if counted in ("a", "an") else 0
    if "number" in used:
        count = NUMBERS.index(used["number"].meaning) + 1
    elif counted in NUMBERS:
        count = NUMBERS.index(counted) + 1
    shape = used["shape"].meaning if "shape" in used else noun
    color = used["color"].meaning if "color" in used else found["color"]
    return Group(count, None if shape == "shape" else shape, color), used


def _singular(noun: str) -> str:
    return next(each for each in (*scenes.SHAPES, "shape") if noun in (each, language.plural(each)))


def _check(spec: Spec, text: str) -> None:
    if spec.total > scenes.MAX_THINGS:
        raise GrammarError(
            f"the prompt {text!r} asks for {spec.total} shapes, expected at most "
            f"{scenes.MAX_THINGS}"
        )
    if not spec.clear:
        raise GrammarError(
            f"the prompt {text!r} is ambiguous: one shape could belong to two of its parts; give "
            "them different shapes or colours"
        )
    if spec.relation is not None and any(group.count != 1 for group in spec.groups):
        raise GrammarError(
            f"the prompt {text!r} relates several shapes at once, expected one on either side"
        )


def _plain_type(spec: Spec) -> str:
    """The type under which `requests` would draw such a spec."""
    if spec.background is not None:
        return "background"
    if spec.relation is not None:
        return "relation"
    if any(group.count > 1 for group in spec.groups):
        return "count"
    open_ = any(group.shape is None or group.color is None for group in spec.groups)
    return "existence" if open_ else "attribute"
