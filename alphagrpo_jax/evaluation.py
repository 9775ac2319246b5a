"""Evaluation inside a run: held-out prompts drawn with fixed keys, rewarded and checked."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alphagrpo_jax.prompts import PromptSet
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.pool import Pool
from alphagrpo_jax.rewards.questions import Record
from alphagrpo_jax.shapes import checker

# (tokens int32[N, T], mask bool[N, T], number of the first) -> (images uint8[N, H, W, 3], think
# texts; none if the task has none)
Draw = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, list[str]]]
# An image and its record -> which facts hold, or None where the record describes none.
FactCheck = Callable[[np.ndarray, Record], Mapping[str, bool] | None]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, N prompts."""

    metrics: dict[str, float]
    images: np.ndarray  # uint8[N, H, W, 3]
    captions: list[dict[str, Any]]  # prompt, think text, reward, exact, per image
    scores: scoring.Scores


def shapes_facts(image: np.ndarray, record: Record) -> Mapping[str, bool] | None:
    """The exact checker of the shapes world; None for records without "facts"."""
    return checker.facts(image, record.extra["facts"]) if "facts" in record.extra else None


CHECKERS: dict[str, FactCheck] = {"shapes": shapes_facts, "": lambda image, record: None}


def check_records(prompts: PromptSet, check: FactCheck, size: tuple[int, int]) -> None:
    """Tries the exact checker on a blank image for every prompt, before anything is drawn.

    Args:
      prompts: the held-out set.
      check: the exact checker.
      size: height and width of the images to come, pixels.
    Raises:
      ValueError: facts of another form, or an image size that the checker does not read.
    """
    blank = np.zeros((*size, 3), np.uint8)
    for number, record in enumerate(prompts.records, start=1):
        try:
            check(blank, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"data.heldout, record {number} ({record.prompt!r}): the exact checker cannot read "
                f'its "facts" in images of {size[0]}x{size[1]} pixels: {error!r}; leave "facts" '
                "out, or set eval.checker='' to evaluate by reward alone"
            ) from error


def evaluate(
    draw: Draw,
    pool: Pool,
    prompts: PromptSet,
    rows: Sequence[int],
    *,
    micro_batch: int,
    scoring_options: scoring.ScoringOptions,
    check: FactCheck,
    prefix: str,
) -> Evaluation:
    """Draws one image per prompt, while the pool answers about those drawn before.

    Args:
      draw: draws a micro-batch.
      pool: answers the questions.
      prompts: the held-out set.
      rows: which of its prompts.
      micro_batch: prompts per call of `draw`; the last call is filled up and cut.
      scoring_options: as in training.
      check: the exact checker.
      prefix: of the metrics' names, "eval" or "eval_greedy".
    """
    records = [prompts.records[row] for row in rows]
    ids = [(prefix, number) for number in range(len(rows))]
    images, texts = [], []
    for first in range(0, len(rows), micro_batch):
        part = np.asarray(rows[first : first + micro_batch])
        filled = np.resize(part, micro_batch)
        drawn, written = draw(prompts.tokens[filled], prompts.mask[filled], first)
        drawn, stop = drawn[: len(part)], first + len(part)
        scoring.submit(pool, ids[first:stop], drawn, records[first:stop], first=first)
        images.append(drawn)
        texts += written[: len(part)]
    scores = scoring.gather(pool, ids, records, texts or None, scoring_options)
    pictures = np.concatenate(images)
    facts = [check(image, record) for image, record in zip(pictures, records, strict=True)]
    metrics = summarise(scores, facts, records)
    captions = [
        {
            "prompt": record.prompt,
            "think": text,
            "reward": None if np.isnan(reward) else round(float(reward), 4),
            "exact": None if held is None else all(held.values()),
        }
        for record, text, reward, held in zip(
            records, texts or [None] * len(rows), scores.reward, facts, strict=True
        )
    ]
    named = {f"{prefix}/{name}": value for name, value in metrics.items()}
    return Evaluation(named, pictures, captions, scores)


def summarise(
    scores: scoring.Scores,
    facts: Sequence[Mapping[str, bool] | None],
    records: Sequence[Record],
) -> dict[str, float]:
    """Rewards, and, over the records that describe facts, exact scores by kind and type.

    `exact_all` is the share of images with all facts right, `exact_facts` the share of all facts
    that are; `reward_minus_exact` compares the mean reward with `exact_all` on the same images.
    """
    metrics = {
        key: value
        for key, value in scores.metrics().items()
        if key in ("reward/mean", "reward/format", "reward/valid_fraction")
    }
    checked = np.array([held is not None for held in facts], bool)
    if not checked.any():
        return metrics
    exact = np.array([held is not None and all(held.values()) for held in facts], bool)
    values = [value for held in facts if held is not None for value in held.values()]
    metrics["exact_all"] = float(exact[checked].mean())
    metrics["exact_facts"] = float(np.mean(values))
    groups: dict[str, list[int]] = {}
    for index in np.flatnonzero(checked):
        extra = records[index].extra
        if "kind" not in extra:
            continue
        groups.setdefault(f"exact_all/{extra['kind']}", []).append(index)
        if "type" in extra:
            groups.setdefault(f"exact_all/{extra['kind']}/{extra['type']}", []).append(index)
    metrics |= {name: float(exact[members].mean()) for name, members in groups.items()}
    both = checked & scores.valid
    if both.any():
        metrics["reward_minus_exact"] = float(scores.reward[both].mean() - exact[both].mean())
    return metrics
