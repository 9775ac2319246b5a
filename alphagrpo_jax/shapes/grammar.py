"""Parses prompts of the shapes world: the inverse of `language.prompt`.

Understands all prompts that `language` writes, plain and with riddles, in any case; and writes the
exact record of such a prompt, so that no language model is needed to decompose it.
"""

import hashlib
import re
from collections.abc import Mapping

import numpy as np

from alphagrpo_jax.runtime.errors import UserError
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


class GrammarError(UserError, ValueError):
    """A text that is no prompt of the shapes world; the message names the words that failed."""


def _one_of(options: Mapping[str, object] | tuple[str, ...]) -> str:
    return "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))


def _template(wording: str, **fields: str) -> str:
    """Builds the pattern of a wording, its fields replaced by patterns."""
    escaped = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
    return escaped.format(**fields)


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
_BACKGROUNDS = [re.compile(_template(text, **_FIELDS)) for text in language.BACKGROUND_PHRASES]
_RELATIONS = [
    (name, re.compile(_template(phrase, **_FIELDS)))
    for name, phrases in language.RELATION_PHRASES.items()
    for phrase in sorted(phrases, key=len, reverse=True)
]


def parse(text: str) -> Request:
    """Parses a prompt into a request.

    Args:
      text: the prompt; case, surplus blanks and a full stop at its end do not matter.
    Raises:
      GrammarError: the text is no prompt of the shapes world, is ambiguous, or asks for more than
        a scene can hold.
    """
    words, background = _without_background(_without_wrapper(text))
    relation, phrases = _split_groups(words)
    parsed = [_group(phrase, text) for phrase in phrases]
    spec = Spec(tuple(group for group, _ in parsed), relation, background)
    _check(spec, text)
    group_riddles = tuple(riddles_of_group for _, riddles_of_group in parsed)
    kinds = [kind for riddles_of_group in group_riddles for kind in riddles_of_group]
    if not kinds:
        return Request(text, "plain", _plain_type(spec), spec, group_riddles)
    return Request(text, "implied", kinds[0] if len(kinds) == 1 else "two", spec, group_riddles)


def _without_wrapper(text: str) -> str:
    words = " ".join(text.lower().split()).removesuffix(".")
    match = next((m for m in (wrapper.fullmatch(words) for wrapper in _WRAPPERS) if m), None)
    return _without_there_is(words if match is None else match["x"])


def _without_background(words: str) -> tuple[str, str | None]:
    """Splits off the background: the remaining words, and the background or None."""
    for pattern in _BACKGROUNDS:
        match = pattern.fullmatch(words)
        if match:
            return _without_there_is(match["x"]), match["c"]
    return _without_there_is(words), None


def _without_there_is(words: str) -> str:
    return words.removeprefix("there is ").removeprefix("there are ")


def _split_groups(words: str) -> tuple[Relation | None, list[str]]:
    """Splits words into the phrases of their groups, and the relation between two of them."""
    for name, pattern in _RELATIONS:
        match = pattern.fullmatch(words)
        if match:
            return Relation(name, 0, 1), [match["a"], match["b"]]
    return None, re.split(r", | and ", words)


def record(text: str) -> dict:
    """Writes the record of a prompt, in the form of `prompts.record`; depends on the text alone.

    Raises:
      GrammarError: see `parse`.
    """
    request = parse(text)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return prompts.record(request, np.random.default_rng(seed))


def _group(words: str, text: str) -> tuple[Group, dict[str, Riddle]]:
    """Parses the words of a group: the group, and its riddles by kind."""
    match = _GROUP.fullmatch(words)
    if match is None:
        raise GrammarError(
            f"got {words!r} in the prompt {text!r}, which the grammar of the shapes world does not "
            f"know; expected the likes of {EXAMPLE!r}, with shapes {', '.join(scenes.SHAPES)} and "
            f"colours {', '.join(COLORS)}; another --llm takes any prompt"
        )
    group_riddles = _group_riddles(match)
    count_word, noun = match["count"], _singular(match["noun"])
    if (
        (count_word == "as many") != ("number" in group_riddles)
        or ("color" in group_riddles and match["color"])
        or ("shape" in group_riddles and noun != "shape")
        or (match["noun"] == noun) != (count_word in ("a", "an", "one"))
    ):
        raise GrammarError(
            f"got {words!r} in the prompt {text!r}, which says a number, colour or shape twice or "
            "not at all, or a singular for a plural"
        )
    count = 1 if count_word in ("a", "an") else 0
    if "number" in group_riddles:
        count = NUMBERS.index(group_riddles["number"].meaning) + 1
    elif count_word in NUMBERS:
        count = NUMBERS.index(count_word) + 1
    shape = group_riddles["shape"].meaning if "shape" in group_riddles else noun
    color = group_riddles["color"].meaning if "color" in group_riddles else match["color"]
    return Group(count, None if shape == "shape" else shape, color), group_riddles


def _group_riddles(match: re.Match[str]) -> dict[str, Riddle]:
    """Looks up the riddles of a match of `_GROUP`, by kind."""
    group_riddles: dict[str, Riddle] = {}
    if match["shape_riddle"]:
        group_riddles["shape"] = _RIDDLES["shape"][match["shape_riddle"]]
    if match["color_riddle"]:
        phrase = re.sub(r"^\w+ the colou?r of ", "", match["color_riddle"])
        group_riddles["color"] = _RIDDLES["color"][phrase]
    if match["number_riddle"]:
        group_riddles["number"] = _RIDDLES["number"][match["number_riddle"]]
    return group_riddles


def _singular(noun: str) -> str:
    nouns = (*scenes.SHAPES, "shape")
    return next(singular for singular in nouns if noun in (singular, language.plural(singular)))


def _check(spec: Spec, text: str) -> None:
    if spec.total > scenes.MAX_OBJECTS:
        raise GrammarError(
            f"the prompt {text!r} asks for {spec.total} shapes, expected at most "
            f"{scenes.MAX_OBJECTS}"
        )
    if not spec.unambiguous:
        raise GrammarError(
            f"the prompt {text!r} is ambiguous: one shape could belong to two of its parts; give "
            "them different shapes or colours"
        )
    if spec.relation is not None and any(group.count != 1 for group in spec.groups):
        raise GrammarError(
            f"the prompt {text!r} relates several shapes at once, expected one on either side"
        )


def _plain_type(spec: Spec) -> str:
    """Returns the type under which `requests` would sample such a spec."""
    if spec.background is not None:
        return "background"
    if spec.relation is not None:
        return "relation"
    if any(group.count > 1 for group in spec.groups):
        return "count"
    open_ = any(group.shape is None or group.color is None for group in spec.groups)
    return "existence" if open_ else "attribute"
