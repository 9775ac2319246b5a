"""Samples random requests: a spec, its riddles, and the prompt's text.

Plain requests have five types (`PLAIN_TYPES`), implied ones four (`IMPLIED_TYPES`: the attribute
that the riddle implies; "two" means two riddles at once).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from alphagrpo_jax.shapes import language, riddles, scenes
from alphagrpo_jax.shapes.riddles import Riddle
from alphagrpo_jax.shapes.specs import (
    BACKGROUNDS,
    COLORS,
    NUMBERS,
    RELATIONS,
    Group,
    Relation,
    Spec,
    pick,
)

PLAIN_TYPES = ("existence", "attribute", "count", "relation", "background")
IMPLIED_TYPES = ("color", "shape", "number", "two")
# Forms of implied requests -> share. "pair", "relation" and "background" carry one riddle for a
# color or a shape; the two forms with a plus carry two riddles. Forms of one group
# (`ONE_GROUP_FORMS`) name a background at times, because few such groups exist to split.
IMPLIED_FORMS = {
    "color": 0.12,
    "shape": 0.12,
    "pair": 0.18,
    "relation": 0.12,
    "background": 0.10,
    "number": 0.20,
    "color+shape": 0.10,
    "number+color": 0.06,
}
ONE_GROUP_FORMS = ("color", "shape", "number", "color+shape", "number+color")
BACKGROUND_SHARE = 0.5  # of requests of `ONE_GROUP_FORMS`
MAX_TRIALS = 20_000  # samples before giving up on a split that has no such request


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and its true meaning.

    Attributes:
      text: the prompt.
      kind: "plain" or "implied".
      type: one of `PLAIN_TYPES` or `IMPLIED_TYPES`.
      spec: the true meaning.
      riddles: one mapping (kind -> riddle) per group of the spec.
    """

    text: str
    kind: str
    type: str
    spec: Spec
    riddles: tuple[language.GroupRiddles, ...]

    @property
    def all_riddles(self) -> tuple[Riddle, ...]:
        """Returns the request's riddles, in the order of the groups."""
        return tuple(riddle for group in self.riddles for riddle in group.values())


def _full(rng: np.random.Generator, count: int = 1) -> Group:
    return Group(count, pick(rng, scenes.SHAPES), pick(rng, COLORS))


def _existence(rng: np.random.Generator) -> Spec:
    """Samples one to three objects, at least one of them open in color or shape, never in both."""
    by_shape = rng.random() < 0.6
    groups = []
    for index in range(int(rng.integers(1, 4))):
        group = _full(rng)
        if index == 0 or rng.random() < 0.6:
            group = dataclasses.replace(group, **({"color": None} if by_shape else {"shape": None}))
        groups.append(group)
    return Spec(tuple(groups[i] for i in rng.permutation(len(groups))))


def _attribute(rng: np.random.Generator) -> Spec:
    return Spec(tuple(_full(rng) for _ in range(int(rng.integers(1, 4)))))


def _count(rng: np.random.Generator) -> Spec:
    if rng.random() < 0.4:
        return Spec((_full(rng, 2), _full(rng)))
    group = _full(rng, int(rng.integers(2, 4)))
    drop = rng.random()
    if drop < 0.25:
        group = dataclasses.replace(group, color=None)
    elif drop < 0.4:
        group = dataclasses.replace(group, shape=None)
    return Spec((group,))


def _relation(rng: np.random.Generator) -> Spec:
    return Spec((_full(rng), _full(rng)), Relation(pick(rng, RELATIONS), 0, 1))


def _background(rng: np.random.Generator) -> Spec:
    groups = tuple(_full(rng) for _ in range(int(rng.integers(1, 3))))
    return Spec(groups, None, pick(rng, BACKGROUNDS))


_SAMPLE_SPEC = {
    "existence": _existence,
    "attribute": _attribute,
    "count": _count,
    "relation": _relation,
    "background": _background,
}


