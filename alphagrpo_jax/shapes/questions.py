"""Yes/no questions about a scene and their true answers, in the forms that prompt records use.

A `Query` is the question's meaning, `text` one of its wordings, `truth` its answer. Quality
questions are answered by an image's labels (see `corrupt.py`), all others by the scene. If the
subjects of a question are absent, its answer is no.
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
SHARES = (0.14, 0.18, 0.18, 0.2, 0.08, 0.08, 0.08, 0.06)  # of `TYPES` in `sample_questions`

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
      group: the subject; for "count" its count, for "has_color" its color is the attribute in
        question.
      second_group: the second subject of a relation.
      value: the relation's name, or the background in question.
    """

    type: str
    form: str
    group: Group | None = None
    second_group: Group | None = None
    value: str | None = None

    @property
    def subject(self) -> Group:
        """Returns the group that the question is about.

        Raises:
          ValueError: questions about the background or the quality have none.
        """
        if self.group is None:
            raise ValueError(f"a question of form {self.form!r} is about no group of objects")
        return self.group

    @property
    def relation(self) -> tuple[str, Group]:
        """Returns a relation question's relation and its second subject.

        Raises:
          ValueError: the question is about no relation.
        """
        if self.value is None or self.second_group is None:
            raise ValueError(f"a question of form {self.form!r} is about no relation")
        return self.value, self.second_group


def exists(group: Group) -> Query:
    """Asks if such an object exists; of type attribute if shape and color are set."""
    full = group.shape is not None and group.color is not None
    single = dataclasses.replace(group, count=1)
    return Query("attribute" if full else "existence", "exists", single)


def has_color(shape: str, color: str) -> Query:
    """Asks if the (only) object of this shape has this color."""
    return Query("attribute", "has_color", Group(1, shape, color))


def counts(group: Group) -> Query:
    """Asks if there are exactly `group.count` members; without shape and color: any objects."""
    return Query("count", "count", group)


def relates(relation: str, first: Group, second: Group) -> Query:
    """Asks if the relation holds between two kinds of objects."""
    return Query("relation", "relation", first, second, relation)


def has_background(background: str) -> Query:
    """Asks if this is the background's color."""
    return Query("background", "background", value=background)


def quality(type_: str) -> Query:
    """Returns one of the three fixed quality questions."""
    return Query(type_, type_)


def text(query: Query, wording: int = 0) -> str:
    """Writes a question in words.

    Args:
      query: its meaning.
      wording: index into `WORDINGS[query.form]`.
    """
    template = WORDINGS[query.form][wording]
    if query.form == "exists":
        return template.format(one=article(name(query.subject.shape, query.subject.color)))
    if query.form == "has_color":
        return template.format(shape=query.subject.shape, color=query.subject.color)
    if query.form == "count":
        group = query.subject
        words = f"{NUMBERS[group.count - 1]} {name(group.shape, group.color, group.count)}"
        return template.format(Is="Is" if group.count == 1 else "Are", many=words)
    if query.form == "relation":
        relation, second = query.relation
        a, b = (name(group.shape, group.color) for group in (query.subject, second))
        return template.format(a=a, b=b, where=WHERE[relation])
    return template.format(value=query.value)


def truth(query: Query, scene: scenes.Scene, labels: Mapping[str, bool] | None = None) -> bool:
    """Answers a question: quality questions by the image's label, others by the scene.

    "Is the circle red?" holds if there are circles and all are red; a relation holds if both
    kinds are present and it holds between all of them.

    Raises:
      KeyError: a quality question about an image without that label.
    """
    if query.type in QUALITY:
        return bool((labels or {})[query.type])
    if query.form == "background":
        return scene.background == query.value
    objects, group = scene.objects, query.subject
    members = [obj for obj in objects if group.matches(obj)]
    if query.form == "exists":
        return bool(members)
    if query.form == "count":
        return len(members) == group.count
    if query.form == "has_color":
        of_shape = [obj for obj in objects if obj.shape == group.shape]
        return bool(of_shape) and all(obj.color == group.color for obj in of_shape)
    relation, second = query.relation
    second_members = [obj for obj in objects if second.matches(obj)]
    pairs = [related(relation, a, b) for a in members for b in second_members]
    return bool(pairs) and all(pairs)


def _kind(obj: scenes.SceneObject) -> Group:
    return Group(1, obj.shape, obj.color)


def _pick_except(rng: np.random.Generator, options: Sequence[str], excluded: str) -> str:
    return pick(rng, [option for option in options if option != excluded])


