"""Yes/no questions about a scene, with their truth; the forms which prompt records use.

A `Query` is the question's meaning, `text` one of its wordings, `truth` its answer. Questions of
quality are answered by an image's labels (see `corrupt.py`), all others by the scene. If the
subjects of a question are absent its answer is no.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.shapes.language import article, name, position
from alphagrpo_jax.shapes.specs import (
    BACKGROUNDS,
    COLORS,
    INVERSE,
    NUMBERS,
    RELATIONS,
    Group,
    pick,
    related,
)

SEMANTIC = ("existence", "attribute", "count", "relation", "background")
QUALITY = ("geometry", "coherence", "texture")
TYPES = SEMANTIC + QUALITY
TAGS = {
    "existence": "Existence",
    "attribute": "Attribute",
    "count": "Count",
    "relation": "Spatial",
    "background": "Environment",
    "geometry": "Geometry",
    "coherence": "Coherence",
    "texture": "Texture",
}
# How often `sample_questions` asks each type.
SHARES = (0.14, 0.18, 0.18, 0.2, 0.08, 0.08, 0.08, 0.06)

# The first wording of each is the one that records use first; all occur in records.
WORDINGS = {
    "exists": ("Is there {one}?", "Does the image show {one}?", "Can {one} be seen?"),
    "has_color": ("Is the {shape} {color}?", "Is {color} the colour of the {shape}?"),
    "count": ("{Is} there exactly {many}?", "Does the image show exactly {many}?"),
    "relation": ("Is the {a} {where} the {b}?", "Does the {a} lie {where} the {b}?"),
    "background": ("Is the background {value}?", "Does the image have a {value} background?"),
    "geometry": ("Are all shapes well formed?", "Does every shape have its proper form?"),
    "coherence": ("Is every shape complete and separate?", "Are all shapes whole and apart?"),
    "texture": ("Are the colours flat and clean?", "Is every surface flat and clean?"),
}
WHERE = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}


@dataclasses.dataclass(frozen=True)
class Query:
    """A question's meaning.

    Attributes:
      type: one of `TYPES`.
      form: a key of `WORDINGS`.
      group: what is asked about; for "count" its count is the number asked for, for "has_color"
        its colour is the colour asked for.
      other: the second subject of a relation.
      value: the relation's name or the background asked for.
    """

    type: str
    form: str
    group: Group | None = None
    other: Group | None = None
    value: str | None = None


def exists(group: Group) -> Query:
    """Is there such a shape? Of type attribute if shape and colour are given, else existence."""
    full = group.shape is not None and group.color is not None
    single = dataclasses.replace(group, count=1)
    return Query("attribute" if full else "existence", "exists", single)


def has_color(shape: str, color: str) -> Query:
    """Is the (only) shape of this form of this colour?"""
    return Query("attribute", "has_color", Group(1, shape, color))


def counts(group: Group) -> Query:
    """Are there exactly so many? A group without shape and colour means all shapes."""
    return Query("count", "count", group)


def relates(relation: str, first: Group, second: Group) -> Query:
    """Does the relation hold between two kinds of shapes?"""
    return Query("relation", "relation", first, second, relation)


def has_background(background: str) -> Query:
    """Is this the background's colour?"""
    return Query("background", "background", value=background)


def quality(type_: str) -> Query:
    """One of the three fixed questions of quality."""
    return Query(type_, type_)


def text(query: Query, wording: int = 0) -> str:
    """The question in words.

    Args:
      query: its meaning.
      wording: index into `WORDINGS[query.form]`.
    """
    template = WORDINGS[query.form][wording]
    group = query.group
    if query.form == "exists":
        return template.format(one=article(name(group.shape, group.color)))
    if query.form == "has_color":
        return template.format(shape=group.shape, color=group.color)
    if query.form == "count":
        one = group.count == 1
        words = f"{NUMBERS[group.count - 1]} {name(group.shape, group.color, group.count)}"
        return template.format(Is="Is" if one else "Are", many=words)
    if query.form == "relation":
        a, b = (name(g.shape, g.color) for g in (group, query.other))
        return template.format(a=a, b=b, where=WHERE[query.value])
    return template.format(value=query.value)


