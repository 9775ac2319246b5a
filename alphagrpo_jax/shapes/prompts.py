"""Writes the prompt records of the shapes world, in the form that DVReward asks for.

    python -m alphagrpo_jax.shapes.prompts --out alphagrpo_jax/shapes/assets/data

A record has the fields of every record of questions, and in addition: `kind` (plain or implied),
`type` (see `requests`), `combination` (the meaning's canonical text), `facts` (the meaning as
`checker.facts` takes it) and `riddles` (their clues). Questions about implied prompts ask for the
true meaning. Splits are disjoint by combination, across kinds and wordings.
"""

import argparse
import collections
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from alphagrpo_jax.runtime import cli
from alphagrpo_jax.shapes import questions, requests, riddles
from alphagrpo_jax.shapes.questions import Query
from alphagrpo_jax.shapes.riddles import Riddle
from alphagrpo_jax.shapes.specs import SPLITS, Group, Spec

KINDS = ("plain", "implied")
MAX_SEMANTIC = 5  # questions per record; three quality questions come on top
CANDIDATES = 12  # implied requests sampled per record, so that riddles occur evenly
PLAIN_CANDIDATES = 4  # plain requests sampled per record, so that combinations occur evenly
ONE_RIDDLE_FORMS = tuple(form for form in requests.IMPLIED_FORMS if "+" not in form)
MAX_REPEATED = 5000  # samples for one record before giving up
SEED = 0
SIZES = {"train": 1600, "validation": 200, "heldout": 400}
HELDOUT_RIDDLE_RECORDS = 60


def semantic_queries(spec: Spec, rng: np.random.Generator) -> list[tuple[Query, tuple[int, ...]]]:
    """Builds questions whose answers are all yes exactly if a scene fulfills `spec`.

    Returns:
      (question, indexes of the questions that it depends on) pairs.
    """
    result: list[tuple[Query, tuple[int, ...]]] = []
    subjects: list[int] = []  # per group: index of the question that asks for its presence
    spare = MAX_SEMANTIC - len(spec.groups) - 1
    spare -= (spec.relation is not None) + (spec.background is not None)
    for group in spec.groups:
        shape, color = group.shape, group.color
        is_unique = sum(g.shape in (None, shape) for g in spec.groups) == 1
        if group.count > 1:
            result.append((questions.counts(group), ()))
        elif (
            shape is not None
            and color is not None
            and is_unique
            and spare > 0
            and rng.random() < 0.5
        ):
            spare -= 1
            result.append((questions.exists(Group(1, shape, None)), ()))
            result.append((questions.has_color(shape, color), (len(result) - 1,)))
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


def question_fields(
    kind: str, query: Query, dependency: Sequence[int], rng: np.random.Generator
) -> dict:
    """Writes a question of a record; `rng` picks its wording.

    Args:
      kind: "semantic" or "quality".
      query: the question's meaning.
      dependency: indexes of the semantic questions that this one depends on.
      rng: picks the wording.
    """
    wording = int(rng.integers(len(questions.WORDINGS[query.form])))
    fields = {
        "question_type": kind,
        "question": questions.text(query, wording),
        "is_valid": True,
        "tag": questions.TAGS[query.type],
    }
    return fields | ({"dependency": list(dependency)} if dependency else {})


def record(request: requests.Request, rng: np.random.Generator) -> dict:
    """Writes the record of a request, without id and index; `rng` picks the wordings."""
    semantic = semantic_queries(request.spec, rng)
    quality = [questions.quality(type_) for type_ in questions.QUALITY]
    return {
        "prompt": request.text,
        "semantic_questions": [
            question_fields("semantic", query, dependency, rng) for query, dependency in semantic
        ],
        "quality_questions": [question_fields("quality", query, (), rng) for query in quality],
        "kind": request.kind,
        "type": request.type,
        "combination": request.spec.combination,
        "facts": request.spec.to_json(),
        "riddles": [riddle.clue for riddle in request.all_riddles],
    }


class _UniqueRequests:
    """Samples requests whose texts are not used yet, unless repeats are allowed."""

    def __init__(self, *, repeats: bool) -> None:
        self._repeats = repeats
        self._used: set[str] = set()

    def sample(self, source: Callable[[], requests.Request], count: int) -> list[requests.Request]:
        """Samples `count` requests from `source`.

        Raises:
          ValueError: the source returns used texts only.
        """
        result: list[requests.Request] = []
        for _ in range(MAX_REPEATED):
            request = source()
            if self._repeats or request.text not in self._used:
                result.append(request)
            if len(result) == count:
                return result
        raise ValueError(
            f"found {len(self._used)} different prompts and no more; ask for fewer or allow repeats"
        )

    def use(self, request: requests.Request) -> None:
        """Marks a request's text as used."""
        self._used.add(request.text)


