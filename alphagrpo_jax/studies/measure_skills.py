"""Measures further skills of the small UMM: captioning, answering, editing and repairing.

    python -m alphagrpo_jax.studies.measure --skills

On scenes of held-out combinations, with greedy texts, by the exact checker:

  caption  the caption is one of those that are true and complete; also by instruction
  answer   the answer has the correct words, for yes/no and open questions; `thinking`: after a
           think text
  edit     every fact of the target scene holds; `places`: and every object is in its cell
  repair   an image that fails its (plain) prompt fulfills it after reflection and refinement;
           `reflection`: the reflection begins with the image's flaw
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alphagrpo_jax import tasks
from alphagrpo_jax.inference import Policy, run_task
from alphagrpo_jax.shapes import (
    checker,
    examples,
    image_records,
    language,
    requests,
    scenes,
    specs,
)

SEED = 31
CAPTION = tasks.Task("caption", (tasks.SEEN_IMAGE, tasks.TEXT, tasks.ANSWER), image="record")
# Instruction -> the captions of a scene that name its objects in their order.
CAPTIONS: dict[str, Callable[[scenes.Scene], list[str]]] = {
    "Describe the layout.": lambda scene: [language.layout(scene)],
    "Describe the image.": lambda scene: [
        f"{examples.counted_objects(scene)} on a {scene.background} background",
    ],
    "List the shapes.": lambda scene: [language.join([obj.shape for obj in scene.objects])],
    "Describe the background.": lambda scene: [f"{scene.background} background"],
    "What is in the image?": lambda scene: [examples.counted_objects(scene)],
    "Describe how two shapes lie.": examples.relation_phrases,
}


def answer_texts(
    policy_: Policy, images: np.ndarray, prompts: Sequence[str], task: tasks.Task
) -> list[str]:
    """Generates the policy's greedy answer about each image.

    Args:
      policy_: the policy.
      images: uint8[B, 48, 48, 3], seen by the ViT alone.
      prompts: B questions or instructions.
      task: `CAPTION`, without thinking, or `tasks.TASKS["ti2t"]`, after a think text.
    """
    return run_task(policy_, task, prompts, images, seed=SEED, temperature=0.0).texts[-1]


def refine_images(
    policy_: Policy, images: np.ndarray, prompts: Sequence[str], task: tasks.Task
) -> tuple[np.ndarray, list[str]]:
    """Edits or refines each image after a greedy think text.

    Args:
      policy_: the policy; images are sampled with its configuration's `eval` settings.
      images: uint8[B, 48, 48, 3].
      prompts: B instructions of "ti2i", or prompts of "srr".
      task: `tasks.TASKS["ti2i"]` or `tasks.TASKS["srr"]`.
    Returns:
      The new images, uint8[B, 48, 48, 3], and the think texts.
    """
    output = run_task(policy_, task, prompts, images, seed=SEED, temperature=0.0)
    if output.images is None:
        raise ValueError(f"task {task.name} returned no images; give one that generates images")
    return output.images, output.texts[0]


def captions(instruction: str, scene: scenes.Scene) -> set[str]:
    """Returns all true and complete captions of a scene, with its objects in any order."""
    orders = itertools.permutations(scene.objects)
    return {
        text
        for order in orders
        for text in CAPTIONS[instruction](dataclasses.replace(scene, objects=order))
    }


def captioning(policy_: Policy, count: int) -> dict[str, float]:
    """Measures the share of `count` captions that are true and complete, also by instruction."""
    rng = np.random.default_rng((SEED, 0))
    instructions, heldout_scenes = [], []
    while len(instructions) < count:
        scene = image_records.scene_of_split(rng, "heldout")
        instruction = specs.pick(rng, tuple(CAPTIONS))
        if CAPTIONS[instruction] is examples.relation_phrases and len(scene.objects) < 2:
            continue
        instructions.append(instruction)
        heldout_scenes.append(scene)
    texts = answer_texts(policy_, examples.render_batch(heldout_scenes), instructions, CAPTION)
    correct = collections.defaultdict(list)
    for instruction, scene, text in zip(instructions, heldout_scenes, texts, strict=True):
        for name in ("caption", f"caption/{instruction}"):
            correct[name].append(text in captions(instruction, scene))
    return _means(correct)


def answering(policy_: Policy, count: int) -> dict[str, float]:
    """Measures the share of `count` questions answered correctly, without and with thinking."""
    rng = np.random.default_rng((SEED, 1))
    heldout_scenes = [image_records.scene_of_split(rng, "heldout") for _ in range(count)]
    texts, answers, types = zip(
        *(image_records.sample_question(scene, rng) for scene in heldout_scenes), strict=True
    )
    images, correct = examples.render_batch(heldout_scenes), collections.defaultdict(list)
    for name, task in (("answer", CAPTION), ("answer/thinking", tasks.TASKS["ti2t"])):
        replies = answer_texts(policy_, images, texts, task)
        for reply, answer, type_ in zip(replies, answers, types, strict=True):
            form = "open" if type_ == "open" else "yes_no"
            correct[name].append(reply == answer)
            correct[f"{name}/{form}"].append(reply == answer)
    return _means(correct)


def sample_edit(rng: np.random.Generator) -> tuple[scenes.Scene, str, scenes.Scene]:
    """Samples a scene of a held-out combination, one edit as an instruction, and the target."""
    while True:
        scene = image_records.scene_of_split(rng, "heldout")
        if all(group.count == 1 for group in specs.describe(scene).groups):
            break
    operation = specs.pick(rng, examples.possible_operations(scene))
    return scene, *examples.edit_scene(rng, scene, operation)


def editing(policy_: Policy, count: int) -> dict[str, float]:
    """Measures the share of `count` edits that reach the target, by facts and by cells."""
    rng = np.random.default_rng((SEED, 2))
    sources, instructions, targets = zip(*(sample_edit(rng) for _ in range(count)), strict=True)
    images = examples.render_batch(sources)
    edited, _ = refine_images(policy_, images, instructions, tasks.TASKS["ti2i"])
    pairs = list(zip(edited, targets, strict=True))
    by_facts = [
        checker.exact_all(image, image_records.full_spec(target)) for image, target in pairs
    ]
    by_cells = [checker.shows_scene(image, target) for image, target in pairs]
    return _means({"edit": by_facts, "edit/places": by_cells})


def repairing(policy_: Policy, count: int) -> dict[str, float]:
    """Measures the repair of `count` failed images.

    Returns:
      `repair`: share of images that fulfill their prompt afterwards; `reflection`: share of think
      texts that begin with the image's flaw.
    """
    rng = np.random.default_rng((SEED, 3))
    heldout_requests = [requests.sample_plain(rng, split="heldout") for _ in range(count)]
    flawed, remarks = zip(
        *(
            examples.flawed_scene(rng, request.spec, specs.sample_scene(request.spec, rng))
            for request in heldout_requests
        ),
        strict=True,
    )
    prompts = [request.text for request in heldout_requests]
    images = examples.render_batch(flawed)
    refined, texts = refine_images(policy_, images, prompts, tasks.TASKS["srr"])
    repaired = [
        checker.exact_all(image, request.spec)
        for image, request in zip(refined, heldout_requests, strict=True)
    ]
    names_flaw = [
        text.startswith(f"<think> {flaw}.") for text, (flaw, *_) in zip(texts, remarks, strict=True)
    ]
    return _means({"repair": repaired, "reflection": names_flaw})


def measure(policy_: Policy, count: int) -> dict[str, float]:
    """Measures all skills, `count` examples of each."""
    skills = (captioning, answering, editing, repairing)
    return {name: share for skill in skills for name, share in skill(policy_, count).items()}


def _means(correct: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in sorted(correct.items())}
