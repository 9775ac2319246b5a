"""Measures what else the small UMM has learned: captioning, answering, editing and repairing.

    python -m alphagrpo_jax.studies.measure --skills

On scenes of held-out combinations, with greedy texts, by the exact checker:

  caption  the caption is one of those that are true and complete; by instruction
  answer   the answer is the right word, of yes/no and open questions; `thinking` writes a think
           text first
  edit     every fact of the wanted scene holds; `places`: and every shape is in its cell
  repair   a picture that fails its (plain) prompt, redrawn after a reflection, fulfils it;
           `reflection`: and the reflection begins with what is wrong with it
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alphagrpo_jax import tasks
from alphagrpo_jax.inference import Policy, TaskOutput, run_task
from alphagrpo_jax.shapes import (
    checker,
    examples,
    image_records,
    language,
    questions,
    requests,
    scenes,
    specs,
)  # fmt: skip

SEED = 31


# ---------------------------------------------------------------- looking at pictures

CAPTION = tasks.Task("caption", (tasks.SEEN_IMAGE, tasks.TEXT, tasks.ANSWER), image="record")


def answer_texts(
    policy_: Policy, images: np.ndarray, asked: Sequence[str], task: tasks.Task
) -> list[str]:
    """What the policy answers about each image, greedily.

    Args:
      policy_: who answers.
      images: uint8[B, 48, 48, 3], seen by the ViT alone.
      asked: B questions or instructions.
      task: `CAPTION`, at once, or `tasks.TASKS["ti2t"]`, after a think text.
    """
    return run_task(policy_, task, asked, images, seed=SEED, temperature=0.0).texts[-1]


def refine_images(
    policy_: Policy, images: np.ndarray, asked: Sequence[str], task: tasks.Task
) -> TaskOutput:
    """Thinks greedily about each image and what is asked, then draws another.

    Args:
      policy_: who draws; sampling is that of its configuration's `eval` section.
      images: uint8[B, 48, 48, 3].
      asked: B instructions of "ti2i", or prompts of "srr".
      task: one of these two.
    """
    return run_task(policy_, task, asked, images, seed=SEED, temperature=0.0)


# ---------------------------------------------------------------- the skills


def _grouped(scene: scenes.Scene) -> str:
    return language.join([language.counted(group) for group in specs.describe(scene).groups])


def _relations(scene: scenes.Scene) -> list[str]:
    first, second = scene.objects[:2]
    a, b = (language.article(language.name(t.shape, t.color)) for t in (first, second))
    holding = [r for r in specs.RELATIONS if specs.related(r, first, second)]
    return [f"{a} {questions.WHERE[relation]} {b}" for relation in holding]


# Instruction -> the captions of a scene whose shapes are named in their order.
CAPTIONS: dict[str, Callable[[scenes.Scene], list[str]]] = {
    "Describe the layout.": lambda scene: [language.layout(scene)],
    "Describe the image.": lambda scene: [
        f"{_grouped(scene)} on a {scene.background} background",
    ],
    "List the shapes.": lambda scene: [language.join([t.shape for t in scene.objects])],
    "Describe the background.": lambda scene: [f"{scene.background} background"],
    "What is in the image?": lambda scene: [_grouped(scene)],
    "Describe how two shapes lie.": _relations,
}


def captions(instruction: str, scene: scenes.Scene) -> set[str]:
    """All captions of a scene that are true and complete, whatever the order of the shapes."""
    orders = itertools.permutations(scene.objects)
    return {
        text
        for order in orders
        for text in CAPTIONS[instruction](dataclasses.replace(scene, objects=order))
    }


def captioning(policy_: Policy, count: int) -> dict[str, float]:
    """Share of `count` captions that are true and complete, and by instruction."""
    rng = np.random.default_rng((SEED, 0))
    asked, drawn = [], []
    while len(asked) < count:
        scene, instruction = (
            image_records.scene_of_split(rng, "heldout"),
            specs.pick(rng, tuple(CAPTIONS)),
        )
        if CAPTIONS[instruction] is _relations and len(scene.objects) < 2:
            continue
        asked.append(instruction)
        drawn.append(scene)
    said = answer_texts(policy_, examples.render_batch(drawn), asked, CAPTION)
    found = collections.defaultdict(list)
    for instruction, scene, text in zip(asked, drawn, said, strict=True):
        for name in ("caption", f"caption/{instruction}"):
            found[name].append(text in captions(instruction, scene))
    return _means(found)


def answering(policy_: Policy, count: int) -> dict[str, float]:
    """Share of `count` questions answered with the right words, at once and after thinking."""
    rng = np.random.default_rng((SEED, 1))
    drawn = [image_records.scene_of_split(rng, "heldout") for _ in range(count)]
    asked, answers, types = zip(
        *(image_records.sample_question(scene, rng) for scene in drawn), strict=True
    )
    images, found = examples.render_batch(drawn), collections.defaultdict(list)
    ways = {"answer": CAPTION, "answer/thinking": tasks.TASKS["ti2t"]}
    for way, task in ways.items():
        said = answer_texts(policy_, images, asked, task)
        for text, answer, type_ in zip(said, answers, types, strict=True):
            form = "open" if type_ == "open" else "yes_no"
            for name in (way, f"{way}/{form}"):
                found[name].append(text == answer)
    return _means(found)


def sample_edit(rng: np.random.Generator) -> tuple[scenes.Scene, str, scenes.Scene]:
    """A scene of a held-out combination, one change of it in words, and the scene changed."""
    while True:
        scene = image_records.scene_of_split(rng, "heldout")
        if all(group.count == 1 for group in specs.describe(scene).groups):
            break
    return scene, *examples.edit_scene(
        rng, scene, specs.pick(rng, examples.possible_operations(scene))
    )


def editing(policy_: Policy, count: int) -> dict[str, float]:
    """Share of `count` edits after which the wanted scene is there, by facts and by places."""
    rng = np.random.default_rng((SEED, 2))
    before, asked, targets = zip(*(sample_edit(rng) for _ in range(count)), strict=True)
    made = refine_images(policy_, examples.render_batch(before), asked, tasks.TASKS["ti2i"])
    pairs = list(zip(made.images, targets, strict=True))
    return _means(
        {
            "edit": [
                checker.exact_all(image, image_records.full_spec(target)) for image, target in pairs
            ],
            "edit/places": [checker.shows_scene(image, target) for image, target in pairs],
        }
    )


def repairing(policy_: Policy, count: int) -> dict[str, float]:
    """Of `count` failed pictures: the share whose reflection begins with what is wrong, and the
    share that fulfil their prompt after it.
    """
    rng = np.random.default_rng((SEED, 3))
    wanted = [requests.sample_plain(rng, split="heldout") for _ in range(count)]
    failed, remarks = zip(
        *(examples.flawed_scene(rng, w.spec, specs.sample_scene(w.spec, rng)) for w in wanted),
        strict=True,
    )
    prompts = [each.text for each in wanted]
    made = refine_images(policy_, examples.render_batch(failed), prompts, tasks.TASKS["srr"])
    pairs = zip(made.images, wanted, strict=True)
    said = zip(made.texts[0], remarks, strict=True)
    return _means(
        {
            "repair": [checker.exact_all(image, each.spec) for image, each in pairs],
            "reflection": [text.startswith(f"<think> {found[0]}.") for text, found in said],
        }
    )


def measure(policy_: Policy, count: int) -> dict[str, float]:
    """All skills, `count` examples of each."""
    skills = (captioning, answering, editing, repairing)
    return {name: share for skill in skills for name, share in skill(policy_, count).items()}


def _means(found: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: float(np.mean(held)) for name, held in sorted(found.items())}
