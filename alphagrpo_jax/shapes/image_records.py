"""Writes the records with images: edits and questions, in the form that tasks ti2i and ti2t read.

    python -m alphagrpo_jax.shapes.image_records --out alphagrpo_jax/shapes/assets/data

`image` is a data: URL. The record of an edit asks about the edited scene and has its `facts`; the
record of a question has the `answer`. All scenes have combinations of the split: both scenes of an
edit, and the scene of a question. `kind` and `type` name the request. Takes less than a minute.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from alphagrpo_jax.runtime import cli, images
from alphagrpo_jax.shapes import examples, prompts, questions, scenes, specs

SEED = 0
# No "move": it changes no fact, and records ask about facts.
OPERATIONS = ("color", "shape", "background", "remove", "add")
SIZES = {"train": 480, "heldout": 200}
YES_NO_SHARE = 2 / 3  # of questions, as in pretraining


def scene_of_split(rng: np.random.Generator, split: str) -> scenes.Scene:
    """Samples a scene whose combination belongs to the split."""
    while True:
        scene = scenes.random_scene(rng)
        if specs.describe(scene).split == split:
            return scene


def full_spec(scene: scenes.Scene) -> specs.Spec:
    """Returns the spec that names every object of a scene, and the background."""
    return dataclasses.replace(specs.describe(scene), background=scene.background)


def edit_record(rng: np.random.Generator, split: str) -> dict:
    """Samples the record of one edit; operations are equally likely, and none is already done."""
    operation = specs.pick(rng, OPERATIONS)
    while True:
        scene = scene_of_split(rng, split)
        if any(group.count > 1 for group in specs.describe(scene).groups):
            continue
        if operation not in examples.possible_operations(scene):
            continue
        instruction, target = examples.edit_scene(rng, scene, operation)
        if specs.describe(target).split == split:
            break
    spec = full_spec(target)
    semantic = [
        prompts.question_fields("semantic", query, dependency, rng)
        for query, dependency in prompts.semantic_queries(spec, rng)
    ]
    quality = [
        prompts.question_fields("quality", questions.quality(type_), (), rng)
        for type_ in questions.QUALITY
    ]
    return {
        "prompt": instruction,
        "image": images.data_url(scenes.render(scene)),
        "semantic_questions": semantic,
        "quality_questions": quality,
        "kind": "edit",
        "type": operation,
        "facts": spec.to_json(),
    }


def sample_question(scene: scenes.Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """Samples a question, its answer, and its type: one of `questions.SEMANTIC`, or "open"."""
    if rng.random() >= YES_NO_SHARE:
        return *questions.open_question(scene, rng), "open"
    type_ = specs.pick(rng, questions.SEMANTIC)
    query = questions.sample_query(scene, type_, rng)
    wording = int(rng.integers(len(questions.WORDINGS[query.form])))
    answer = "yes" if questions.truth(query, scene) else "no"
    return questions.text(query, wording), answer, type_


def question_record(rng: np.random.Generator, split: str) -> dict:
    """Samples the record of one question with its answer."""
    scene = scene_of_split(rng, split)
    text, answer, type_ = sample_question(scene, rng)
    return {
        "prompt": text,
        "image": images.data_url(scenes.render(scene)),
        "answer": answer,
        "kind": "answer",
        "type": type_,
    }


MAKERS: dict[str, Callable[[np.random.Generator, str], dict]] = {
    "edit": edit_record,
    "answer": question_record,
}


def records(name: str, split: str, count: int, *, seed: int = SEED) -> list[dict]:
    """Generates records of a kind and split; the result depends on the arguments alone.

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


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description="Writes the shapes world's records with images.")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if need be")
    parser.add_argument("--seed", type=cli.SEED, default=SEED)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Writes the files into a folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name in MAKERS:
        for split, count in SIZES.items():
            path = options.out / f"{name}_{split}.jsonl"
            rows = records(name, split, count, seed=options.seed)
            lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
            path.write_text("".join(lines), encoding="utf-8")
            sys.stdout.write(f"{path}: {len(rows)} records\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