def truth(query: Query, scene: scenes.Scene, labels: Mapping[str, bool] | None = None) -> bool:
    """The answer: for a quality question the image's label, else what the scene says.

    "Is the circle red?" holds if there are circles and all are red; a relation holds if both
    kinds are there and it holds between all of them.
    Raises:
      KeyError: a quality question about an image without that label.
    """
    if query.type in QUALITY:
        return bool((labels or {})[query.type])
    things, group = scene.things, query.group
    if query.form == "background":
        return scene.background == query.value
    members = [thing for thing in things if group.matches(thing)]
    if query.form == "exists":
        return bool(members)
    if query.form == "count":
        return len(members) == group.count
    if query.form == "has_color":
        alike = [thing for thing in things if thing.shape == group.shape]
        return bool(alike) and all(thing.color == group.color for thing in alike)
    others = [thing for thing in things if query.other.matches(thing)]
    pairs = [related(query.value, a, b) for a in members for b in others]
    return bool(pairs) and all(pairs)


def _kind(thing: scenes.Thing) -> Group:
    return Group(1, thing.shape, thing.color)


def _another(rng: np.random.Generator, options: Sequence[str], *used: str) -> str:
    return pick(rng, [option for option in options if option not in used])


def _near_miss(scene: scenes.Scene, rng: np.random.Generator) -> Group:
    """A fully specified kind that the scene nearly has: swapped or changed in one attribute."""
    thing = pick(rng, scene.things)
    other = pick(rng, scene.things)
    if thing.shape != other.shape and thing.color != other.color and rng.random() < 0.6:
        return Group(1, thing.shape, other.color)
    if rng.random() < 0.5:
        return Group(1, thing.shape, _another(rng, COLORS, thing.color))
    return Group(1, _another(rng, scenes.SHAPES, thing.shape), thing.color)