def _near_miss(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Samples (shape, color) of a kind that the scene nearly has: swapped or changed once."""
    obj = pick(rng, scene.objects)
    second = pick(rng, scene.objects)
    if obj.shape != second.shape and obj.color != second.color and rng.random() < 0.6:
        return obj.shape, second.color
    if rng.random() < 0.5:
        return obj.shape, _pick_except(rng, COLORS, obj.color)
    return _pick_except(rng, scenes.SHAPES, obj.shape), obj.color


def _ask_existence(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    attribute, options = ("shape", scenes.SHAPES) if rng.random() < 0.6 else ("color", COLORS)
    present = {getattr(obj, attribute) for obj in scene.objects}
    value = pick(rng, [option for option in options if (option in present) == answer])
    return exists(Group(1, value, None) if attribute == "shape" else Group(1, None, value))


def _ask_attribute(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    if answer:
        obj = pick(rng, scene.objects)
        shape, color = obj.shape, obj.color
    else:
        shape, color = _near_miss(scene, rng)
    colors = {obj.color for obj in scene.objects if obj.shape == shape}
    if rng.random() < 0.4 and len(colors) <= 1:
        return has_color(shape, color)
    return exists(Group(1, shape, color))


def _ask_count(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    obj, kind = pick(rng, scene.objects), rng.random()
    if kind < 0.4:
        group = Group(1, None, None)
    elif kind < 0.6:
        group = Group(1, obj.shape, None)
    elif kind < 0.7:
        group = Group(1, None, obj.color)
    else:
        group = _kind(obj)
    count = sum(group.matches(obj) for obj in scene.objects)
    if not answer:
        if kind >= 0.4 and rng.random() < 0.2:
            group = Group(1, *_near_miss(scene, rng))
            count = sum(group.matches(obj) for obj in scene.objects)
        wrong = [n for n in (1, 2, 3) if n != count]
        near = [n for n in wrong if abs(n - count) == 1] if rng.random() < 0.7 else wrong
        count = pick(rng, near)
    return counts(dataclasses.replace(group, count=count))


def _ask_relation(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    order = rng.permutation(len(scene.objects))
    first = scene.objects[order[0]]
    second = scene.objects[order[1]] if len(order) > 1 else None
    if second is None or (not answer and rng.random() < 0.25):
        groups = [_kind(first), Group(1, *_near_miss(scene, rng))]  # one subject is absent
        a, b = (groups[i] for i in rng.permutation(2))
        return relates(pick(rng, RELATIONS), a, b)
    holding = [r for r in RELATIONS if related(r, first, second)]
    relation = pick(rng, holding) if holding else pick(rng, RELATIONS)
    if not answer:
        # Mostly the opposite; at times one that fails because row or column are equal.
        level = [r for r in RELATIONS if r not in holding and INVERSE[r] not in holding]
        relation = pick(rng, level) if level and rng.random() < 0.3 else INVERSE[relation]
    return relates(relation, _kind(first), _kind(second))


def _ask_background(scene: scenes.Scene, rng: np.random.Generator, *, answer: bool) -> Query:
    wrong = _pick_except(rng, BACKGROUNDS, scene.background)
    return has_background(scene.background if answer else wrong)


_ASK = {
    "existence": _ask_existence,
    "attribute": _ask_attribute,
    "count": _ask_count,
    "relation": _ask_relation,
    "background": _ask_background,
}


def sample_query(scene: scenes.Scene, type_: str, rng: np.random.Generator) -> Query:
    """Samples a question of a type; half of the answers are yes, and the noes are near misses."""
    if type_ in QUALITY:
        return quality(type_)
    # Single objects and equal kinds make some relation questions no, whatever answer is wanted.
    answer = rng.random() < (0.55 if type_ == "relation" else 0.5)
    return _ASK[type_](scene, rng, answer=bool(answer))


def sample_questions(
    scene: scenes.Scene,
    quality_labels: Mapping[str, bool] | None,
    rng: np.random.Generator,
    n: int,
    *,
    damaged: Sequence[int] = (),
    types: Sequence[str] = TYPES,
) -> list[tuple[str, bool, str]]:
    """Samples up to `n` different questions about one image, in any wording.

    Args:
      scene: content of the image, one object at least.
      quality_labels: labels by type of `QUALITY`; types without a label are not asked, None: none.
      rng: source of randomness.
      n: number of questions.
      damaged: indexes of objects damaged beyond recognition; questions are left out if their
        answer depends on whether these objects count.
      types: types to sample from, in their shares.
    Returns:
      (question, answer, type) triples.
    """
    allowed = [t for t in types if t in SEMANTIC or quality_labels is not None]
    edges = np.cumsum([SHARES[TYPES.index(t)] for t in allowed])
    intact = tuple(obj for i, obj in enumerate(scene.objects) if i not in damaged)
    without_damaged = dataclasses.replace(scene, objects=intact)
    sampled: dict[str, tuple[str, bool, str]] = {}
    for _ in range(4 * n):
        if len(sampled) == n:
            break
        type_ = allowed[int(np.searchsorted(edges, rng.random() * edges[-1], "right"))]
        if type_ == "relation" and len(scene.objects) == 1 and rng.random() < 0.85:
            continue  # the answer could only be no
        query = sample_query(scene, type_, rng)
        if type_ in QUALITY and type_ not in (quality_labels or {}):
            continue
        answer = truth(query, scene, quality_labels)
        if damaged and answer != truth(query, without_damaged, quality_labels):
            continue
        words = text(query, int(rng.integers(len(WORDINGS[query.form]))))
        sampled.setdefault(words, (words, answer, query.type))
    return list(sampled.values())


def open_question(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Samples a question that a word or two answer, and its answer.

    Asks for the number of objects, the background, or the color, shape or location of an object
    that is the only one of its description.
    """
    obj = pick(rng, scene.objects)
    count = sum(_kind(obj).matches(candidate) for candidate in scene.objects)
    options = [("How many shapes are there?", NUMBERS[len(scene.objects) - 1])]
    options.append(("What is the colour of the background?", scene.background))
    if sum(candidate.shape == obj.shape for candidate in scene.objects) == 1:
        options += [(f"What is the colour of the {obj.shape}?", obj.color)] * 2
    if sum(candidate.color == obj.color for candidate in scene.objects) == 1:
        options += [(f"What shape is the {obj.color} shape?", obj.shape)] * 2
    if count == 1:
        options += [(f"Where is the {obj.color} {obj.shape}?", position(obj))] * 2
    else:
        plural = name(obj.shape, obj.color, 2)
        options.append((f"How many {plural} are there?", NUMBERS[count - 1]))
    return pick(rng, options)
