"""Measures a verifier folder on held-out scenes, and on drawings against the exact checker.

    python -m alphagrpo_jax.shapes.verifier_eval --model alphagrpo_jax/shapes/assets/verifier

Held out: combinations of shapes that no training image has. Balanced accuracy is the mean of the
shares of right answers among questions whose answer is yes and among those whose answer is no.
"""

import argparse
import collections
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.shapes import checker, corrupt, questions, scenes, verifier_data
from alphagrpo_jax.shapes.specs import describe, pick
from alphagrpo_jax.shapes.verifier_data import Asked, Example

QUESTIONS = 12  # per image
BINS = 10  # of the calibration error
IMPERFECT = tuple(kind for kind in corrupt.KINDS if kind != "clean")
Row = tuple[str, bool, float]  # question type, truth, P(yes)


def heldout_scene(rng: np.random.Generator) -> scenes.Scene:
    """A random scene of a held-out combination."""
    while True:
        scene = scenes.random_scene(rng)
        if describe(scene).split == "heldout":
            return scene


def heldout_example(rng: np.random.Generator, *, clean: bool) -> Example:
    """A held-out scene, rendered as it is or imperfectly in any of the ways of `corrupt`."""
    scene = heldout_scene(rng)
    result = corrupt.corrupt(scene, rng, "clean" if clean else pick(rng, IMPERFECT))
    return Example(result.image, scene, result.labels, result.damaged, scene)


def ask(verifier: HFVerifier, example: Example, asked: Sequence[Asked]) -> list[Row]:
    """Rows of one image's questions; a failed answer counts as wrong."""
    answers = verifier.answer(example.image, [text for text, *_ in asked])
    rows = []
    for (_, word, type_), answer in zip(asked, answers, strict=True):
        truth = word == "yes"
        p_yes = float(not truth) if answer.p_yes is None else answer.p_yes
        rows.append((type_, truth, p_yes))
    return rows


def collect(verifier: HFVerifier, seed: int, images: int, *, clean: bool) -> list[Row]:
    """Rows of `QUESTIONS` questions about each of `images` held-out images."""
    rng = np.random.default_rng([seed, clean])
    rows = []
    for _ in range(images):
        example = heldout_example(rng, clean=clean)
        rows += ask(verifier, example, verifier_data.questions_about(example, rng, QUESTIONS))
    return rows


def balanced(rows: Iterable[Row]) -> dict[str, float]:
    """Balanced accuracy by type; plain accuracy where all answers of a type are the same."""
    hits = collections.defaultdict(list)
    for type_, truth, p_yes in rows:
        hits[type_, truth].append((p_yes > 0.5) == truth)
    result = {}
    for type_ in questions.TYPES:
        sides = [np.mean(hits[type_, truth]) for truth in (True, False) if hits[type_, truth]]
        if sides:
            result[type_] = float(np.mean(sides))
    return result


def calibration_error(rows: Sequence[Row], bins: int = BINS) -> float:
    """Expected calibration error of P(yes): |mean P(yes) - share of yes|, weighted over bins."""
    p_yes = np.array([row[2] for row in rows])
    truth = np.array([row[1] for row in rows], float)
    which = np.minimum((p_yes * bins).astype(int), bins - 1)
    gaps = [
        abs(p_yes[which == b].mean() - truth[which == b].mean()) * (which == b).mean()
        for b in range(bins)
        if (which == b).any()
    ]
    return float(sum(gaps))


def throughput(verifier: HFVerifier, seconds: float = 5.0) -> float:
    """Questions per second of this process, `QUESTIONS` to an image."""
    rng = np.random.default_rng(0)
    example = heldout_example(rng, clean=True)
    texts = [text for text, *_ in verifier_data.questions_about(example, rng, QUESTIONS)]
    verifier.answer(example.image, texts)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        verifier.answer(example.image, texts)
        done += len(texts)
    return done / (time.perf_counter() - start)


def agreement(verifier: HFVerifier, drawings: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Share of semantic questions on which the verifier and the exact checker agree.

    Args:
      verifier: what is measured.
      drawings: uint8[N, 48, 48, 3], for instance by the small UMM. Drawings in which the checker
        finds something unknown, or nothing at all, are left out (their share is reported).
      seed: of the questions.
    """
    rng = np.random.default_rng(seed)
    rows, used = [], 0
    for image in drawings:
        seen = checker.parse(image)
        if seen.unknown or seen.background is None or not 1 <= len(seen.objects) <= 3:
            continue
        used += 1
        scene = scenes.Scene(seen.objects, seen.background)
        example = Example(image, scene, {}, (), scene)
        rows += ask(verifier, example, verifier_data.questions_about(example, rng, QUESTIONS))
    hits = [(p_yes > 0.5) == truth for _, truth, p_yes in rows]
    return {
        "agreement": float(np.mean(hits)),
        "drawings_used": used / len(drawings),
        **{f"balanced/{type_}": share for type_, share in balanced(rows).items()},
    }


def evaluate(verifier: HFVerifier, images: int, seed: int) -> dict:
    """All figures of the model card but the drawings': see `main`."""
    clean = collect(verifier, seed, images, clean=True)
    imperfect = collect(verifier, seed, images, clean=False)
    return {
        "images": images,
        "clean": balanced(clean),
        "imperfect": balanced(imperfect),
        "ece": {
            "clean": calibration_error(clean),
            "imperfect": calibration_error(imperfect),
            "both": calibration_error(clean + imperfect),
        },
    }


def main() -> None:
    """Writes the figures as JSON to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="verifier folder")
    parser.add_argument("--images", type=int, default=1000, help="clean, and as many imperfect")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drawings", type=Path, help=".npy of uint8[N, 48, 48, 3] drawings")
    options = parser.parse_args()
    verifier = HFVerifier(options.model, num_threads=options.threads)
    figures = evaluate(verifier, options.images, options.seed)
    figures["questions_per_second"] = {"shared prefix": throughput(verifier)}
    verifier.shared_prefix = False
    figures["questions_per_second"]["whole prompts"] = throughput(verifier)
    verifier.shared_prefix = True
    if options.drawings is not None:
        figures["drawings"] = agreement(verifier, np.load(options.drawings))
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
