"""Measures rewards against the exact checker: which of them tells the better image from the worse?

    python -m alphagrpo_jax.studies.measure --drawings runs/drawings.npz --repeats 4
    python -m alphagrpo_jax.studies.reward_figures --drawings runs/drawings.npz --out FILE

All scores come from one verifier and the same drawings: DVReward by confidences, by binary answers
and with dependencies, and the holistic score from ratings.

`ranking`: of all pairs of drawings of one prompt that differ in the exact share of facts, the share
that a score puts in the right order; equal scores count half, so that guessing gives 1/2. The
interval is a bootstrap over prompts. `agreement`: per tag of the semantic questions, on drawings
that the checker can read in full, the share of answers on the right side of 1/2, and the expected
calibration error (ECE) of P(yes). Quality questions have no exact answer and are left out there.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tqdm

from alphagrpo_jax import config_checks
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.dvreward import dvreward
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.records import Record, parse_record
from alphagrpo_jax.shapes import checker, questions, scenes
from alphagrpo_jax.studies.verifier_eval import calibration_error, queries_by_text, read_drawings
from alphagrpo_jax.training import verifiers as verifiers_lib

TRAINED_SCORE = "confidence"  # the others are compared with it
DEPENDENT = "dependent"
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
QUEUE_SECONDS = 1e6  # many drawings wait for long


class ScoredImages(NamedTuple):
    """The drawings that the verifier has judged, M of N."""

    index: np.ndarray  # int64[M]
    scores: dict[str, np.ndarray]  # float64[M] each
    p_yes: list[tuple[float, ...]]  # of the questions in `Record.question_texts`
    failures: dict[str, int]


def score_images(
    pool: scoring.VerifierPool, images: np.ndarray, records: Sequence[Record]
) -> ScoredImages:
    """All scores of drawings uint8[N, 48, 48, 3]."""
    # Their weights do not matter, only the parts are used.
    options = dataclasses.replace(
        config_checks.read_config().reward,
        score=TRAINED_SCORE,
        extra_scores=("binary", scoring.HOLISTIC),
        extra_weights=(1.0, 1.0),
    )
    for number in tqdm.trange(len(images), desc="judging"):
        part = slice(number, number + 1)
        scoring.submit(pool, [number], images[part], records[part], options, first=0)
    found = scoring.gather(pool, range(len(images)), records, (), options)
    index = np.flatnonzero(found.valid)
    p_yes = [found.p_yes[row] for row in index]
    scores = {name: values[index] for name, values in found.by_score.items()}
    scores[DEPENDENT] = np.array(
        [
            dvreward(*records[row].split(own), parents=records[row].asked_parents).reward
            for row, own in zip(index, p_yes, strict=True)
        ]
    )
    return ScoredImages(index, scores, p_yes, found.failures)


def pair_counts(
    prompts: Sequence[str], exact: np.ndarray, score: np.ndarray
) -> dict[str, tuple[float, int]]:
    """For each prompt how many of its pairs are ranked rightly, of how many.

    Args:
      prompts: M.
      exact: float64[M], share of facts that hold.
      score: float64[M].
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    counts = {}
    for prompt, members in rows.items():
        first, second = np.array(members)[np.stack(np.triu_indices(len(members), 1))]
        better = np.sign(exact[first] - exact[second])
        said = np.sign(score[first] - score[second])
        right = np.where(said == 0, 0.5, said == better)[better != 0]
        if right.size:
            counts[prompt] = (float(right.sum()), right.size)
    return counts


def share(
    counts: Mapping[str, tuple[float, int]],
    seed: int,
    *,
    minus: Mapping[str, tuple[float, int]] | None = None,
) -> dict[str, float | list[float]]:
    """Share of pairs ranked rightly, with a bootstrap interval over prompts.

    Args:
      counts: from `pair_counts`.
      seed: the same one draws the same prompts for every score.
      minus: of another score on the same drawings: the share is then the difference.
    """
    if not counts:
        return {"pairs": 0}
    taken = minus or dict.fromkeys(counts, (0.0, 0))
    right = np.array([counts[prompt][0] - taken[prompt][0] for prompt in counts])
    pairs = np.array([number for _, number in counts.values()])
    drawn = np.random.default_rng(seed).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    low, high = np.percentile(right[drawn].sum(axis=1) / pairs[drawn].sum(axis=1), INTERVAL)
    return {
        "pairs": int(pairs.sum()),
        "prompts": len(pairs),
        "share": float(right.sum() / pairs.sum()),
        "interval": [float(low), float(high)],
    }


