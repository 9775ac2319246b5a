"""Measures rewards against the exact checker: ranking of image pairs, agreement, calibration.

    python -m alphagrpo_jax.studies.measure --drawings runs/drawings.npz --repeats 4
    python -m alphagrpo_jax.studies.reward_figures --drawings runs/drawings.npz --out FILE

All scores come from one verifier and the same generated images: DVReward by confidences, by binary
answers and with dependencies, and the holistic score from ratings.

`ranking`: among the pairs of images of one prompt that differ in the exact share of facts, the
share that a score orders correctly; equal scores count half, so that guessing gives 1/2. The
interval is a bootstrap over prompts. `agreement`: per tag of the semantic questions, on images that
the checker can parse in full, the share of answers on the correct side of 1/2, and the expected
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
from alphagrpo_jax.studies import drawings
from alphagrpo_jax.studies.verifier_eval import calibration_error, queries_by_text
from alphagrpo_jax.training import verifiers as verifiers_lib

TRAINED_SCORE = "confidence"  # all scores are compared with it
DEPENDENT = "dependent"
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
QUEUE_SECONDS = 1e6  # time limit of an image in the pool: all are submitted at once


class ScoredImages(NamedTuple):
    """Scores of the M of N images that the verifier has answered in full."""

    index: np.ndarray  # int64[M]
    scores: dict[str, np.ndarray]  # float64[M] each
    p_yes: list[tuple[float, ...]]  # of the questions in `Record.question_texts`
    failures: dict[str, int]


def score_images(
    pool: scoring.VerifierPool, images: np.ndarray, records: Sequence[Record]
) -> ScoredImages:
    """Computes all scores of images uint8[N, 48, 48, 3]."""
    # The weights do not matter: only the single scores are used, not their sum.
    options = dataclasses.replace(
        config_checks.read_config().reward,
        score=TRAINED_SCORE,
        extra_scores=("binary", scoring.HOLISTIC),
        extra_weights=(1.0, 1.0),
    )
    for number in tqdm.trange(len(images), desc="judging"):
        scoring.submit(pool, [number], [images[number]], [records[number]], options)
    rewards = scoring.gather(pool, range(len(images)), records, (), options)
    index = np.flatnonzero(rewards.valid)
    p_yes = [rewards.p_yes[row] for row in index.tolist()]
    scores = {name: values[index] for name, values in rewards.by_score.items()}
    scores[DEPENDENT] = np.array(
        [
            dvreward(*records[row].split(answers), parents=records[row].asked_parents).reward
            for row, answers in zip(index.tolist(), p_yes, strict=True)
        ]
    )
    return ScoredImages(index, scores, p_yes, rewards.failures)


def pair_counts(
    prompts: Sequence[str], exact: np.ndarray, score: np.ndarray
) -> dict[str, tuple[float, int]]:
    """Counts, for each prompt, the pairs of images that are ranked correctly, and all pairs.

    Args:
      prompts: M, of the images.
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
        ranked = np.sign(score[first] - score[second])
        correct = np.where(ranked == 0, 0.5, ranked == better)[better != 0]
        if correct.size:
            counts[prompt] = (float(correct.sum()), correct.size)
    return counts


def share(
    counts: Mapping[str, tuple[float, int]],
    seed: int,
    *,
    minus: Mapping[str, tuple[float, int]] | None = None,
) -> dict[str, float | list[float]]:
    """Computes the share of pairs ranked correctly, with a bootstrap interval over prompts.

    Args:
      counts: from `pair_counts`.
      seed: of the bootstrap; equal seeds resample equal prompts for all scores.
      minus: counts of another score on the same images: the share is then the difference.
    """
    if not counts:
        return {"pairs": 0}
    baseline = minus or dict.fromkeys(counts, (0.0, 0))
    correct = np.array([counts[prompt][0] - baseline[prompt][0] for prompt in counts])
    pairs = np.array([number for _, number in counts.values()])
    sampled = np.random.default_rng(seed).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    resampled = correct[sampled].sum(axis=1) / pairs[sampled].sum(axis=1)
    low, high = np.percentile(resampled, INTERVAL)
    return {
        "pairs": int(pairs.sum()),
        "prompts": len(pairs),
        "share": float(correct.sum() / pairs.sum()),
        "interval": [float(low), float(high)],
    }