def _ask_existence(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    attribute, options = ("shape", scenes.SHAPES) if rng.random() < 0.6 else ("color", COLORS)
    present = {getattr(thing, attribute) for thing in scene.things}
    value = pick(rng, [option for option in options if (option in present) == answer])
    return exists(Group(1, **{"shape": None, "color": None, attribute: value}))


def _ask_attribute(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    group = _kind(pick(rng, scene.things)) if answer else _near_miss(scene, rng)
    same = {thing.color for thing in scene.things if thing.shape == group.shape}
    ask = has_color if rng.random() < 0.4 and len(same) <= 1 else lambda *_: exists(group)
    return ask(group.shape, group.color)


def _ask_count(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    thing, kind = pick(rng, scene.things), rng.random()
    if kind < 0.4:
        group = Group(1, None, None)
    elif kind < 0.6:
        group = Group(1, thing.shape, None)
    elif kind < 0.7:
        group = Group(1, None, thing.color)
    else:
        group = _kind(thing)
    count = sum(group.matches(t) for t in scene.things)
    if not answer:
        if kind >= 0.4 and rng.random() < 0.2:
            group = _near_miss(scene, rng)
            count = sum(group.matches(t) for t in scene.things)
        wrong = [n for n in (1, 2, 3) if n != count]
        near = [n for n in wrong if abs(n - count) == 1] if rng.random() < 0.7 else wrong
        count = pick(rng, near)
    return counts(dataclasses.replace(group, count=count))


def _ask_relation(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    order = rng.permutation(len(scene.things))
    first = scene.things[order[0]]
    second = scene.things[order[1]] if len(order) > 1 else None
    if second is None or (not answer and rng.random() < 0.25):  # one subject is absent
        groups = [_kind(first), _near_miss(scene, rng)]
        a, b = (groups[i] for i in rng.permutation(2))
        return relates(pick(rng, RELATIONS), a, b)
    holding = [r for r in RELATIONS if related(r, first, second)]
    relation = pick(rng, holding) if holding else pick(rng, RELATIONS)
    if not answer:
        # Mostly the opposite; at times one that fails because row or column are the same.
        level = [r for r in RELATIONS if r not in holding and INVERSE[r] not in holding]
        relation = pick(rng, level) if level and rng.random() < 0.3 else INVERSE[relation]
    return relates(relation, _kind(first), _kind(second))


def _ask_background(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    other = _another(rng, BACKGROUNDS, scene.background)
    return has_background(scene.background if answer else other)


_ASK = {
    "existence": _ask_existence,
    "attribute": _ask_attribute,
    "count": _ask_count,
    "relation": _ask_relation,
    "background": _ask_background,
}


def sample_query(scene: scenes.Scene, type_: str, rng: np.random.Generator) -> Query:
    """A question of a type whose answer is about as often yes as no, wrong ones nearly right."""
    if type_ in QUALITY:
        return quality(type_)
    # Some relation questions come out as no whatever was wanted (single shapes, equal kinds).
    wanted = rng.random() < (0.55 if type_ == "relation" else 0.5)
    return _ASK[type_](scene, rng, answer=bool(wanted))


def sample_questions(
    scene: scenes.Scene,
    quality_labels: Mapping[str, bool] | None,
    rng: np.random.Generator,
    n: int,
    *,
    damaged: Sequence[int] = (),
    types: Sequence[str] = TYPES,
) -> list[tuple[str, bool, str]]:
    """Up to `n` different questions about one image, in any wording.

    Args:
      scene: what the image shows, one shape at least.
      quality_labels: labels by type of `QUALITY`; absent ones are not asked, None asks none.
      rng: source of randomness.
      n: number of questions.
      damaged: indexes of shapes damaged beyond recognition; questions whose answer depends on
        whether these count as shapes are not asked.
      types: the types to ask from, in their shares.
    Returns:
      (question, answer, type) triples.
    """
    asked = [t for t in types if t in SEMANTIC or quality_labels is not None]
    edges = np.cumsum([SHARES[TYPES.index(t)] for t in asked])
    rest = tuple(thing for i, thing in enumerate(scene.things) if i not in damaged)
    without = dataclasses.replace(scene, things=rest)
    found: dict[str, tuple[str, bool, str]] = {}
    for _ in range(4 * n):
        if len(found) == n:
            break
        type_ = asked[int(np.searchsorted(edges, rng.random() * edges[-1], "right"))]
        if type_ == "relation" and len(scene.things) == 1 and rng.random() < 0.85:
            continue  # could only be no
        query = sample_query(scene, type_, rng)
        if type_ in QUALITY and type_ not in quality_labels:
            continue
        answer = truth(query, scene, quality_labels)
        if damaged and answer != truth(query, without, quality_labels):
            continue
        words = text(query, int(rng.integers(len(WORDINGS[query.form]))))
        found.setdefault(words, (words, answer, query.type))
    return list(found.values())


def open_question(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question answered by a word or two, and its answer.

    Asks for the number of shapes, the background, or the colour, shape or place of a shape that
    is the only one of its description.
    """
    thing = pick(rng, scene.things)
    alone = {
        "shape": sum(t.shape == thing.shape for t in scene.things) == 1,
        "color": sum(t.color == thing.color for t in scene.things) == 1,
        "kind": sum(_kind(thing).matches(t) for t in scene.things) == 1,
    }
    options = [("How many shapes are there?", NUMBERS[len(scene.things) - 1])]
    options.append(("What is the colour of the background?", scene.background))
    if alone["shape"]:
        options += [(f"What is the colour of the {thing.shape}?", thing.color)] * 2
    if alone["color"]:
        options += [(f"What shape is the {thing.color} shape?", thing.shape)] * 2
    if alone["kind"]:
        options += [(f"Where is the {thing.color} {thing.shape}?", position(thing))] * 2
    if not alone["kind"]:
        group = _kind(thing)
        count = sum(group.matches(t) for t in scene.things)
        many = name(thing.shape, thing.color, 2)
        options.append((f"How many {many} are there?", NUMBERS[count - 1]))
    return pick(rng, options)
