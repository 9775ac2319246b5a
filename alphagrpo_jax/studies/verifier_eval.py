"""Measures a verifier folder on held-out scenes, and on drawings against the exact checker.

    python -m alphagrpo_jax.studies.verifier_eval --model alphagrpo_jax/shapes/assets/verifier
    python -m alphagrpo_jax.studies.measure --drawings runs/drawings.npz
    python -m alphagrpo_jax.studies.verifier_eval --model ... --drawings runs/drawings.npz
    python -m alphagrpo_jax.studies.verifier_eval --model ... --speed

Held out: combinations of shapes that no training image has. Balanced accuracy is the mean of the
shares of right answers among questions whose answer is yes and among those whose answer is no. On
clean images the three quality types are one-sided: the true answer is always yes, so a verifier
that always says yes scores 1 there; only the imperfect images tell.

Drawings are asked their prompts' own semantic questions. `agreement` is per question, against the
exact checker, on the drawings that it can read in full (`parsed`). `all_yes` is per drawing, on all
of them: whether P(yes) > 0.5 throughout, against the checker's "every fact holds".

`--speed` times the same held-out images and lists of questions three ways, and nothing else: one
forward pass per question, one for all of an image's questions, and a pool of worker processes with
a thread each. Its 2 threads or 2 workers want 2 cores that nothing else uses.
"""

import argparse
import collections
import functools
import itertools
import json
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from alphagrpo_jax import config_checks
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.workers.pool import Pool
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import existing_file
from alphagrpo_jax.shapes import checker, corrupt, questions, scenes
from alphagrpo_jax.shapes.image_records import scene_of_split
from alphagrpo_jax.shapes.pretraining import verifier_data
from alphagrpo_jax.shapes.pretraining.verifier_data import LabeledImage, LabeledQuestion
from alphagrpo_jax.shapes.questions import Query
from alphagrpo_jax.shapes.specs import BACKGROUNDS, COLORS, NUMBERS, RELATIONS, Group, pick

QUESTIONS = 12  # per image at most
TIMED = 200  # images whose questions are timed
BINS = 10  # of the calibration error
IMPERFECT = tuple(kind for kind in corrupt.KINDS if kind != "clean")
Row = tuple[str, bool, float]  # question type, truth, P(yes)
Sample = tuple[np.ndarray, tuple[str, ...]]  # uint8[H, W, 3], questions


def heldout_example(rng: np.random.Generator, *, clean: bool) -> LabeledImage:
    """A held-out scene, rendered as it is or imperfectly in any of the ways of `corrupt`."""
    scene = scene_of_split(rng, "heldout")
    result = corrupt.corrupt(scene, rng, "clean" if clean else pick(rng, IMPERFECT))
    return LabeledImage(result.image, scene, result.labels, result.damaged, scene, result.faulty)


def judge_questions(
    verifier: HFVerifier, example: LabeledImage, asked: Sequence[LabeledQuestion]
) -> list[Row]:
    """Rows of one image's questions; a failed answer counts as wrong."""
    answers = verifier.answer(example.image, [text for text, *_ in asked])
    rows = []
    for (_, word, type_), answer in zip(asked, answers, strict=True):
        truth = word == "yes"
        p_yes = float(not truth) if answer.p_yes is None else answer.p_yes
        rows.append((type_, truth, p_yes))
    return rows


def sample_questions(example: LabeledImage, rng: np.random.Generator) -> list[LabeledQuestion]:
    """`QUESTIONS` different questions about an image (fewer if there are no more)."""
    # Asked for many, `questions_about` fills up with repetitions only behind the different ones.
    asked = verifier_data.questions_about(example, rng, 4 * QUESTIONS)
    return list({text: (text, *rest) for text, *rest in asked}.values())[:QUESTIONS]


def collect(verifier: HFVerifier, seed: int, images: int, *, clean: bool) -> list[Row]:
    """Rows of the questions about each of `images` held-out images."""
    rng = np.random.default_rng([seed, clean])
    rows = []
    for _ in range(images):
        example = heldout_example(rng, clean=clean)
        rows += judge_questions(verifier, example, sample_questions(example, rng))
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


def timed_lists(seed: int, images: int) -> list[Sample]:
    """Held-out images and their questions; no list occurs twice, as verifiers keep their texts."""
    rng, lists = np.random.default_rng(seed), {}
    while len(lists) < images:
        example = heldout_example(rng, clean=True)
        lists[tuple(text for text, *_ in sample_questions(example, rng))] = example.image
    return [(image, texts) for texts, image in lists.items()]


def time_verifier(verifier: HFVerifier, samples: Sequence[Sample]) -> tuple[float, list[float]]:
    """Seconds for all samples but the first, which warms up, and P(yes) of all their questions."""
    verifier.answer(*samples[0])
    start = time.perf_counter()
    answers = [verifier.answer(*sample) for sample in samples[1:]]
    seconds = time.perf_counter() - start
    return seconds, [_given(answer.p_yes) for each in answers for answer in each]


def time_pool(folder: Path, workers: int, samples: Sequence[Sample]) -> tuple[float, list[float]]:
    """The same of a pool, which the first sample warms up in every worker, more or less.

    Raises:
      PoolError: no worker starts.
    """
    factories = [("hf", {"path": str(folder), "num_threads": 1})] * workers
    with Pool(factories, config_checks.read_config().verifier) as pool:
        pool.wait_ready()
        for number in range(2 * workers):
            pool.submit(("warm", number), *samples[0])
        pool.gather([("warm", number) for number in range(2 * workers)])
        numbers = range(1, len(samples))
        start = time.perf_counter()
        for number in numbers:
            pool.submit(number, *samples[number])
        found = pool.gather(numbers)
        seconds = time.perf_counter() - start
    return seconds, [_given(p) for number in numbers for p in found[number].p_yes or [None]]


