"""Records of the shapes world with images: edits and questions, in the form that tasks ti2i and
ti2t read.

    python -m alphagrpo_jax.shapes.image_records --out alphagrpo_jax/shapes/assets/data

`image` is a data: URL. A record of an edit asks about the edited scene, whose `facts` it has; one
of a question has its `answer`. Both scenes of an edit, and that of a question, are of the split's
combinations; `kind` and `type` say what is asked.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from alphagrpo_jax.runtime import images
from alphagrpo_jax.shapes import examples, prompts, questions, scenes, specs

SEED = 0
# A move leaves every fact as it was, and facts are what records ask about.
OPERATIONS = ("color", "shape", "background", "remove", "add")
SIZES = {"train": 480, "heldout": 200}
YES_NO_SHARE = 2 / 3  # of questions, as in pretraining


def split_scene(rng: np.random.Generator, split: str) -> scenes.Scene:
    """A random scene whose combination belongs to the split."""
    while True:
        scene = scenes.random_scene(rng)
        if specs.describe(scene).split == split:
            return scene


def whole(scene: scenes.Scene) -> specs.Spec:
    """The spec that names every kind of shape in a scene, and the background."""
    return dataclasses.replace(specs.describe(scene), background=scene.background)


def edit(rng: np.random.Generator, split: str) -> dict:
    """The record of one edit; kinds are equally likely, and what is asked for is not yet there."""
    operation = specs.pick(rng, OPERATIONS)
    while True:
        scene = split_scene(rng, split)
        if any(group.count > 1 for group in specs.describe(scene).groups):
            continue
        if operation not in examples.operations(scene):
            continue
        instruction, target = examples.change(rng, scene, operation)
        if specs.describe(target).split == split:
            break
    wanted = whole(target)
    asked = [
        prompts.question("semantic", query, needs, rng)
        for query, needs in prompts.semantic_queries(wanted, rng)
    ]
    kept = [
        prompts.question("quality", questions.quality(type_), (), rng)
        for type_ in questions.QUALITY
    ]
    return {
        "prompt": instruction,
        "image": images.data_url(scenes.render(scene)),
        "semantic_questions": asked,
        "quality_questions": kept,
        "kind": "edit",
        "type": operation,
        "facts": wanted.to_json(),
    }


def ask(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """A question about a scene, its answer, and its type: of `questions.SEMANTIC`, or "open"."""
    if rng.random() >= YES_NO_SHARE:
        return *questions.open_question(scene, rng), "open"
    type_ = specs.pick(rng, questions.SEMANTIC)
    query = questions.sample_query(scene, type_, rng)
    wording = int(rng.integers(len(questions.WORDINGS[query.form])))
    answer = "yes" if questions.truth(query, scene) else "no"
    return questions.text(query, wording), answer, type_


def question(rng: np.random.Generator, split: str) -> dict:
    """The record of one question with its answer."""
    scene = split_scene(rng, split)
    text, answer, type_ = ask(scene, rng)
    return {
        "prompt": text,
        "image": images.data_url(scenes.render(scene)),
        "answer": answer,
        "kind": "answer",
        "type": type_,
    }


MAKERS: dict[str, Callable[[np.random.Generator, str], dict]] = {"edit": edit, "answer": question}


def records(name: str, split: str, count: int, *, seed: int = SEED) -> list[dict]:
    """Records of a kind and split; a function of the arguments alone.

    Args:
      name: "edit" or "answer".
      split: "train", "validation" or "heldout".
      count: number of records.
      seed: of everything random.
    """
    rng = np.random.default_rng((seed, list(MAKERS).index(name), specs.SPLITS.index(split)))
    return [
        {"id": f"{name}-{split}-{index:04d}"} | MAKERS[name](rng, split) for index in range(count)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the files into a folder."""
    parser = argparse.ArgumentParser(description="Writes the shapes world's records with images.")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if need be")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in MAKERS:
        for split, count in SIZES.items():
            path = options.out / f"{name}_{split}.jsonl"
            found = records(name, split, count, seed=options.seed)
            lines = [json.dumps(each, separators=(",", ":")) + "\n" for each in found]
            path.write_text("".join(lines), encoding="utf-8")
            sys.stdout.write(f"{path}: {len(found)} records\n")


if __name__ == "__main__":
    main()
