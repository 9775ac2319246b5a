"""Prompt records of the shapes world, in the form that DVReward asks for.

    python -m alphagrpo_jax.shapes.prompts --out alphagrpo_jax/shapes/assets/data

A record has the fields of any record of questions, and besides: `kind` (plain or implied), `type`
(see `requests`), `combination` (the meaning's canonical text), `facts` (the meaning as
`checker.facts` reads it) and `riddles` (their clues). Questions about implied prompts ask for the
true meaning. Splits are disjoint by combination, whatever the kind or the wording.
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

from alphagrpo_jax.shapes import questions, requests, riddles
from alphagrpo_jax.shapes.questions import Query
from alphagrpo_jax.shapes.riddles import Riddle
from alphagrpo_jax.shapes.specs import SPLITS, Group, Spec

KINDS = ("plain", "implied")
MAX_SEMANTIC = 5  # questions per record; three questions of quality come on top
CANDIDATES = 12  # implied requests drawn for each one kept, so that riddles occur evenly
PLAIN_CANDIDATES = 4  # plain requests drawn for each one kept, so that combinations do
ONE_RIDDLE_FORMS = tuple(form for form in requests.IMPLIED_FORMS if "+" not in form)
MAX_REPEATED = 5000  # draws for one record before giving up
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


def question(kind: str, query: Query, dependency: Sequence[int], rng: np.random.Generator) -> dict:
    """A question of a record; `rng` picks its wording."""
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
        "semantic_questions": [question("semantic", q, needs, rng) for q, needs in semantic],
        "quality_questions": [question("quality", query, (), rng) for query in quality],
        "kind": request.kind,
        "type": request.type,
        "combination": request.spec.combination,
        "facts": request.spec.to_json(),
        "riddles": [riddle.clue for riddle in request.all_riddles],
    }


class _Fresh:
    """Draws requests whose texts have not been kept before, unless repeats are wanted."""

    def __init__(self, *, repeats: bool) -> None:
        self._repeats = repeats
        self._kept: set[str] = set()

    def draw(self, source: Callable[[], requests.Request], count: int) -> list[requests.Request]:
        """`count` requests from `source`.

        Raises:
          ValueError: the source repeats itself.
        """
        result: list[requests.Request] = []
        for _ in range(MAX_REPEATED):
            request = source()
            if self._repeats or request.text not in self._kept:
                result.append(request)
            if len(result) == count:
                return result
        raise ValueError(
            f"found {len(self._kept)} different prompts and no more; ask for fewer or allow repeats"
        )

    def keep(self, request: requests.Request) -> None:
        self._kept.add(request.text)


def _plain(
    split: str, rng: np.random.Generator, type_: str, fresh: _Fresh
) -> Iterator[requests.Request]:
    """Endless plain requests of a type, the combinations evenly among those of one size."""
    used: collections.Counter[str] = collections.Counter()
    while True:
        drawn = fresh.draw(lambda: requests.draw_plain(rng, type_, split), PLAIN_CANDIDATES)
        alike = [request for request in drawn if request.spec.total == drawn[0].spec.total]
        chosen = min(alike, key=lambda request: used[request.spec.combination])
        used[chosen.spec.combination] += 1
        fresh.keep(chosen)
        yield chosen


def _implied(
    split: str,
    rng: np.random.Generator,
    pool: Sequence[Riddle],
    forms: Sequence[str],
    fresh: _Fresh,
) -> Iterator[requests.Request]:
    """Endless implied requests: forms by their shares, riddles and then combinations evenly."""
    shares = np.array([requests.IMPLIED_FORMS[form] for form in forms])
    owed = np.zeros(len(forms))
    riddles_used: collections.Counter[str] = collections.Counter()
    used: collections.Counter[str] = collections.Counter()

    def usage(request: requests.Request) -> tuple[int, int]:
        clues = (riddle.clue for riddle in request.all_riddles)
        return sum(riddles_used[clue] for clue in clues), used[request.spec.combination]

    while True:
        owed += shares / shares.sum()
        form = forms[int(owed.argmax())]
        owed[forms.index(form)] -= 1
        draw = functools.partial(requests.draw_implied, rng, form, split, pool)
        chosen = min(fresh.draw(draw, CANDIDATES), key=usage)
        riddles_used.update(riddle.clue for riddle in chosen.all_riddles)
        used[chosen.spec.combination] += 1
        fresh.keep(chosen)
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
    """Records of a split; a function of the arguments alone.

    Args:
      split: "train", "validation" or "heldout".
      count: number of records; the kinds take turns, and within plain the types.
      kinds: of `KINDS`.
      seed: of everything random.
      pool: riddles that implied prompts may use.
      forms: of `requests.IMPLIED_FORMS`, in their shares.
      name: beginning of the ids; default: the split.
      repeats: whether a prompt may occur twice, as in large studies; types with few
        combinations have few different prompts.
    Raises:
      ValueError: unknown split or kind, or fewer such prompts than asked for.
    """
    if split not in SPLITS or not set(kinds) <= set(KINDS):
        raise ValueError(f"got split {split!r}, kinds {kinds}; expected of {SPLITS} and {KINDS}")
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    fresh = _Fresh(repeats=repeats)
    plain = [_plain(split, rng, type_, fresh) for type_ in requests.PLAIN_TYPES]
    implied = [_implied(split, rng, pool, forms, fresh)]
    sources = {"plain": itertools.cycle(plain), "implied": itertools.cycle(implied)}
    result: list[dict] = []
    for index in range(count):
        request = next(next(sources[kinds[index % len(kinds)]]))
        identity = {"id": f"{name or split}-{index:04d}", "original_index": index}
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
