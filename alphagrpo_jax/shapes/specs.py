"""What a prompt asks for (`Spec`), scenes that satisfy it, and the facts it consists of.

Conventions: the groups of a clear spec exclude each other (no shape belongs to two of them); the
number of shapes in a fitting scene is exactly the sum of the groups' counts. "left of" compares
grid columns and "above" grid rows, strictly.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from alphagrpo_jax.shapes import scenes

NUMBERS = ("one", "two", "three")  # NUMBERS[count - 1]
COLORS = tuple(scenes.COLORS)
BACKGROUNDS = tuple(scenes.BACKGROUNDS)
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "validation", "heldout")
HELDOUT_PERCENT, VALIDATION_PERCENT = 12, 8


@dataclasses.dataclass(frozen=True)
class Group:
    """`count` shapes alike; a shape or colour of None is left open, for each member by itself."""

    count: int
    shape: str | None
    color: str | None

    def matches(self, thing: scenes.Thing) -> bool:
        """Whether a shape in a scene fits the description."""
        return self.shape in (None, thing.shape) and self.color in (None, thing.color)

    def overlaps(self, other: "Group") -> bool:
        """Whether one shape could fit both descriptions."""
        same_shape = self.shape is None or other.shape is None or self.shape == other.shape
        same_color = self.color is None or other.color is None or self.color == other.color
        return same_shape and same_color

    @property
    def key(self) -> str:
        """Canonical text, "2 red circle"; an open attribute is "any"."""
        return f"{self.count} {self.color or 'any'} {self.shape or 'any'}"


@dataclasses.dataclass(frozen=True)
class Relation:
    """Group `first` lies `name` (see `RELATIONS`) group `second`; both have one member."""

    name: str
    first: int
    second: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """Groups of shapes, at most one relation between two of them, and maybe a background."""

    groups: tuple[Group, ...]
    relation: Relation | None = None
    background: str | None = None

    @property
    def total(self) -> int:
        """Number of shapes in a fitting scene."""
        return sum(group.count for group in self.groups)

    @property
    def clear(self) -> bool:
        """Whether no shape could belong to two groups."""
        pairs = ((a, b) for i, a in enumerate(self.groups) for b in self.groups[:i])
        return not any(a.overlaps(b) for a, b in pairs)

    @property
    def combination(self) -> str:
        """Canonical text: equal for specs of equal meaning, whatever the wording or order."""
        parts = [" + ".join(sorted(group.key for group in self.groups))]
        if self.relation is not None:
            name, first, second = dataclasses.astuple(self.relation)
            if name in ("right of", "below"):
                name, first, second = INVERSE[name], second, first
            parts.append(f"{self.groups[first].key} {name} {self.groups[second].key}")
        if self.background is not None:
            parts.append(f"on {self.background}")
        return " | ".join(parts)

    @property
    def split(self) -> str:
        """The split (see `SPLITS`) that this combination belongs to, by its hash."""
        digest = hashlib.sha256(self.combination.encode()).digest()
        bucket = int.from_bytes(digest[:8], "big") % 100
        if bucket < HELDOUT_PERCENT:
            return "heldout"
        return "validation" if bucket < HELDOUT_PERCENT + VALIDATION_PERCENT else "train"

    def to_json(self) -> dict:
        """A JSON-serialisable form, read back by `from_json`."""
        relation = None if self.relation is None else dataclasses.asdict(self.relation)
        groups = [dataclasses.asdict(group) for group in self.groups]
        return {"groups": groups, "relation": relation, "background": self.background}

    @classmethod
    def from_json(cls, data: dict) -> "Spec":
        """Reads `to_json`'s form.

        Raises:
          ValueError: a field is missing or unknown.
        """
        try:
            groups = tuple(Group(**group) for group in data["groups"])
            relation = None if data["relation"] is None else Relation(**data["relation"])
            return cls(groups, relation, data["background"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a shapes-world spec: got {data!r}; expected groups (count, shape, color), "
                "relation (name, first, second) or null, and background or null"
            ) from error


def related(name: str, first: scenes.Thing, second: scenes.Thing) -> bool:
    """Whether `first` lies `name` `second` on the grid, strictly."""
    if name in ("left of", "right of"):
        step = second.col - first.col
    elif name in ("above", "below"):
        step = second.row - first.row
    else:
        raise ValueError(f"unknown relation {name!r}; expected one of {RELATIONS}")
    return step > 0 if name in ("left of", "above") else step < 0


def facts(spec: Spec, things: Sequence[scenes.Thing], background: str | None) -> dict[str, bool]:
    """The facts that a spec asks for, decided for a scene given as shapes and background.

    Returns:
      name -> truth: one count per group, the total, and the relation and background if asked for.
      A relation holds if both groups have members and it holds between all of them.
    """
    members = [[thing for thing in things if group.matches(thing)] for group in spec.groups]
    result = {
        f"count {group.key}": len(found) == group.count
        for group, found in zip(spec.groups, members, strict=True)
    }
    result["total"] = len(things) == spec.total
    if spec.relation is not None:
        first, second = members[spec.relation.first], members[spec.relation.second]
        pairs = [related(spec.relation.name, a, b) for a in first for b in second]
        result["relation"] = bool(pairs) and all(pairs)
    if spec.background is not None:
        result["background"] = background == spec.background
    return result


def satisfied(spec: Spec, scene: scenes.Scene) -> bool:
    """Whether a scene fulfils every fact of a spec."""
    return all(facts(spec, scene.things, scene.background).values())


def pick(rng: np.random.Generator, options: Sequence) -> object:
    """One of `options`, uniformly."""
    return options[int(rng.integers(len(options)))]


def sample_scene(spec: Spec, rng: np.random.Generator) -> scenes.Scene:
    """A random scene that fulfils `spec`; its shapes are in the order of the spec's groups.

    Whatever the spec leaves open (shape, colour, background, cells, jitter) is uniform.
    Raises:
      ValueError: more shapes than `scenes.MAX_THINGS`.
    """
    if not 1 <= spec.total <= scenes.MAX_THINGS:
        raise ValueError(f"spec has {spec.total} shapes; expected 1 to {scenes.MAX_THINGS}")
    kinds = [
        (group.shape or pick(rng, scenes.SHAPES), group.color or pick(rng, COLORS))
        for group in spec.groups
        for _ in range(group.count)
    ]
    background = spec.background or pick(rng, BACKGROUNDS)
    scene = scenes.place(rng, kinds, background)
    if spec.relation is None:
        return scene
    starts = np.cumsum([0] + [group.count for group in spec.groups])
    first, second = starts[spec.relation.first], starts[spec.relation.second]
    while not related(spec.relation.name, scene.things[first], scene.things[second]):
        scene = scenes.place(rng, kinds, background)
    return scene


def describe(scene: scenes.Scene) -> Spec:
    """The spec that names every shape's kind in a scene: fully specified groups, no background."""
    kinds: dict[tuple[str, str], int] = {}
    for thing in scene.things:
        kinds[thing.shape, thing.color] = kinds.get((thing.shape, thing.color), 0) + 1
    return Spec(tuple(Group(count, shape, color) for (shape, color), count in kinds.items()))
