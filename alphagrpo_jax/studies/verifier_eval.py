"""Measures a verifier folder on held-out scenes, and on drawings against the exact checker.

    python -m alphagrpo_jax.studies.verifier_eval --model alphagrpo_jax/shapes/assets/verifier
    python -m alphagrpo_jax.studies.measure --drawings runs/drawings.npz
    python -m alphagrpo_jax.studies.verifier_eval --model ... --drawings runs/drawings.npz
    python -m alphagrpo_jax.studies.verifier_eval --model ... --speed

Held out: combinations of objects that no training image has. Balanced accuracy is the mean of two
shares of correct answers: among questions whose answer is yes, and among those whose answer is no.
On clean images the three quality types are one-sided: the true answer is always yes, so a verifier
that always answers yes scores 1 there; only imperfect images measure it.

Drawings (generated images) are asked the semantic questions of their prompts. `agreement` is per
question, against the exact checker, on the drawings that it can parse in full (`parsed`). `all_yes`
is per drawing, on all of them: P(yes) > 0.5 for all questions, compared with "every fact holds".

`--speed` only times the verifier, on the same held-out images and questions three ways: one forward
pass per question, one for all questions of an image, and a pool of worker processes with a thread
each. Its 2 threads or 2 workers need 2 idle cores.
"""

import argparse
import collections
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from alphagrpo_jax import config_checks
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.workers.pool import Pool
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.shapes import checker, corrupt, questions, scenes
from alphagrpo_jax.shapes.image_records import scene_of_split
from alphagrpo_jax.shapes.pretraining import verifier_data
from alphagrpo_jax.shapes.pretraining.verifier_data import LabeledImage, LabeledQuestion
from alphagrpo_jax.shapes.questions import Query
from alphagrpo_jax.shapes.specs import BACKGROUNDS, COLORS, NUMBERS, RELATIONS, Group, pick
from alphagrpo_jax.studies import drawings

QUESTIONS = 12  # maximum per image
TIMED = 200  # images whose questions are timed
BINS = 10  # of the calibration error
IMPERFECT = tuple(kind for kind in corrupt.KINDS if kind != "clean")
AnswerRow = tuple[str, bool, float]  # question type, truth, P(yes)
Sample = tuple[np.ndarray, tuple[str, ...]]  # uint8[H, W, 3], questions


def heldout_example(rng: np.random.Generator, *, clean: bool) -> LabeledImage:
    """Samples a held-out scene, rendered cleanly or imperfectly in any of the ways of `corrupt`."""
    scene = scene_of_split(rng, "heldout")
    result = corrupt.corrupt(scene, rng, "clean" if clean else pick(rng, IMPERFECT))
    return LabeledImage(result.image, scene, result.labels, result.damaged, scene, result.faulty)


def judge_questions(
    verifier: HFVerifier, example: LabeledImage, triples: Sequence[LabeledQuestion]
) -> list[AnswerRow]:
    """Asks one image's questions; a failed answer counts as wrong."""
    answers = verifier.answer(example.image, [text for text, *_ in triples])
    rows = []
    for (_, word, type_), answer in zip(triples, answers, strict=True):
        truth = word == "yes"
        p_yes = float(not truth) if answer.p_yes is None else answer.p_yes
        rows.append((type_, truth, p_yes))
    return rows


def sample_questions(example: LabeledImage, rng: np.random.Generator) -> list[LabeledQuestion]:
    """Samples `QUESTIONS` different questions about an image (fewer if there are no more)."""
    # `questions_about` puts repetitions behind the different questions, so ask for more.
    triples = verifier_data.questions_about(example, rng, 4 * QUESTIONS)
    return list({triple[0]: triple for triple in triples}.values())[:QUESTIONS]


def collect(verifier: HFVerifier, seed: int, images: int, *, clean: bool) -> list[AnswerRow]:
    """Asks questions about each of `images` held-out images."""
    rng = np.random.default_rng([seed, clean])
    rows = []
    for _ in range(images):
        example = heldout_example(rng, clean=clean)
        rows += judge_questions(verifier, example, sample_questions(example, rng))
    return rows


def balanced(rows: Iterable[AnswerRow]) -> dict[str, float]:
    """Computes balanced accuracy by type; plain accuracy if all answers of a type are equal."""
    hits = collections.defaultdict(list)
    for type_, truth, p_yes in rows:
        hits[type_, truth].append((p_yes > 0.5) == truth)
    result = {}
    for type_ in questions.TYPES:
        sides = [np.mean(hits[type_, truth]) for truth in (True, False) if hits[type_, truth]]
        if sides:
            result[type_] = float(np.mean(sides))
    return result


