"""Metrics of an evaluation: rewards by the verifier, facts by the exact checker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alphagrpo_jax.config import RewardOptions
from alphagrpo_jax.evaluation.checkers import ImageReader
from alphagrpo_jax.evaluation.diversity import diversity
from alphagrpo_jax.refinement import outcomes
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.runtime.records import Record

# Reward metrics that an evaluation's row keeps.
REWARD_METRICS = (
    "reward/mean",
    "reward/format",
    "reward/valid_fraction",
    "question/saturated_fraction",
)
REWARD_FAMILIES = ("reward/tag/", "reward/score/")  # and those that begin so


class Sampled(NamedTuple):
    """Samples of a batch of N prompts."""

    images: np.ndarray | None  # uint8[N, H, W, 3]
    thinks: Sequence[list[str]]  # [think steps][N]
    answers: list[str]  # N, or none if the task has none


# (evaluation rows int64[N], number of the first) -> their samples
SampleFn = Callable[[np.ndarray, int], Sampled]


class Evaluation(NamedTuple):
    """Result of an evaluation on N prompts."""

    metrics: dict[str, float]
    images: np.ndarray | None  # uint8[N, H, W, 3]
    captions: list[dict[str, Any]]  # prompt, text, reward, exact, per image or answer
    rewards: scoring.Rewards
    records: Sequence[Record]


def evaluate_images(
    sample: SampleFn,
    verifier: scoring.VerifierPool,
    records: Sequence[Record],
    *,
    micro_batch: int,
    scoring_options: RewardOptions,
    check: ImageReader,
    prefix: str,
    second: scoring.VerifierPool | None = None,
) -> Evaluation:
    """Samples one image per prompt, while the verifier answers about the batch before.

    Args:
      sample: samples a micro-batch.
      verifier: answers the questions.
      records: of the prompts, N.
      micro_batch: prompts per call of `sample`; the last call is filled up and cut.
      scoring_options: as in training.
      check: the exact checker.
      prefix: of the metrics' names, "eval" or "eval_greedy".
      second: rates the same images in the same way, for the metrics alone; scorers are asked once.
    """
    sample_ids = [(prefix, number) for number in range(len(records))]
    pools = [(verifier, scoring_options)]
    if second:
        pools.append((second, scoring.judged_only(scoring_options)))
    image_batches, think_batches = [], []
    for rows, filled in _micro_batches(len(records), micro_batch):
        count = rows.stop - rows.start
        sampled = sample(filled, rows.start)
        assert sampled.images is not None  # of tasks that generate images
        images = sampled.images[:count]
        for pool, options in pools:
            scoring.submit(
                pool, sample_ids[rows], images, records[rows], options, rows=filled[:count]
            )
        image_batches.append(images)
        think_batches.append([texts[:count] for texts in sampled.thinks])
    thinks = _join_steps(think_batches)
    rewards = scoring.gather(verifier, sample_ids, records, thinks, scoring_options)
    images = np.concatenate(image_batches)
    readings = [check(image, record) for image, record in zip(images, records, strict=True)]
    facts = [reading.facts for reading in readings]
    choices = [reading.choices for reading in readings]
    metrics = summarize(rewards, facts, records) | diversity(images, choices)
    for pool, options in pools[1:]:
        second_rewards = scoring.gather(pool, sample_ids, records, (), options)
        second_rewards = scoring.with_scores_of(second_rewards, rewards, scoring_options)
        metrics |= compare_verifiers(rewards, second_rewards)
    exact = [None if image_facts is None else all(image_facts.values()) for image_facts in facts]
    texts = [" | ".join(steps) for steps in zip(*thinks, strict=True)] or [None] * len(records)
    captions = _captions(records, texts, rewards, exact)
    return Evaluation(_prefixed(prefix, metrics), images, captions, rewards, records)


def evaluate_answers(
    sample: SampleFn, records: Sequence[Record], *, micro_batch: int, prefix: str
) -> Evaluation:
    """Samples one answer per question; `exact_all` is the share of right ones.

    Args:
      sample: samples a micro-batch.
      records, micro_batch, prefix: as of `evaluate_images`.
    """
    think_batches, answers = [], []
    for rows, filled in _micro_batches(len(records), micro_batch):
        count = rows.stop - rows.start
        sampled = sample(filled, rows.start)
        think_batches.append([texts[:count] for texts in sampled.thinks])
        answers += sampled.answers[:count]
    rewards = scoring.answer_scores(records, answers, _join_steps(think_batches))
    exact = [reward == 1.0 for reward in rewards.reward]
    metrics = summarize(rewards, [{"answer": right} for right in exact], records)
    del metrics["reward_minus_exact"]  # the reward is the exact verdict
    captions = _captions(records, answers, rewards, exact)
    return Evaluation(_prefixed(prefix, metrics), None, captions, rewards, records)


def refinement_metrics(
    records: Sequence[Record], before: np.ndarray, after: np.ndarray, check: ImageReader
) -> dict[str, float]:
    """Compares the share of facts that hold before and after refinement.

    Args:
      records: N, some of which describe facts.
      before, after: uint8[N, H, W, 3].
      check: the exact checker.
    Returns:
      `refined/improved`, `refined/kept`, `refined/spoilt` (shares of images), and `refined/gain`,
      by how much the share of fully right images rose; empty if no record describes facts.
    """
    pairs = [
        (check(image_before, record).facts, check(image_after, record).facts)
        for image_before, image_after, record in zip(before, after, records, strict=True)
    ]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not pairs:
        return {}
    shares = np.array([[np.mean(list(facts.values())) for facts in pair] for pair in pairs])
    all_right = shares == 1.0
    metrics = outcomes(shares[:, 0], shares[:, 1])
    metrics["gain"] = float(all_right[:, 1].mean() - all_right[:, 0].mean())
    return _prefixed("refined", metrics)


def compare_verifiers(rewards: scoring.Rewards, second: scoring.Rewards) -> dict[str, float]:
    """Compares a second verifier's rewards of the same images, where both verifiers answered.

    A reward that rises while `second_minus_reward` falls is learned against the training verifier.

    Args:
      rewards: by the verifier of the training.
      second: by the second one.
    """
    valid = rewards.valid & second.valid
    metrics = {"second/valid_fraction": float(np.mean(second.valid))}
    if valid.any():
        mean = float(second.reward[valid].mean())
        metrics |= {
            "second/mean": mean,
            "second_minus_reward": mean - float(rewards.reward[valid].mean()),
        }
    return metrics


def summarize(
    rewards: scoring.Rewards,
    facts: Sequence[Mapping[str, bool] | None],
    records: Sequence[Record],
) -> dict[str, float]:
    """Computes reward metrics and, over the records that describe facts, exact scores by kind.

    `exact_all` is the share of images with all facts right, `exact_facts` the share of all facts
    that are; `reward_minus_exact` compares the mean reward with `exact_all` on the same images.
    """
    metrics = {
        key: value
        for key, value in rewards.metrics().items()
        if key in REWARD_METRICS or key.startswith(REWARD_FAMILIES)
    }
    checked = np.array([image_facts is not None for image_facts in facts], bool)
    if not checked.any():
        return metrics
    exact = np.array(
        [image_facts is not None and all(image_facts.values()) for image_facts in facts]
    )
    values = [value for image_facts in facts if image_facts for value in image_facts.values()]
    metrics["exact_all"] = float(exact[checked].mean())
    metrics["exact_facts"] = float(np.mean(values))
    groups: dict[str, list[int]] = {}
    for index in map(int, np.flatnonzero(checked)):
        extra = records[index].extra
        if "kind" not in extra:
            continue
        groups.setdefault(f"exact_all/{extra['kind']}", []).append(index)
        if "type" in extra:
            groups.setdefault(f"exact_all/{extra['kind']}/{extra['type']}", []).append(index)
    metrics |= {name: float(exact[members].mean()) for name, members in groups.items()}
    compared = checked & rewards.valid
    if compared.any():
        metrics["reward_minus_exact"] = float(
            rewards.reward[compared].mean() - exact[compared].mean()
        )
    return metrics


def _micro_batches(count: int, micro_batch: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices of at most `micro_batch` rows, and their numbers filled up to that many."""
    for first in range(0, count, micro_batch):
        rows = slice(first, min(first + micro_batch, count))
        yield rows, np.resize(np.arange(rows.start, rows.stop), micro_batch)


def _join_steps(batches: Sequence[Sequence[list[str]]]) -> list[list[str]]:
    """Joins the texts of each step over all batches: [batches][steps][n] -> [steps][N]."""
    return [[text for texts in step for text in texts] for step in zip(*batches, strict=True)]


def _captions(
    records: Sequence[Record],
    texts: Sequence[str | None],
    rewards: scoring.Rewards,
    exact: Sequence[bool | None],
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": record.prompt,
            "think": text,
            "reward": None if np.isnan(reward) else round(float(reward), 4),
            "exact": right,
        }
        for record, text, reward, right in zip(records, texts, rewards.reward, exact, strict=True)
    ]


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