def ranking(records: Sequence[Mapping], exact: np.ndarray, judged: ScoredImages, seed: int) -> dict:
    """`share` of every score, over all prompts and by their kind; and how much the confidences'
    share is above that of each other score.
    """
    kinds = np.array([records[row]["kind"] for row in judged.index])
    prompts = np.array([records[row]["prompt"] for row in judged.index], object)
    held = exact[judged.index]
    found: dict[str, dict] = {}
    for kind in ("all", *sorted(set(kinds))):
        own = (kinds == kind) | (kind == "all")
        counts = {
            name: pair_counts(prompts[own], held[own], values[own])
            for name, values in judged.scores.items()
        }
        found[kind] = {name: share(each, seed) for name, each in counts.items()}
        first = counts.pop(TRAINED_SCORE)
        found[kind] |= {
            f"{TRAINED_SCORE} - {name}": share(first, seed, minus=each)
            for name, each in counts.items()
        }
    return found


def agreement(
    images: np.ndarray, records: Sequence[Record], judged: ScoredImages
) -> dict[str, dict]:
    """Agreement and calibration of the semantic answers, by tag; see this file's docstring.

    Raises:
      InputError: a question that the shapes world does not ask.
    """
    rows: dict[str, list[tuple[str, bool, float]]] = {}
    for index, p_yes in zip(judged.index, judged.p_yes, strict=True):
        seen = checker.parse(images[index])
        if seen.unknown or seen.background is None:
            continue
        scene = scenes.Scene(seen.objects, seen.background)
        asked = records[index].asked_questions[: len(records[index].asked_semantic)]
        for question, p in zip(asked, p_yes, strict=False):
            if question.text not in queries_by_text():
                raise InputError(
                    f"the shapes world does not ask {question.text!r}; give drawings of its own "
                    "prompts"
                )
            truth = questions.truth(queries_by_text()[question.text], scene)
            for tag in ("all", question.tag):
                rows.setdefault(tag, []).append((question.tag, truth, p))
    return {
        tag: {
            "questions": len(own),
            "true": float(np.mean([truth for _, truth, _ in own])),
            "agreement": float(np.mean([(p > 0.5) == truth for _, truth, p in own])),
            "ece": calibration_error(own),
        }
        for tag, own in sorted(rows.items())
    }


def measure(options: argparse.Namespace) -> dict:
    """The figures that the flags ask for."""
    images, fields = read_drawings(options.drawings)
    images, fields = images[: options.limit], fields[: options.limit]
    records = [parse_record(each) for each in fields]
    changes = {
        "verifier.path": options.verifier,
        "verifier.workers": options.workers,
        "verifier.total_seconds": QUEUE_SECONDS,
    }
    config = config_checks.change_options(config_checks.read_config(), changes)
    with verifiers_lib.make_pool(config) as pool:
        pool.wait_ready()
        judged = score_images(pool, images, records)
    exact = np.array(
        [
            np.mean(list(checker.facts(image, each["facts"]).values()))
            for image, each in zip(images, fields, strict=True)
        ]
    )
    return {
        "verifier": options.verifier,
        "drawings": len(images),
        "judged": len(judged.index),
        "failures": judged.failures,
        "ranking": ranking(fields, exact, judged, options.seed),
        "agreement": agreement(images, records, judged),
    }


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--drawings", type=Path, required=True, help=".npz file that measure --drawings wrote")
    add("--verifier", default="package:verifier", help="a folder or package:NAME")
    add("--workers", type=int, default=2, help="verifier processes")
    add("--limit", type=int, help="use the first drawings only")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--out", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.workers < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--workers and --limit must be at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Writes the figures as JSON to standard output."""
    figures = measure(options)
    text = json.dumps(figures, indent=1) + "\n"
    if options.out is not None:
        replace_text(options.out, text)
    sys.stdout.write(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
