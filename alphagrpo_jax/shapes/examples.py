"""Samples pretraining examples of the shapes world: drawing, captions, answers, edits, repairs.

Requests are of the train split only, and so are the combinations in images to caption, to ask
about and to edit (before and after); images generated for a request, or spoiled to be repaired, may
show any combination. Riddles are read as `requests.resolve` reads them, and the image always
agrees with the think text, correct or not.
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
RELATION_SHARE = 0.5  # of `plan_example`
RIGHT_SHARE = 0.2  # repairs of images that need none


@dataclasses.dataclass(frozen=True)
class DrawExample:
    """Draw `scene` for `prompt`, planning it in `think`."""

    prompt: str
    think: str
    scene: scenes.Scene
    request: requests.Request


@dataclasses.dataclass(frozen=True)
class CaptionExample:
    """Caption `scene` with `text` as `instruction` says."""

    instruction: str
    scene: scenes.Scene
    text: str


@dataclasses.dataclass(frozen=True)
class AnswerExample:
    """Answer `question` about `scene`; the optional `think` describes the scene."""

    question: str
    scene: scenes.Scene
    think: str
    answer: str


@dataclasses.dataclass(frozen=True)
class EditExample:
    """Change `scene` into `target` as `instruction` says."""

    instruction: str
    scene: scenes.Scene
    think: str
    target: scenes.Scene


@dataclasses.dataclass(frozen=True)
class ReflectExample:
    """Repair `scene`, drawn for `prompt`, into `target`; `think` names the flaws.

    `right`: the scene already fulfills the request as read, and target equals scene.
    """

    prompt: str
    scene: scenes.Scene
    think: str
    target: scenes.Scene
    right: bool
    request: requests.Request


PretrainExample = DrawExample | CaptionExample | AnswerExample | EditExample | ReflectExample


def train_scene(rng: np.random.Generator) -> scenes.Scene:
    """Samples a scene whose combination belongs to the train split."""
    while True:
        scene = scenes.place_objects(
            rng,
            [
                (pick(rng, scenes.SHAPES), pick(rng, COLORS))
                for _ in range(int(rng.integers(1, scenes.MAX_OBJECTS + 1)))
            ],
            pick(rng, BACKGROUNDS),
        )
        if describe(scene).split == "train":
            return scene


def _request(rng: np.random.Generator, implied_share: float) -> requests.Request:
    implied = rng.random() < implied_share
    return requests.sample_implied(rng) if implied else requests.sample_plain(rng)


def draw_example(rng: np.random.Generator, implied_share: float = IMPLIED_SHARE) -> DrawExample:
    """Samples a drawing example; `implied_share` of them are implied requests."""
    return _draw_request(_request(rng, implied_share), rng)


def plan_example(rng: np.random.Generator) -> DrawExample:
    """Samples a drawing example to learn the think text of; `RELATION_SHARE` are relations."""
    if rng.random() < RELATION_SHARE:
        return _draw_request(requests.sample_plain(rng, "relation"), rng)
    return draw_example(rng)


def _draw_request(request: requests.Request, rng: np.random.Generator) -> DrawExample:
    spec, sentences = requests.resolve(request, rng)
    scene = sample_scene(spec, rng)
    return DrawExample(request.text, language.think(scene, sentences), scene, request)


def caption_example(rng: np.random.Generator) -> CaptionExample:
    """Samples a caption example: layout, kinds and counts, shapes, a relation, or background."""
    scene = train_scene(rng)
    form, objects = rng.random(), scene.objects
    if form < 0.5:
        return CaptionExample("Describe the layout.", scene, language.layout(scene))
    if form < 0.65:
        words = f"{counted_objects(scene)} on a {scene.background} background"
        return CaptionExample("Describe the image.", scene, words)
    if form < 0.75:
        shapes = language.join([obj.shape for obj in objects])
        return CaptionExample("List the shapes.", scene, shapes)
    if form < 0.8:
        return CaptionExample("Describe the background.", scene, f"{scene.background} background")
    if len(objects) > 1 and form < 0.95:
        words = pick(rng, relation_phrases(scene))
        return CaptionExample("Describe how two shapes lie.", scene, words)
    return CaptionExample("What is in the image?", scene, counted_objects(scene))


def counted_objects(scene: scenes.Scene) -> str:
    """Describes a scene's objects by kind: "two red circles and a blue square"."""
    return language.join([language.counted(group) for group in describe(scene).groups])