def _given(p_yes: float | None) -> float:
    """Raises InputError for an answer that failed: the times would not be comparable."""
    if p_yes is None:
        raise InputError("a question got no answer; measure accuracy first")
    return p_yes


def speed(folder: Path, samples: Sequence[Sample], threads: int) -> dict[str, dict[str, float]]:
    """Questions per second three ways: the same images, questions and number of cores.

    Args:
      folder: of the verifier.
      samples: the first of them warms up.
      threads: of the one process, and workers of the pool.
    Returns:
      By way: `questions_per_second`, `ms_per_image`, and `apart`, the largest difference of a
      P(yes) from the first way's.
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


def speed_table(found: Mapping[str, Mapping[str, float]], samples: Sequence[Sample]) -> str:
    """The figures of `speed` as lines to read."""
    asked = sum(len(texts) for _, texts in samples[1:])
    lines = [
        f"{len(samples) - 1} held-out images, {asked} questions",
        f"{'':<46}{'questions/s':>12}{'ms/image':>10}{'largest difference of P(yes)':>30}",
    ]
    lines += [
        f"{name:<46}{row['questions_per_second']:>12.1f}{row['ms_per_image']:>10.1f}"
        f"{row['apart']:>30.1e}"
        for name, row in found.items()
    ]
    return "\n".join(lines)


@functools.cache
def queries_by_text() -> dict[str, Query]:
    """Every semantic question of the shapes world: text -> meaning."""
    groups = [
        Group(1, *kind) for kind in itertools.product((None, *scenes.SHAPES), (None, *COLORS))
    ]
    full = [group for group in groups if group.shape is not None and group.color is not None]
    numbers = range(1, len(NUMBERS) + 1)
    queries = [questions.exists(group) for group in groups]
    queries += [questions.has_color(group.shape, group.color) for group in full]
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
    verifier: HFVerifier, drawings: np.ndarray, records: Sequence[Mapping]
) -> dict[str, float]:
    """How far verifier and exact checker agree about drawings.

    Args:
      verifier: what is measured.
      drawings: uint8[N, 48, 48, 3].
      records: N, the prompts that were drawn, with their semantic questions and facts.
    Returns:
      Shares, see this file's docstring; `all_yes_if_exact` and `all_yes_if_wrong` are those of
      `all_yes` among the drawings that the checker finds right and wrong.
    Raises:
      KeyError: a question that the shapes world does not ask.
    """
    rows, parsed, yes, exact = [], [], [], []
    for image, record in zip(drawings, records, strict=True):
        own = [each["question"] for each in record["semantic_questions"] if each["is_valid"]]
        p_yes = [answer.p_yes for answer in verifier.answer(image, own)]
        yes.append(all(p is not None and p > 0.5 for p in p_yes))
        exact.append(checker.exact_all(image, record["facts"]))
        seen = checker.parse(image)
        parsed.append(seen.unknown == 0 and seen.background is not None)
        if parsed[-1]:
            scene = scenes.Scene(seen.objects, seen.background)
            for query, p in zip((queries_by_text()[text] for text in own), p_yes, strict=True):
                truth = questions.truth(query, scene)
                rows.append((query.type, truth, float(not truth) if p is None else p))
    said, held = np.array(yes), np.array(exact)
    found = {
        "drawings": len(held),
        "parsed": float(np.mean(parsed)),
        "agreement": float(np.mean([(p > 0.5) == truth for _, truth, p in rows])),
        **{f"balanced/{type_}": share for type_, share in balanced(rows).items()},
        "exact": float(held.mean()),
        "all_yes": float(said.mean()),
        "all_yes_agreement": float((said == held).mean()),
    }
    for name, members in (("exact", held), ("wrong", ~held)):
        if members.any():
            found[f"all_yes_if_{name}"] = float(said[members].mean())
    return found


def read_drawings(path: Path) -> tuple[np.ndarray, list[dict]]:
    """Images uint8[N, 48, 48, 3] and records, as `measure --drawings` writes them.

    Raises:
      MissingFileError: there is no such file.
      InputError: the file holds something else.
    """
    hint = "make one with python -m alphagrpo_jax.studies.measure --drawings"
    try:
        file = np.load(existing_file(path, hint))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:  # of NumPy: no file of arrays
        raise InputError(f"--drawings {path} cannot be read ({error}); {hint}") from error
    if not isinstance(file, np.lib.npyio.NpzFile) or {*file} != {"images", "records"}:
        raise InputError(f"--drawings {path}: expected an .npz of images and records; {hint}")
    with file:
        return file["images"], [json.loads(str(text)) for text in file["records"]]


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


def measure(options: argparse.Namespace) -> dict:
    """The figures that the flags ask for."""
    drawings = None if options.drawings is None else read_drawings(options.drawings)
    verifier = HFVerifier(options.model, num_threads=options.threads)
    figures = evaluate(verifier, options.images, options.seed)
    if drawings is not None:
        figures["drawings"] = agreement(verifier, *drawings)
    return figures


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="verifier folder")
    add("--images", type=int, default=1000, help="clean, and as many imperfect")
    add("--seed", type=int, default=1)
    add("--threads", type=int, default=2)
    add("--drawings", type=Path, help=".npz file that measure --drawings wrote")
    add(
        "--speed", nargs="?", type=int, const=TIMED, metavar="IMAGES", help="only time IMAGES (200)"
    )
    options = parser.parse_args(arguments)
    if options.speed is not None and (options.speed < 1 or options.threads < 1):
        parser.error("--speed and --threads must be at least 1")
    return options


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
