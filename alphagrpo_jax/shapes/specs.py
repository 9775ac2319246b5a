"""Specs: the meaning of a prompt as data, the facts it consists of, and scenes that satisfy it.

Conventions: the groups of an unambiguous spec exclude each other (no object belongs to two of
them); a fitting scene has exactly as many objects as the groups' counts sum to. "left of" compares
grid columns and "above" grid rows, strictly.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.shapes import scenes

NUMBERS = ("one", "two", "three")  # NUMBERS[count - 1]
COLORS = tuple(scenes.COLORS)
BACKGROUNDS = tuple(scenes.BACKGROUNDS)
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "validation", "heldout")
HELDOUT_PERCENT, VALIDATION_PERCENT = 12, 8
T = TypeVar("T")
_SPEC_FORM = (
    "expected groups (count, shape, color), relation (name, first, second) or null, with numbers "
    "of two groups, and background or null"
)


@dataclasses.dataclass(frozen=True)
class Group:
    """`count` objects alike; a shape or color of None is open, for each member by itself."""

    count: int
    shape: str | None
    color: str | None

    def matches(self, obj: scenes.SceneObject) -> bool:
        """Returns True if an object of a scene fits the description."""
        return self.shape in (None, obj.shape) and self.color in (None, obj.color)

    def overlaps(self, group: "Group") -> bool:
        """Returns True if one object could fit both descriptions."""
        shapes_agree = self.shape is None or group.shape is None or self.shape == group.shape
        colors_agree = self.color is None or group.color is None or self.color == group.color
        return shapes_agree and colors_agree

    @property
    def key(self) -> str:
        """Returns the canonical text, "2 red circle"; an open attribute is "any"."""
        return f"{self.count} {self.color or 'any'} {self.shape or 'any'}"


@dataclasses.dataclass(frozen=True)
class Relation:
    """Group `first` lies `name` (see `RELATIONS`) group `second`; both have one member."""

    name: str
    first: int
    second: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """Groups of objects, at most one relation between two of them, and an optional background."""

    groups: tuple[Group, ...]
    relation: Relation | None = None
    background: str | None = None

    @property
    def total(self) -> int:
        """Returns the number of objects in a fitting scene."""
        return sum(group.count for group in self.groups)

    @property
    def unambiguous(self) -> bool:
        """Returns True if no object could belong to two groups."""
        pairs = ((a, b) for i, a in enumerate(self.groups) for b in self.groups[:i])
        return not any(a.overlaps(b) for a, b in pairs)

    @property
    def combination(self) -> str:
        """Returns the canonical text, equal for specs of equal meaning in any wording or order."""
        clauses = [" + ".join(sorted(group.key for group in self.groups))]
        if self.relation is not None:
            name, first, second = dataclasses.astuple(self.relation)
            if name in ("right of", "below"):
                name, first, second = INVERSE[name], second, first
            clauses.append(f"{self.groups[first].key} {name} {self.groups[second].key}")
        if self.background is not None:
            clauses.append(f"on {self.background}")
        return " | ".join(clauses)

    @property
    def split(self) -> str:
        """Returns the split (of `SPLITS`) that this combination belongs to, by its hash."""
        digest = hashlib.sha256(self.combination.encode()).digest()
        bucket = int.from_bytes(digest[:8], "big") % 100
        if bucket < HELDOUT_PERCENT:
            return "heldout"
        return "validation" if bucket < HELDOUT_PERCENT + VALIDATION_PERCENT else "train"

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-serializable form, which `from_json` reads back."""
        relation = None if self.relation is None else dataclasses.asdict(self.relation)
        groups = [dataclasses.asdict(group) for group in self.groups]
        return {"groups": groups, "relation": relation, "background": self.background}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Spec":
        """Builds a spec from the form that `to_json` returns.

        Raises:
          InputError: a field is missing, unknown or wrong.
        """
        try:
            groups = tuple(Group(**group) for group in data["groups"])
            relation = None if data["relation"] is None else Relation(**data["relation"])
            spec = cls(groups, relation, data["background"])
        except (KeyError, TypeError) as error:
            raise InputError(f"not a shapes-world spec: got {data!r}; {_SPEC_FORM}") from error
        places = range(len(groups))
        if not all(type(group.count) is int for group in groups) or (
            relation is not None
            and not (
                relation.name in RELATIONS
                and relation.first in places
                and relation.second in places
            )
        ):
            raise InputError(f"not a shapes-world spec: got {data!r}; {_SPEC_FORM}")
        return spec