def _plain(
    split: str, rng: np.random.Generator, type_: str, unique: _UniqueRequests
) -> Iterator[requests.Request]:
    """Samples endless plain requests of a type, combinations of equal size evenly."""
    uses: collections.Counter[str] = collections.Counter()
    while True:
        candidates = unique.sample(
            lambda: requests.sample_plain(rng, type_, split), PLAIN_CANDIDATES
        )
        total = candidates[0].spec.total
        same_size = [request for request in candidates if request.spec.total == total]
        chosen = min(same_size, key=lambda request: uses[request.spec.combination])
        uses[chosen.spec.combination] += 1
        unique.use(chosen)
        yield chosen


def _implied(
    split: str,
    rng: np.random.Generator,
    pool: Sequence[Riddle],
    forms: Sequence[str],
    unique: _UniqueRequests,
) -> Iterator[requests.Request]:
    """Samples endless implied requests: forms by share, riddles and then combinations evenly."""
    shares = np.array([requests.IMPLIED_FORMS[form] for form in forms])
    deficits = np.zeros(len(forms))  # requests by share minus requests so far
    riddle_uses: collections.Counter[str] = collections.Counter()
    uses: collections.Counter[str] = collections.Counter()

    def usage(request: requests.Request) -> tuple[int, int]:
        clues = (riddle.clue for riddle in request.all_riddles)
        return sum(riddle_uses[clue] for clue in clues), uses[request.spec.combination]

    while True:
        deficits += shares / shares.sum()
        form = forms[int(deficits.argmax())]
        deficits[forms.index(form)] -= 1
        source = functools.partial(requests.sample_implied, rng, form, split, pool)
        chosen = min(unique.sample(source, CANDIDATES), key=usage)
        riddle_uses.update(riddle.clue for riddle in chosen.all_riddles)
        uses[chosen.spec.combination] += 1
        unique.use(chosen)
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
    repeats: bool = False,
) -> list[dict]:
    """Generates records of a split; the result depends on the arguments alone.

    Args:
      split: "train", "validation" or "heldout".
      count: number of records; the kinds take turns, and within plain the types.
      kinds: subset of `KINDS`.
      seed: of everything random.
      pool: riddles that implied prompts may use.
      forms: subset of `requests.IMPLIED_FORMS`, in their shares.
      name: prefix of the ids; default: the split.
      repeats: allow a prompt to occur twice, as large studies need: types with few combinations
        have few different prompts.
    Raises:
      ValueError: unknown split or kind, or fewer such prompts than asked for.
    """
    if split not in SPLITS or not set(kinds) <= set(KINDS):
        raise ValueError(f"got split {split!r}, kinds {kinds}; expected of {SPLITS} and {KINDS}")
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    unique = _UniqueRequests(repeats=repeats)
    plain = [_plain(split, rng, type_, unique) for type_ in requests.PLAIN_TYPES]
    implied = [_implied(split, rng, pool, forms, unique)]
    sources = {"plain": itertools.cycle(plain), "implied": itertools.cycle(implied)}
    result: list[dict] = []
    for index in range(count):
        request = next(next(sources[kinds[index % len(kinds)]]))
        identity = {"id": f"{name or split}-{index:04d}", "original_index": index}
        result.append(identity | record(request, rng))
    return result


def files(seed: int = SEED) -> dict[str, list[dict]]:
    """Generates the shipped files: name -> records."""
    result = {f"{split}.jsonl": records(split, SIZES[split], seed=seed) for split in SPLITS}
    for split in ("train", "heldout"):  # for images without think texts, which solve no riddles
        plain = records(split, SIZES[split], kinds=("plain",), seed=seed, name=f"plain-{split}")
        result[f"plain_{split}.jsonl"] = plain
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


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description="Writes the shapes world's prompt records.")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if need be")
    parser.add_argument("--seed", type=cli.SEED, default=SEED)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Writes the files into a folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files(options.seed).items():
        lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
        (options.out / name).write_text("".join(lines), encoding="utf-8")
        sys.stdout.write(f"{options.out / name}: {len(rows)} records\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