def calibration_error(rows: Sequence[AnswerRow], bins: int = BINS) -> float:
    """Computes the expected calibration error of P(yes).

    The mean of |mean P(yes) - share of yes| over bins of equal width, weighted by their sizes.
    """
    p_yes = np.array([row[2] for row in rows])
    truth = np.array([row[1] for row in rows], float)
    bin_of = np.minimum((p_yes * bins).astype(int), bins - 1)
    gaps = [
        abs(p_yes[bin_of == b].mean() - truth[bin_of == b].mean()) * (bin_of == b).mean()
        for b in range(bins)
        if (bin_of == b).any()
    ]
    return float(sum(gaps))


def timed_lists(seed: int, images: int) -> list[Sample]:
    """Samples held-out images and their questions; no list of questions occurs twice."""
    # Verifiers cache the tokens of their texts, so a repeated list would be timed too fast.
    rng, lists = np.random.default_rng(seed), {}
    while len(lists) < images:
        example = heldout_example(rng, clean=True)
        lists[tuple(text for text, *_ in sample_questions(example, rng))] = example.image
    return [(image, texts) for texts, image in lists.items()]


def time_verifier(verifier: HFVerifier, samples: Sequence[Sample]) -> tuple[float, list[float]]:
    """Times all samples but the first, which warms up: seconds, and P(yes) of all questions."""
    verifier.answer(*samples[0])
    start = time.perf_counter()
    answers = [verifier.answer(*sample) for sample in samples[1:]]
    seconds = time.perf_counter() - start
    return seconds, [_checked(answer.p_yes) for row in answers for answer in row]


def time_pool(folder: Path, workers: int, samples: Sequence[Sample]) -> tuple[float, list[float]]:
    """Times a pool of workers as `time_verifier` does.

    Raises:
      PoolError: no worker starts.
    """
    factories = [("hf", {"path": str(folder), "num_threads": 1})] * workers
    with Pool(factories, config_checks.read_config().verifier) as pool:
        pool.wait_ready()
        # More samples than workers, so that probably every worker is warm.
        for number in range(2 * workers):
            pool.submit(("warm", number), *samples[0])
        pool.gather([("warm", number) for number in range(2 * workers)])
        numbers = range(1, len(samples))
        start = time.perf_counter()
        for number in numbers:
            pool.submit(number, *samples[number])
        results = pool.gather(numbers)
        seconds = time.perf_counter() - start
    return seconds, [_checked(p) for number in numbers for p in results[number].p_yes or [None]]


def _checked(p_yes: float | None) -> float:
    """Raises InputError if an answer failed, because the times would not be comparable."""
    if p_yes is None:
        raise InputError("a question got no answer; measure accuracy first")
    return p_yes


def speed(folder: Path, samples: Sequence[Sample], threads: int) -> dict[str, dict[str, float]]:
    """Measures questions per second three ways, on equal images, questions and number of cores.

    Args:
      folder: of the verifier.
      samples: the first of them warms up.
      threads: of the one process, and workers of the pool.
    Returns:
      For each way: `questions_per_second`, `ms_per_image`, and `apart`, the largest difference of
      a P(yes) from that of the first way.
    Raises:
      ValueError: a question got no answer.
    """
    single = HFVerifier(folder, num_threads=threads, shared_prefix=False, max_batch=1)
    shared = HFVerifier(folder, num_threads=threads)
    timed = {
        f"one pass per question ({threads} threads)": time_verifier(single, samples),
        f"one image's questions {shared.passes.way} ({threads} threads)": time_verifier(
            shared, samples
        ),
        f"pool of {threads} workers (1 thread each)": time_pool(folder, threads, samples),
    }
    reference = np.array(next(iter(timed.values()))[1])
    return {
        name: {
            "questions_per_second": len(p_yes) / seconds,
            "ms_per_image": 1000 * seconds / (len(samples) - 1),
            "apart": float(np.abs(np.array(p_yes) - reference).max()),
        }
        for name, (seconds, p_yes) in timed.items()
    }


def speed_table(speeds: Mapping[str, Mapping[str, float]], samples: Sequence[Sample]) -> str:
    """Formats the figures of `speed` as a table."""
    num_questions = sum(len(texts) for _, texts in samples[1:])
    lines = [
        f"{len(samples) - 1} held-out images, {num_questions} questions",
        f"{'':<46}{'questions/s':>12}{'ms/image':>10}{'largest difference of P(yes)':>30}",
    ]
    lines += [
        f"{name:<46}{row['questions_per_second']:>12.1f}{row['ms_per_image']:>10.1f}"
        f"{row['apart']:>30.1e}"
        for name, row in speeds.items()
    ]
    return "\n".join(lines)


