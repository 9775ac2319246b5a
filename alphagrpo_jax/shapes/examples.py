"""Pretraining examples of the shapes world: drawing, captions, answers, edits and repairs.

Requests are of the train split only, and so are the combinations in pictures to describe, to ask
about and to edit, before and after; pictures drawn for a request, or spoilt to be repaired, may
happen to show any. An implied request's riddles are read as `requests.resolve` reads them, and
the picture always agrees with the think text, right or wrong.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from alphagrpo_jax.shapes import language, questions, requests, scenes
from alphagrpo_jax.shapes.language import article, name, position
from alphagrpo_jax.shapes.specs import (
    BACKGROUNDS,
    COLORS,
    INVERSE,
    RELATIONS,
    Spec,
    describe,
    pick,
    related,
    sample_scene,
    satisfied,
)

IMPLIED_SHARE = 0.5
RELATION_SHARE = 0.5  # of `plan`
RIGHT_SHARE = 0.2  # repairs of pictures that need none


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draw `scene` for `prompt`, planning it in `think`."""

    prompt: str
    think: str
    scene: scenes.Scene
    request: requests.Request


@dataclasses.dataclass(frozen=True)
class Caption:
    """Say about `scene` what `instruction` asks for."""

    instruction: str
    scene: scenes.Scene
    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer `question` about `scene`; `think` names what is seen and may be left out."""

    question: str
    scene: scenes.Scene
    think: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Edit:
    """Change `scene` into `target` as `instruction` says."""

    instruction: str
    scene: scenes.Scene
    think: str
    target: scenes.Scene


@dataclasses.dataclass(frozen=True)
class Reflect:
    """Repair `scene`, drawn for `prompt`, into `target`; `think` says what is wrong.

    `right`: the picture already fulfilled the request as read, and target equals scene.
    """

    prompt: str
    scene: scenes.Scene
    think: str
    target: scenes.Scene
    right: bool
    request: requests.Request


Example = Draw | Caption | Answer | Edit | Reflect


def seen_scene(rng: np.random.Generator) -> scenes.Scene:
    """A random scene whose combination belongs to the train split."""
    while True:
        scene = scenes.place(
            rng,
            [
                (pick(rng, scenes.SHAPES), pick(rng, COLORS))
                for _ in range(int(rng.integers(1, scenes.MAX_THINGS + 1)))
            ],
            pick(rng, BACKGROUNDS),
        )
        if describe(scene).split == "train":
            return scene


def _request(rng: np.random.Generator, implied_share: float) -> requests.Request:
    implied = rng.random() < implied_share
    return requests.draw_implied(rng) if implied else requests.draw_plain(rng)


def draw(rng: np.random.Generator, implied_share: float = IMPLIED_SHARE) -> Draw:
    """A drawing example; `implied_share` of them are implied requests."""
    return _drawn(_request(rng, implied_share), rng)


def plan(rng: np.random.Generator) -> Draw:
    """A drawing example of which only the think text is learned; `RELATION_SHARE` are relations."""
    if rng.random() < RELATION_SHARE:
        return _drawn(requests.draw_plain(rng, "relation"), rng)
    return draw(rng)


def _drawn(request: requests.Request, rng: np.random.Generator) -> Draw:
    spec, sentences = requests.resolve(request, rng)
    scene = sample_scene(spec, rng)
    return Draw(request.text, language.think(scene, sentences), scene, request)


def _grouped(scene: scenes.Scene) -> str:
    return language.join([language.counted(group) for group in describe(scene).groups])


def caption(rng: np.random.Generator) -> Caption:
    """A caption example: layout, kinds and counts, shapes only, a relation, or background."""
    scene = seen_scene(rng)
    form, things = rng.random(), scene.things
    if form < 0.5:
        return Caption("Describe the layout.", scene, language.layout(scene))
    if form < 0.65:
        words = f"{_grouped(scene)} on a {scene.background} background"
        return Caption("Describe the image.", scene, words)
    if form < 0.75:
        return Caption("List the shapes.", scene, language.join([t.shape for t in things]))
    if form < 0.8:
        return Caption("Describe the background.", scene, f"{scene.background} background")
    if len(things) > 1 and form < 0.95:
        first, second = things[:2]
        holding = [r for r in RELATIONS if related(r, first, second)]
        a, b = (article(name(t.shape, t.color)) for t in (first, second))
        words = f"{a} {questions.WHERE[pick(rng, holding)]} {b}"
        return Caption("Describe how two shapes lie.", scene, words)
    return Caption("What is in the image?", scene, _grouped(scene))


def answer(rng: np.random.Generator) -> Answer:
    """An answering example: two thirds yes/no questions, one third open ones."""
    scene = seen_scene(rng)
    think = language.think(scene)
    if rng.random() < 1 / 3:
        question, words = questions.open_question(scene, rng)
        return Answer(question, scene, think, words)
    sound = dict.fromkeys(questions.QUALITY, True)
    type_ = pick(rng, questions.SEMANTIC)
    query = questions.sample_query(scene, type_, rng)
    wording = int(rng.integers(len(questions.WORDINGS[query.form])))
    yes = questions.truth(query, scene, sound)
    return Answer(questions.text(query, wording), scene, think, "yes" if yes else "no")


def _replace(scene: scenes.Scene, index: int, **changes: object) -> scenes.Scene:
    things = list(scene.things)
    things[index] = dataclasses.replace(things[index], **changes)
    return dataclasses.replace(scene, things=tuple(things))


def _remove(scene: scenes.Scene, index: int) -> scenes.Scene:
    return dataclasses.replace(scene, things=scene.things[:index] + scene.things[index + 1 :])


def _other(rng: np.random.Generator, options: Sequence[str], used: str) -> str:
    return pick(rng, [option for option in options if option != used])


def _free_cell(rng: np.random.Generator, things: Sequence[scenes.Thing]) -> tuple[int, int]:
    taken = {(thing.row, thing.col) for thing in things}
    cells = [(r, c) for r in range(scenes.GRID) for c in range(scenes.GRID) if (r, c) not in taken]
    return pick(rng, cells)


def _new_thing(rng: np.random.Generator, things: Sequence[scenes.Thing]) -> scenes.Thing:
    row, col = _free_cell(rng, things)
    dx, dy = rng.uniform(-scenes.MAX_JITTER, scenes.MAX_JITTER, 2)
    shape, color = pick(rng, scenes.SHAPES), pick(rng, COLORS)
    return scenes.Thing(shape, color, row, col, float(dx), float(dy))


def change(
    rng: np.random.Generator, scene: scenes.Scene, operation: str
) -> tuple[str, scenes.Scene]:
    """One edit of a random shape, named by colour and shape, or of the background."""
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    alone = sum(t.shape == thing.shape for t in scene.things) == 1
    short = alone and rng.random() < 0.5
    subject = f"the {thing.shape}" if short else f"the {thing.color} {thing.shape}"
    if operation == "color":
        color = _other(rng, COLORS, thing.color)
        return f"make {subject} {color}", _replace(scene, index, color=color)
    if operation == "shape":
        shape = _other(rng, scenes.SHAPES, thing.shape)
        return f"turn {subject} into {article(shape)}", _replace(scene, index, shape=shape)
    if operation == "remove":
        return f"remove {subject}", _remove(scene, index)
    if operation == "move":
        row, col = _free_cell(rng, scene.things)
        changed = _replace(scene, index, row=row, col=col)
        return f"move {subject} to {position(changed.things[index])}", changed
    if operation == "add":
        new = _new_thing(rng, scene.things)
        changed = dataclasses.replace(scene, things=(*scene.things, new))
        return f"add {article(name(new.shape, new.color))} {position(new)}", changed
    background = _other(rng, BACKGROUNDS, scene.background)
    changed = dataclasses.replace(scene, background=background)
    return f"change the background to {background}", changed


def operations(scene: scenes.Scene) -> list[str]:
    """The kinds of `change` that are possible."""
    found = ["color", "shape", "move", "background"]
    found += ["remove"] if len(scene.things) > 1 else []
    return found + (["add"] if len(scene.things) < scenes.MAX_THINGS else [])


def edit(rng: np.random.Generator) -> Edit:
    """An editing example: one change that its instruction names without doubt."""
    while True:
        scene = seen_scene(rng)
        if any(group.count > 1 for group in describe(scene).groups):
            continue
        instruction, target = change(rng, scene, pick(rng, operations(scene)))
        if describe(target).split == "train":
            return Edit(instruction, scene, language.think(target), target)


def _spoil(
    rng: np.random.Generator, spec: Spec, scene: scenes.Scene, operation: str, index: int
) -> tuple[scenes.Scene, tuple[str, str]]:
    """Undoes one fact of a scene; returns it with what is wrong and the wish that repairs it."""
    thing = scene.things[index]
    kind = name(thing.shape, thing.color)
    if operation == "color":
        wrong = _other(rng, COLORS, thing.color)
        remark = f"the {thing.shape} {position(thing)} is {wrong} but should be {thing.color}"
        wish = f"make the {wrong} {thing.shape} {thing.color}"
        return _replace(scene, index, color=wrong), (remark, wish)
    if operation == "shape":
        wrong = _other(rng, scenes.SHAPES, thing.shape)
        remark = f"the {thing.color} {wrong} {position(thing)} should be {article(thing.shape)}"
        wish = f"turn the {thing.color} {wrong} into {article(thing.shape)}"
        return _replace(scene, index, shape=wrong), (remark, wish)
    if operation == "missing":
        remark = f"{article(kind)} is missing"
        return _remove(scene, index), (remark, f"add {article(kind)} {position(thing)}")
    if operation == "extra":
        new = _new_thing(rng, scene.things)
        extra = name(new.shape, new.color)
        spoilt = dataclasses.replace(scene, things=(*scene.things, new))
        return spoilt, (f"{article(extra)} too many", f"remove the {extra} {position(new)}")
    if operation == "relation":
        other = scene.things[1 - index]
        relation = spec.relation.name if index == 0 else INVERSE[spec.relation.name]
        row, col = _free_cell(rng, scene.things)
        where = f"{questions.WHERE[relation]} the {name(other.shape, other.color)}"
        wish = f"move the {kind} to {position(thing)}"
        return _replace(scene, index, row=row, col=col), (f"the {kind} is not {where}", wish)
    wrong = _other(rng, BACKGROUNDS, scene.background)
    remark = f"the background is {wrong} but should be {scene.background}"
    wish = f"change the background to {scene.background}"
    return dataclasses.replace(scene, background=wrong), (remark, wish)


def _flaws(spec: Spec) -> list[str]:
    """The ways in which a scene can fail a spec."""
    operations = []
    if any(group.color for group in spec.groups):
        operations += ["color"] * 2
    if any(group.shape for group in spec.groups):
        operations += ["shape"] * 2
    if spec.total > 1:
        operations += ["missing"]
    if spec.total < scenes.MAX_THINGS:
        operations += ["extra"]
    if spec.relation is not None:
        operations += ["relation"] * 3
    if spec.background is not None:
        operations += ["background"] * 2
    return operations


def flawed(
    rng: np.random.Generator, spec: Spec, target: scenes.Scene
) -> tuple[scenes.Scene, tuple[str, ...]]:
    """A scene that fails `spec` in one fact, at times in two, and the remarks upon it."""
    operations = _flaws(spec)
    while True:
        first, second = pick(rng, operations), pick(rng, operations)
        order = rng.permutation(len(target.things))
        scene, remarks = _spoil(rng, spec, target, first, int(order[0]))
        if satisfied(spec, scene):
            continue
        if {first, second} <= {"color", "shape"} and len(order) > 1 and rng.random() < 0.5:
            alone, more = _spoil(rng, spec, target, second, int(order[1]))
            if not satisfied(spec, alone):
                spoilt = dataclasses.asdict(alone.things[order[1]])
                both = _replace(scene, int(order[1]), **spoilt)
                return both, (remarks[0], more[0], remarks[1], more[1])
        return scene, remarks


def reflect(rng: np.random.Generator, implied_share: float = IMPLIED_SHARE) -> Reflect:
    """A repair example: a picture that fails its prompt, or (`RIGHT_SHARE`) needs no repair."""
    while True:
        request = _request(rng, implied_share)
        spec, sentences = requests.resolve(request, rng)
        if spec.clear:
            break
    target = sample_scene(spec, rng)
    right = bool(rng.random() < RIGHT_SHARE)
    if right:
        scene, remarks = target, ("nothing is wrong", "keep it")
    else:
        scene, remarks = flawed(rng, spec, target)
    think = language.reflection((*sentences, *remarks), target)
    return Reflect(request.text, scene, think, target, right, request)


def images(batch: Sequence[scenes.Scene]) -> np.ndarray:
    """Renders scenes: uint8[N, 48, 48, 3]."""
    return np.stack([scenes.render(scene) for scene in batch])