def related(name: str, first: scenes.SceneObject, second: scenes.SceneObject) -> bool:
    """Returns True if `first` lies `name` (of `RELATIONS`) `second` on the grid, strictly."""
    if name in ("left of", "right of"):
        step = second.col - first.col
    elif name in ("above", "below"):
        step = second.row - first.row
    else:
        raise ValueError(f"unknown relation {name!r}; expected one of {RELATIONS}")
    return step > 0 if name in ("left of", "above") else step < 0


def facts(
    spec: Spec, objects: Sequence[scenes.SceneObject], background: str | None
) -> dict[str, bool]:
    """Decides the facts that a spec asks for, for a scene's objects and background.

    Returns:
      Fact name -> truth: one count per group, the total, and the relation and background if the
      spec has them. A relation holds if both groups have members and it holds between all of them.
    """
    members = [[obj for obj in objects if group.matches(obj)] for group in spec.groups]
    result = {
        f"count {group.key}": len(matching) == group.count
        for group, matching in zip(spec.groups, members, strict=True)
    }
    result["total"] = len(objects) == spec.total
    if spec.relation is not None:
        first, second = members[spec.relation.first], members[spec.relation.second]
        pairs = [related(spec.relation.name, a, b) for a in first for b in second]
        result["relation"] = bool(pairs) and all(pairs)
    if spec.background is not None:
        result["background"] = background == spec.background
    return result


def satisfied(spec: Spec, scene: scenes.Scene) -> bool:
    """Returns True if a scene fulfills every fact of a spec."""
    return all(facts(spec, scene.objects, scene.background).values())


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Samples one of `options` uniformly."""
    return options[int(rng.integers(len(options)))]


def sample_scene(spec: Spec, rng: np.random.Generator) -> scenes.Scene:
    """Samples a scene that fulfills `spec`; its objects are in the order of the spec's groups.

    Attributes that the spec leaves open (shape, color, background, cells, jitter) are uniform.

    Raises:
      ValueError: the spec has no object, or more than `scenes.MAX_OBJECTS`.
    """
    if not 1 <= spec.total <= scenes.MAX_OBJECTS:
        raise ValueError(f"spec has {spec.total} shapes; expected 1 to {scenes.MAX_OBJECTS}")
    kinds = [
        (group.shape or pick(rng, scenes.SHAPES), group.color or pick(rng, COLORS))
        for group in spec.groups
        for _ in range(group.count)
    ]
    background = spec.background or pick(rng, BACKGROUNDS)
    scene = scenes.place_objects(rng, kinds, background)
    if spec.relation is None:
        return scene
    starts = np.cumsum([0] + [group.count for group in spec.groups])
    first, second = starts[spec.relation.first], starts[spec.relation.second]
    while not related(spec.relation.name, scene.objects[first], scene.objects[second]):
        scene = scenes.place_objects(rng, kinds, background)
    return scene


def describe(scene: scenes.Scene) -> Spec:
    """Returns the spec that names every object of a scene: full groups, no background."""
    counts: dict[tuple[str, str], int] = {}
    for obj in scene.objects:
        counts[obj.shape, obj.color] = counts.get((obj.shape, obj.color), 0) + 1
    return Spec(tuple(Group(count, shape, color) for (shape, color), count in counts.items()))