def sample_plain(
    rng: np.random.Generator, type_: str | None = None, split: str | None = "train"
) -> Request:
    """Samples a plain request of a type (default: any) from a split (None: from any).

    Raises:
      ValueError: the split has no such request.
    """
    type_ = type_ or pick(rng, PLAIN_TYPES)
    for _ in range(MAX_TRIALS):
        spec = _SAMPLE_SPEC[type_](rng)
        if spec.unambiguous and split in (None, spec.split):
            no_riddles = ({},) * len(spec.groups)
            return Request(language.prompt(spec, no_riddles, rng), "plain", type_, spec, no_riddles)
    raise ValueError(f"found no {type_} request of split {split!r} in {MAX_TRIALS} samples")


def _with_meanings(group: Group, chosen: Sequence[Riddle]) -> Group:
    for riddle in chosen:
        group = _with_reading(group, riddle, riddle.meaning)
    return group


def _with_reading(group: Group, riddle: Riddle, reading: str) -> Group:
    if riddle.kind == "number":
        return dataclasses.replace(group, count=NUMBERS.index(reading) + 1)
    return dataclasses.replace(group, **{riddle.kind: reading})


def _implied(
    rng: np.random.Generator, form: str, pool: Sequence[Riddle]
) -> tuple[Spec, tuple[language.GroupRiddles, ...]]:
    kinds = form.split("+")
    if form in ("pair", "relation", "background"):
        kinds = ["color" if rng.random() < 0.5 else "shape"]
    chosen = [pick(rng, [r for r in pool if r.kind == kind]) for kind in kinds]
    base = _full(rng)
    if form == "number" and rng.random() < 0.3:
        base = dataclasses.replace(base, color=None)
    groups = [_with_meanings(base, chosen)]
    group_riddles: list[language.GroupRiddles] = [{r.kind: r for r in chosen}]
    if form in ("pair", "relation"):
        position = int(rng.integers(2))
        groups.insert(position, _full(rng))
        group_riddles.insert(position, {})
    relation = Relation(pick(rng, RELATIONS), 0, 1) if form == "relation" else None
    with_background = form == "background" or (
        form in ONE_GROUP_FORMS and rng.random() < BACKGROUND_SHARE
    )
    background = pick(rng, BACKGROUNDS) if with_background else None
    return Spec(tuple(groups), relation, background), tuple(group_riddles)


def sample_implied(
    rng: np.random.Generator,
    form: str | None = None,
    split: str | None = "train",
    pool: Sequence[Riddle] = riddles.RIDDLES,
) -> Request:
    """Samples an implied request of a form of `IMPLIED_FORMS` (default: by share).

    Args:
      rng: source of randomness.
      form: names the attributes that are riddles.
      split: the split of the true meaning; None for any.
      pool: riddles to pick from.
    Raises:
      ValueError: the split has no such request, or the pool no riddle of a kind that is needed.
    """
    forms, shares = list(IMPLIED_FORMS), list(IMPLIED_FORMS.values())
    form = form or forms[int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares)))]
    for _ in range(MAX_TRIALS):
        spec, group_riddles = _implied(rng, form, pool)
        if not (spec.unambiguous and split in (None, spec.split)):
            continue
        kinds = [kind for group in group_riddles for kind in group]
        type_ = kinds[0] if len(kinds) == 1 else "two"
        prompt = language.prompt(spec, group_riddles, rng)
        return Request(prompt, "implied", type_, spec, group_riddles)
    raise ValueError(
        f"found no {form} request of split {split!r} with {len(pool)} riddles "
        f"in {MAX_TRIALS} samples"
    )


def resolve(request: Request, rng: np.random.Generator) -> tuple[Spec, tuple[str, ...]]:
    """Samples readings of a request's riddles, correct or wrong, as pretraining does.

    Returns:
      The spec as read, and the think text's sentences, one per riddle. The spec as read may be
      ambiguous (a misread color may repeat another group's).
    """
    groups, sentences = [], []
    for group, group_riddles in zip(request.spec.groups, request.riddles, strict=True):
        for riddle in group_riddles.values():
            reading = riddles.sample_reading(riddle, rng)
            sentences.append(riddle.resolution(reading))
            group = _with_reading(group, riddle, reading)
        groups.append(group)
    return dataclasses.replace(request.spec, groups=tuple(groups)), tuple(sentences)


def truth(request: Request) -> tuple[str, ...]:
    """Returns the correct resolutions of a request's riddles, one sentence each."""
    return tuple(riddle.resolution(riddle.meaning) for riddle in request.all_riddles)
