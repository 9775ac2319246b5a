"""Prompt records of the shapes world, in the form that DVReward asks for.

    python -m alphagrpo_jax.shapes.prompts --out alphagrpo_jax/shapes/assets/data

A record has the fields of any record of questions, and besides: `kind` (plain or implied), `type`
(see `requests`), `combination` (the meaning's canonical text), `facts` (the meaning as
`checker.facts` reads it) and `riddles` (their clues). Questions about implied prompts ask for the
true meaning. Splits are disjoint by combination, whatever the kind or the wording.
"""

import argparse
import collections
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from alphagrpo_jax.shapes import questions, requests, riddles
from alphagrpo_jax.shapes.questions import Query
from alphagrpo_jax.shapes.riddles import Riddle
from alphagrpo_jax.shapes.specs import SPLITS, Group, Spec

KINDS = ("plain", "implied")
MAX_SEMANTIC = 5  # questions per record; three questions of quality come on top
CANDIDATES = 12  # implied requests drawn for each one kept, so that riddles occur evenly
ONE_RIDDLE_FORMS = tuple(form for form in requests.IMPLIED_FORMS if "+" not in form)
MAX_REPEATED = 5000  # prompts drawn twice before giving up
SEED = 0
SIZES = {"train": 1600, "validation": 200, "heldout": 400}
HELDOUT_RIDDLE_RECORDS = 60


def semantic_queries(spec: Spec, rng: np.random.Generator) -> list[tuple[Query, tuple[int, ...]]]:
    """The questions that are all answered yes exactly if a scene fulfils `spec`.

    Returns:
      (question, indexes of the questions that it depends on) pairs.
    """
    result: list[tuple[Query, tuple[int, ...]]] = []
    subjects: list[int] = []  # per group: the question that its presence hangs on
    spare = MAX_SEMANTIC - len(spec.groups) - 1
    spare -= (spec.relation is not None) + (spec.background is not None)
    for group in spec.groups:
        alone = sum(other.shape in (None, group.shape) for other in spec.groups) == 1
        full = group.shape is not None and group.color is not None
        if group.count > 1:
            result.append((questions.counts(group), ()))
        elif full and alone and spare > 0 and rng.random() < 0.5:
            spare -= 1
            result.append((questions.exists(Group(1, group.shape, None)), ()))
            result.append((questions.has_color(group.shape, group.color), (len(result) - 1,)))
        else:
            result.append((questions.exists(group), ()))
        subjects.append(len(result) - 1)
    result.append((questions.counts(Group(spec.total, None, None)), ()))
    if spec.relation is not None:
        ends = (spec.relation.first, spec.relation.second)
        query = questions.relates(spec.relation.name, *(spec.groups[i] for i in ends))
        result.append((query, tuple(subjects[i] for i in ends)))
    if spec.background is not None:
        result.append((questions.has_background(spec.background), ()))
    return result


def _question(
    kind: str, query: Query, dependency: Sequence[int], rng: np.random.Generator
) -> dict:
    wording = int(rng.integers(len(questions.WORDINGS[query.form])))
    fields = {
        "question_type": kind,
        "question": questions.text(query, wording),
        "is_valid": True,
        "tag": questions.TAGS[query.type],
    }
    return fields | ({"dependency": list(dependency)} if dependency else {})


def record(request: requests.Request, rng: np.random.Generator) -> dict:
    """The record of a request, without id and index; `rng` picks the questions' wordings."""
    semantic = semantic_queries(request.spec, rng)
    quality = [questions.quality(type_) for type_ in questions.QUALITY]
    return {
        "prompt": request.text,
        "semantic_questions": [_question("semantic", q, needs, rng) for q, needs in semantic],
        "quality_questions": [_question("quality", query, (), rng) for query in quality],
        "kind": request.kind,
        "type": request.type,
        "combination": request.spec.combination,
        "facts": request.spec.to_json(),
        "riddles": [riddle.clue for riddle in request.all_riddles],
    }


def _plain(split: str, rng: np.random.Generator) -> Iterator[requests.Request]:
    """Endless plain requests, the types in turn."""
    while True:
        for type_ in requests.PLAIN_TYPES:
            yield requests.draw_plain(rng, type_, split)


def _implied(
    split: str, rng: np.random.Generator, pool: Sequence[Riddle], forms: Sequence[str]
) -> Iterator[requests.Request]:
    """Endless implied requests, the forms by their shares, the riddles evenly."""
    shares = np.array([requests.IMPLIED_FORMS[form] for form in forms])
    owed = np.zeros(len(forms))
    used: collections.Counter[str] = collections.Counter()
    while True:
        owed += shares / shares.sum()
        next_form = int(owed.argmax())
        owed[next_form] -= 1
        drawn = [
            requests.draw_implied(rng, forms[next_form], split, pool) for _ in range(CANDIDATES)
        ]
        chosen = min(drawn, key=lambda request: sum(used[r.clue] for r in request.all_riddles))
        used.update(riddle.clue for riddle in chosen.all_riddles)
        yield chosen


def records(
    split: str,
    count: int,
    *,
    kinds: Sequence[str] = KINDS,
    seed: int = SEED,
    pool: Sequence[Riddle] = riddles.TRAINED,
    forms: Sequence[str] = tuple(requests.IMPLIED_FORMS),
    name: str | None = None,
) -> list[dict]:
    """Records with different prompts; a function of the arguments alone.

    Args:
      split: "train", "validation" or "heldout".
      count: number of records; the kinds take turns, and within plain the types.
      kinds: of `KINDS`.
      seed: of everything random.
      pool: riddles that implied prompts may use.
      forms: of `requests.IMPLIED_FORMS`, in their shares.
      name: beginning of the ids; default: the split.
    Raises:
      ValueError: unknown split or kind, or fewer such prompts than asked for.
    """
    if split not in SPLITS or not set(kinds) <= set(KINDS):
        raise ValueError(f"got split {split!r}, kinds {kinds}; expected of {SPLITS} and {KINDS}")
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    sources = {"plain": _plain(split, rng), "implied": _implied(split, rng, pool, forms)}
    seen: set[str] = set()
    result: list[dict] = []
    repeated = 0
    while len(result) < count:
        request = next(sources[kinds[len(result) % len(kinds)]])
        if request.text in seen:
            repeated += 1
            if repeated > MAX_REPEATED:
                raise ValueError(f"split {split!r} has only {len(result)} of {count} such prompts")
            continue
        seen.add(request.text)
        identity = {"id": f"{name or split}-{len(result):04d}", "original_index": len(result)}
        result.append(identity | record(request, rng))
    return result


def files(seed: int = SEED) -> dict[str, list[dict]]:
    """The shipped files: name -> records."""
    result = {f"{split}.jsonl": records(split, SIZES[split], seed=seed) for split in SPLITS}
    result["heldout_riddles.jsonl"] = records(
        "heldout",
        HELDOUT_RIDDLE_RECORDS,
        kinds=("implied",),
        seed=seed + 1,
        pool=riddles.HELDOUT,
        forms=ONE_RIDDLE_FORMS,
        name="heldout-riddles",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the files into a folder."""
    parser = argparse.ArgumentParser(description="Writes the shapes world's prompt records.")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if need be")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, found in files(options.seed).items():
        lines = [json.dumps(each, separators=(",", ":")) + "\n" for each in found]
        (options.out / name).write_text("".join(lines), encoding="utf-8")
        sys.stdout.write(f"{options.out / name}: {len(found)} records\n")


if __name__ == "__main__":
    main()