def ranking(records: Sequence[Mapping], exact: np.ndarray, scored: ScoredImages, seed: int) -> dict:
    """Computes `share` of every score, and of `TRAINED_SCORE` minus every other score.

    Args:
      records: N, of the images.
      exact: float64[N], share of facts that hold.
      scored: the scores.
      seed: of the bootstrap.
    Returns:
      Figures by kind of prompt ("all" among them) and score.
    """
    kinds = np.array([records[row]["kind"] for row in scored.index])
    prompts = np.array([records[row]["prompt"] for row in scored.index], object)
    exact = exact[scored.index]
    figures: dict[str, dict] = {}
    for kind in ("all", *sorted(set(kinds))):
        of_kind = (kinds == kind) | (kind == "all")
        counts = {
            name: pair_counts(prompts[of_kind].tolist(), exact[of_kind], values[of_kind])
            for name, values in scored.scores.items()
        }
        figures[kind] = {name: share(pairs, seed) for name, pairs in counts.items()}
        trained = counts.pop(TRAINED_SCORE)
        figures[kind] |= {
            f"{TRAINED_SCORE} - {name}": share(trained, seed, minus=pairs)
            for name, pairs in counts.items()
        }
    return figures


def agreement(
    images: np.ndarray, records: Sequence[Record], scored: ScoredImages
) -> dict[str, dict]:
    """Computes agreement and calibration of the semantic answers, by tag.

    Raises:
      InputError: a question that the shapes world does not ask.
    """
    answers_by_tag: dict[str, list[tuple[str, bool, float]]] = {}
    for index, p_yes in zip(scored.index, scored.p_yes, strict=True):
        parsed = checker.parse(images[index])
        if parsed.unknown or parsed.background is None:
            continue
        scene = scenes.Scene(parsed.objects, parsed.background)
        semantic = records[index].asked_questions[: len(records[index].asked_semantic)]
        for question, p in zip(semantic, p_yes, strict=False):
            if question.text not in queries_by_text():
                raise InputError(
                    f"the shapes world does not ask {question.text!r}; give drawings of its own "
                    "prompts"
                )
            truth = questions.truth(queries_by_text()[question.text], scene)
            for tag in ("all", question.tag):
                answers_by_tag.setdefault(tag, []).append((question.tag, truth, p))
    return {
        tag: {
            "questions": len(answers),
            "true": float(np.mean([truth for _, truth, _ in answers])),
            "agreement": float(np.mean([(p > 0.5) == truth for _, truth, p in answers])),
            "ece": calibration_error(answers),
        }
        for tag, answers in sorted(answers_by_tag.items())
    }


def measure(options: argparse.Namespace) -> dict:
    """Measures what the flags ask for."""
    images, fields = drawings.read(options.drawings)
    images, fields = images[: options.limit], fields[: options.limit]
    records = [parse_record(record) for record in fields]
    changes = {
        "verifier.path": options.verifier,
        "verifier.workers": options.workers,
        "verifier.total_seconds": QUEUE_SECONDS,
    }
    config = config_checks.change_options(config_checks.read_config(), changes)
    with verifiers_lib.make_pool(config) as pool:
        pool.wait_ready()
        scored = score_images(pool, images, records)
    exact = drawings.fact_shares(images, fields)
    return {
        "verifier": options.verifier,
        "drawings": len(images),
        "judged": len(scored.index),
        "failures": scored.failures,
        "ranking": ranking(fields, exact, scored, options.seed),
        "agreement": agreement(images, records, scored),
    }


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--drawings", type=Path, required=True, help=".npz file that measure --drawings wrote")
    add("--verifier", default="package:verifier", help="a folder or package:NAME")
    add("--workers", type=cli.COUNT, default=2, help="verifier processes")
    add("--limit", type=cli.COUNT, help="use the first drawings only")
    add("--seed", type=cli.SEED, default=0, help="of the bootstrap")
    add("--out", type=Path, help="also write the figures here")
    return parser.parse_args(arguments)


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