@functools.cache
def queries_by_text() -> dict[str, Query]:
    """Returns every semantic question of the shapes world: text -> meaning."""
    groups = [
        Group(1, *kind) for kind in itertools.product((None, *scenes.SHAPES), (None, *COLORS))
    ]
    numbers = range(1, len(NUMBERS) + 1)
    queries = [questions.exists(group) for group in groups]
    queries += [
        questions.has_color(shape, color)
        for shape, color in itertools.product(scenes.SHAPES, COLORS)
    ]
    queries += [questions.counts(Group(n, g.shape, g.color)) for n in numbers for g in groups]
    queries += [
        questions.relates(relation, *pair)
        for relation in RELATIONS
        for pair in itertools.product(groups, repeat=2)
    ]
    queries += [questions.has_background(background) for background in BACKGROUNDS]
    return {
        questions.text(query, wording): query
        for query in queries
        for wording in range(len(questions.WORDINGS[query.form]))
    }


def agreement(
    verifier: HFVerifier, images: np.ndarray, records: Sequence[Mapping]
) -> dict[str, float]:
    """Measures how far verifier and exact checker agree about generated images.

    Args:
      verifier: the verifier to measure.
      images: uint8[N, 48, 48, 3].
      records: N, their prompts with semantic questions and facts.
    Returns:
      Shares, see this file's docstring; `all_yes_if_exact` and `all_yes_if_wrong` are `all_yes`
      among the images in which all facts hold, and among the others.
    Raises:
      KeyError: a question that the shapes world does not ask.
    """
    rows: list[AnswerRow] = []
    is_parsed, all_yes, is_exact = [], [], []
    for image, record in zip(images, records, strict=True):
        valid = (fields for fields in record["semantic_questions"] if fields["is_valid"])
        texts = [fields["question"] for fields in valid]
        p_yes = [answer.p_yes for answer in verifier.answer(image, texts)]
        all_yes.append(all(p is not None and p > 0.5 for p in p_yes))
        is_exact.append(checker.exact_all(image, record["facts"]))
        parsed = checker.parse(image)
        is_parsed.append(parsed.unknown == 0 and parsed.background is not None)
        if parsed.unknown == 0 and parsed.background is not None:
            scene = scenes.Scene(parsed.objects, parsed.background)
            for text, p in zip(texts, p_yes, strict=True):
                query = queries_by_text()[text]
                truth = questions.truth(query, scene)
                rows.append((query.type, truth, float(not truth) if p is None else p))
    yes, exact = np.array(all_yes), np.array(is_exact)
    figures = {
        "drawings": len(exact),
        "parsed": float(np.mean(is_parsed)),
        "agreement": float(np.mean([(p > 0.5) == truth for _, truth, p in rows])),
        **{f"balanced/{type_}": share for type_, share in balanced(rows).items()},
        "exact": float(exact.mean()),
        "all_yes": float(yes.mean()),
        "all_yes_agreement": float((yes == exact).mean()),
    }
    for name, members in (("exact", exact), ("wrong", ~exact)):
        if members.any():
            figures[f"all_yes_if_{name}"] = float(yes[members].mean())
    return figures


def evaluate(verifier: HFVerifier, images: int, seed: int) -> dict:
    """Measures the figures of the model card, except those of the drawings."""
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


def measure(options: argparse.Namespace) -> dict:
    """Measures what the flags ask for."""
    # Read first: a missing file must not cost an evaluation.
    images_and_records = None if options.drawings is None else drawings.read(options.drawings)
    verifier = HFVerifier(options.model, num_threads=options.threads)
    figures = evaluate(verifier, options.images, options.seed)
    if images_and_records is not None:
        figures["drawings"] = agreement(verifier, *images_and_records)
    return figures


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="verifier folder")
    add("--images", type=cli.COUNT, default=1000, help="clean, and as many imperfect")
    add("--seed", type=cli.SEED, default=1)
    add("--threads", type=cli.COUNT, default=2)
    add("--drawings", type=Path, help=".npz file that measure --drawings wrote")
    add("--speed", nargs="?", type=cli.COUNT, const=TIMED, metavar="IMAGES", help="only time "
        "IMAGES (200)")  # fmt: skip
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Writes the figures as JSON, or the speeds as a table."""
    if options.speed is not None:
        samples = timed_lists(options.seed, options.speed + 1)
        text = speed_table(speed(options.model, samples, options.threads), samples)
    else:
        text = json.dumps(measure(options), indent=1)
    sys.stdout.write(text + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