def relation_phrases(scene: scenes.Scene) -> list[str]:
    """Describes all relations between a scene's first two objects."""
    first, second = scene.objects[:2]
    a, b = (article(name(obj.shape, obj.color)) for obj in (first, second))
    holding = [relation for relation in RELATIONS if related(relation, first, second)]
    return [f"{a} {questions.WHERE[relation]} {b}" for relation in holding]


def answer_example(rng: np.random.Generator) -> AnswerExample:
    """Samples an answering example: two thirds yes/no questions, one third open ones."""
    scene = train_scene(rng)
    think = language.think(scene)
    if rng.random() < 1 / 3:
        question, words = questions.open_question(scene, rng)
        return AnswerExample(question, scene, think, words)
    sound: dict[str, bool] = dict.fromkeys(questions.QUALITY, True)
    type_ = pick(rng, questions.SEMANTIC)
    query = questions.sample_query(scene, type_, rng)
    wording = int(rng.integers(len(questions.WORDINGS[query.form])))
    yes = questions.truth(query, scene, sound)
    return AnswerExample(questions.text(query, wording), scene, think, "yes" if yes else "no")


def _replace(scene: scenes.Scene, index: int, **changes: object) -> scenes.Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def _remove(scene: scenes.Scene, index: int) -> scenes.Scene:
    return dataclasses.replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])


def _add(scene: scenes.Scene, obj: scenes.SceneObject) -> scenes.Scene:
    return dataclasses.replace(scene, objects=(*scene.objects, obj))


def _pick_except(rng: np.random.Generator, options: Sequence[str], excluded: str) -> str:
    return pick(rng, [option for option in options if option != excluded])


def _free_cell(rng: np.random.Generator, scene: scenes.Scene) -> tuple[int, int]:
    occupied = {(obj.row, obj.col) for obj in scene.objects}
    cells = [(row, col) for row in range(scenes.GRID) for col in range(scenes.GRID)]
    return pick(rng, [cell for cell in cells if cell not in occupied])


def _new_object(rng: np.random.Generator, scene: scenes.Scene) -> scenes.SceneObject:
    row, col = _free_cell(rng, scene)
    dx, dy = rng.uniform(-scenes.MAX_JITTER, scenes.MAX_JITTER, 2)
    shape, color = pick(rng, scenes.SHAPES), pick(rng, COLORS)
    return scenes.SceneObject(shape, color, row, col, float(dx), float(dy))


def edit_scene(
    rng: np.random.Generator, scene: scenes.Scene, operation: str
) -> tuple[str, scenes.Scene]:
    """Edits a random object, named by color and shape, or the background.

    Args:
      rng: source of randomness.
      scene: the scene to edit.
      operation: one of `possible_operations`.
    Returns:
      The instruction and the edited scene.
    """
    index = int(rng.integers(len(scene.objects)))
    obj = scene.objects[index]
    is_unique = sum(candidate.shape == obj.shape for candidate in scene.objects) == 1
    by_shape = is_unique and rng.random() < 0.5
    subject = f"the {obj.shape}" if by_shape else f"the {obj.color} {obj.shape}"
    if operation == "color":
        color = _pick_except(rng, COLORS, obj.color)
        return f"make {subject} {color}", _replace(scene, index, color=color)
    if operation == "shape":
        shape = _pick_except(rng, scenes.SHAPES, obj.shape)
        return f"turn {subject} into {article(shape)}", _replace(scene, index, shape=shape)
    if operation == "remove":
        return f"remove {subject}", _remove(scene, index)
    if operation == "move":
        row, col = _free_cell(rng, scene)
        target = _replace(scene, index, row=row, col=col)
        return f"move {subject} to {position(target.objects[index])}", target
    if operation == "add":
        new = _new_object(rng, scene)
        return f"add {article(name(new.shape, new.color))} {position(new)}", _add(scene, new)
    background = _pick_except(rng, BACKGROUNDS, scene.background)
    target = dataclasses.replace(scene, background=background)
    return f"change the background to {background}", target


def possible_operations(scene: scenes.Scene) -> list[str]:
    """Returns the operations of `edit_scene` that a scene allows."""
    operations = ["color", "shape", "move", "background"]
    operations += ["remove"] if len(scene.objects) > 1 else []
    return operations + (["add"] if len(scene.objects) < scenes.MAX_OBJECTS else [])


def edit_example(rng: np.random.Generator) -> EditExample:
    """Samples an editing example: one change that its instruction names unambiguously."""
    while True:
        scene = train_scene(rng)
        if any(group.count > 1 for group in describe(scene).groups):
            continue
        instruction, target = edit_scene(rng, scene, pick(rng, possible_operations(scene)))
        if describe(target).split == "train":
            return EditExample(instruction, scene, language.think(target), target)


def _spoil(
    rng: np.random.Generator, spec: Spec, scene: scenes.Scene, operation: str, index: int
) -> tuple[scenes.Scene, tuple[str, str]]:
    """Breaks one fact of a scene.

    Returns:
      The spoiled scene, and the remark and the wish of a reflection upon it.
    """
    obj = scene.objects[index]
    kind = name(obj.shape, obj.color)
    if operation == "color":
        wrong = _pick_except(rng, COLORS, obj.color)
        remark = f"the {obj.shape} {position(obj)} is {wrong} but should be {obj.color}"
        wish = f"make the {wrong} {obj.shape} {obj.color}"
        return _replace(scene, index, color=wrong), (remark, wish)
    if operation == "shape":
        wrong = _pick_except(rng, scenes.SHAPES, obj.shape)
        remark = f"the {obj.color} {wrong} {position(obj)} should be {article(obj.shape)}"
        wish = f"turn the {obj.color} {wrong} into {article(obj.shape)}"
        return _replace(scene, index, shape=wrong), (remark, wish)
    if operation == "missing":
        remark = f"{article(kind)} is missing"
        return _remove(scene, index), (remark, f"add {article(kind)} {position(obj)}")
    if operation == "extra":
        new = _new_object(rng, scene)
        extra = name(new.shape, new.color)
        remarks = (f"{article(extra)} too many", f"remove the {extra} {position(new)}")
        return _add(scene, new), remarks
    if operation == "relation" and spec.relation is not None:
        second = scene.objects[1 - index]
        relation = spec.relation.name if index == 0 else INVERSE[spec.relation.name]
        row, col = _free_cell(rng, scene)
        where = f"{questions.WHERE[relation]} the {name(second.shape, second.color)}"
        wish = f"move the {kind} to {position(obj)}"
        return _replace(scene, index, row=row, col=col), (f"the {kind} is not {where}", wish)
    wrong = _pick_except(rng, BACKGROUNDS, scene.background)
    remark = f"the background is {wrong} but should be {scene.background}"
    wish = f"change the background to {scene.background}"
    return dataclasses.replace(scene, background=wrong), (remark, wish)


def _flaws(spec: Spec) -> list[str]:
    """Returns the operations of `_spoil` that break a spec, the frequent ones repeatedly."""
    operations = []
    if any(group.color for group in spec.groups):
        operations += ["color"] * 2
    if any(group.shape for group in spec.groups):
        operations += ["shape"] * 2
    if spec.total > 1:
        operations += ["missing"]
    if spec.total < scenes.MAX_OBJECTS:
        operations += ["extra"]
    if spec.relation is not None:
        operations += ["relation"] * 3
    if spec.background is not None:
        operations += ["background"] * 2
    return operations


def flawed_scene(
    rng: np.random.Generator, spec: Spec, target: scenes.Scene
) -> tuple[scenes.Scene, tuple[str, ...]]:
    """Samples a scene that fails `spec` in one fact, at times in two, and remarks upon it."""
    operations = _flaws(spec)
    while True:
        first, second = pick(rng, operations), pick(rng, operations)
        order = rng.permutation(len(target.objects))
        scene, remarks = _spoil(rng, spec, target, first, int(order[0]))
        if satisfied(spec, scene):
            continue
        if {first, second} <= {"color", "shape"} and len(order) > 1 and rng.random() < 0.5:
            spoiled, more = _spoil(rng, spec, target, second, int(order[1]))
            if not satisfied(spec, spoiled):
                changes = dataclasses.asdict(spoiled.objects[order[1]])
                spoiled_twice = _replace(scene, int(order[1]), **changes)
                return spoiled_twice, (remarks[0], more[0], remarks[1], more[1])
        return scene, remarks


def reflect_example(
    rng: np.random.Generator, implied_share: float = IMPLIED_SHARE
) -> ReflectExample:
    """Samples a repair: an image that fails its prompt, or (`RIGHT_SHARE`) needs no repair."""
    while True:
        request = _request(rng, implied_share)
        spec, sentences = requests.resolve(request, rng)
        if spec.unambiguous:
            break
    target = sample_scene(spec, rng)
    right = bool(rng.random() < RIGHT_SHARE)
    if right:
        scene, remarks = target, ("nothing is wrong", "keep it")
    else:
        scene, remarks = flawed_scene(rng, spec, target)
    think = language.reflection((*sentences, *remarks), target)
    return ReflectExample(request.text, scene, think, target, right, request)


def render_batch(batch: Sequence[scenes.Scene]) -> np.ndarray:
    """Renders scenes: uint8[N, 48, 48, 3]."""
    return np.stack([scenes.render(scene) for scene in batch])
