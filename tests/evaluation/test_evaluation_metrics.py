"""Evaluation sums, by hand."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny_world
from default_options import reward_options

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.evaluation import metrics
from alphagrpo_jax.evaluation.checkers import NOTHING, ImageReading
from alphagrpo_jax.evaluation.heldout import check_heldout
from alphagrpo_jax.prompts import PromptSet, TaskData
from alphagrpo_jax.rewards.scoring import Rewards
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.tasks import TASKS

KINDS = [("plain", "count"), ("plain", "count"), ("plain", "relation"), ("implied", "number")]
FACTS = [
    {"a": True, "b": True},
    {"a": True, "b": False},
    {"a": True},
    {"a": False, "b": False, "c": True},
]


def records():
    return [
        parse_record(tiny_world.record(f"p{i}", kind=kind, type=type_))
        for i, (kind, type_) in enumerate(KINDS)
    ]


def scores(reward, valid):
    zeros = np.zeros(len(reward))
    return Rewards(np.array(reward), zeros, zeros, zeros, np.array(valid), {})


def test_exact_scores_by_kind_and_type():
    reward = [0.9, 0.5, np.nan, 0.4]
    summary = metrics.summarize(scores(reward, [True, True, False, True]), FACTS, records())
    assert summary["exact_all"] == 0.5
    assert summary["exact_facts"] == 5 / 8
    assert summary["exact_all/plain"] == pytest.approx(2 / 3)
    assert summary["exact_all/plain/count"] == 0.5
    assert summary["exact_all/plain/relation"] == 1.0
    assert summary["exact_all/implied"] == 0.0
    assert summary["exact_all/implied/number"] == 0.0
    assert summary["reward/mean"] == pytest.approx(0.6)
    assert summary["reward/valid_fraction"] == 0.75
    assert summary["reward_minus_exact"] == pytest.approx(0.6 - 1 / 3)


def test_facts_without_a_kind_count_in_the_whole_only():
    without = [parse_record(tiny_world.record(f"p{i}", type="count")) for i in range(4)]
    summary = metrics.summarize(scores([0.5] * 4, [True] * 4), FACTS, without)
    assert summary["exact_all"] == 0.5
    assert not any(name.startswith("exact_all/") for name in summary)


def test_facts_that_the_checker_cannot_read_are_refused_before_drawing():
    good = tiny_world.record("a red circle")
    bad = tiny_world.record("a blue square", facts={"colour": "blue"})
    prompts = PromptSet(
        TASKS["rt2i"], tuple(map(parse_record, (good, bad))), (), pathlib.Path(), ""
    )
    config = config_lib.from_config_dict(tiny_world.config(pathlib.Path("unused")))
    check_heldout(config, {"rt2i": TaskData(None, prompts)})  # without a checker
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, checker="shapes"))
    for name, source in (
        ("rt2i", "data.heldout=unused/held"),
        ("ti2i", "data.edit_heldout=unused"),
    ):
        task_prompts = prompts._replace(task=TASKS[name])
        message = f"{source}.*record 2 .'a blue square'.*eval.checker=''"
        with pytest.raises(ValueError, match=message):
            check_heldout(config, {name: TaskData(None, task_prompts)})


def test_without_facts_there_are_only_rewards():
    summary = metrics.summarize(scores([0.5] * 4, [True] * 4), [None] * 4, records())
    assert set(summary) == {"reward/mean", "reward/format", "reward/valid_fraction"}


class Brightness:
    """A pool that answers every question with the image's brightness, or half of it."""

    def __init__(self, *, half=False):
        self.images, self.unit = {}, 510 if half else 255

    def submit(self, sample_id, image, questions, rated=(), scored=()):
        self.images[sample_id] = (image, len(questions))

    def gather(self, ids):
        return {
            sample_id: VerifierResult((image.mean() / self.unit,) * count, True, None, 1, 0, 0.0)
            for sample_id, (image, count) in (
                (sample_id, self.images[sample_id]) for sample_id in list(ids)
            )
        }


def test_a_second_verifier_is_compared_on_what_both_have_judged():
    first = scores([0.9, 0.5, np.nan, 0.4], [True, True, False, True])
    second = scores([0.6, np.nan, 0.1, 0.2], [True, False, True, True])
    comparison = metrics.compare_verifiers(first, second)
    assert comparison["second/valid_fraction"] == 0.75
    assert comparison["second/mean"] == pytest.approx(0.4)
    assert comparison["second_minus_reward"] == pytest.approx(0.4 - 0.65)
    nothing = scores([np.nan] * 4, [False] * 4)
    assert metrics.compare_verifiers(first, nothing) == {"second/valid_fraction": 0.0}


def test_micro_batches_are_filled_up_and_cut():
    rows = [records()[row] for row in (3, 1, 0)]
    calls = []

    def draw(numbers, first):
        calls.append((numbers.tolist(), first))
        images = np.broadcast_to(numbers[:, None, None, None] * 51, (len(numbers), 1, 1, 3))
        thinks = [[f"<think>{n}</think>" for n in numbers]]
        return metrics.Sampled(images.astype(np.uint8), thinks, [])

    evaluation = metrics.evaluate_images(
        draw,
        Brightness(),
        rows,
        micro_batch=2,
        scoring_options=reward_options(),
        check=lambda image, record: ImageReading(
            {"bright": bool(image.mean() > 100)}, {"level": [str(image[0, 0, 0])], "place": []}
        ),
        prefix="eval",
        second=Brightness(half=True),
    )
    assert calls == [([0, 1], 0), ([2, 2], 2)]
    assert evaluation.images[:, 0, 0, 0].tolist() == [0, 51, 102]
    assert evaluation.metrics["eval/reward/mean"] == pytest.approx((0.0 + 0.2 + 0.4) / 3)
    assert evaluation.metrics["eval/second/mean"] == pytest.approx((0.0 + 0.1 + 0.2) / 3)
    assert evaluation.metrics["eval/second_minus_reward"] == pytest.approx(-0.1)
    assert evaluation.metrics["eval/reward/tag/Existence"] == pytest.approx(0.2)
    assert evaluation.metrics["eval/question/saturated_fraction"] == pytest.approx(1 / 3)
    assert evaluation.records == rows
    assert evaluation.metrics["eval/reward/format"] == 1.0
    assert evaluation.metrics["eval/exact_all"] == pytest.approx(1 / 3)
    assert evaluation.metrics["eval/diversity/level"] == pytest.approx(3.0)
    assert "eval/diversity/place" not in evaluation.metrics
    assert evaluation.captions[0] == {
        "prompt": rows[0].prompt, "think": "<think>0</think>", "reward": 0.0, "exact": False
    }  # fmt: skip


def test_answers_are_judged_by_rule_and_cut_to_their_number():
    fields = {"prompt": "Is it red?", "answer": "yes", "kind": "answer", "type": "count"}
    rows = [parse_record(fields, form="answer")] * 3

    def write(numbers, first):
        return metrics.Sampled(
            None, [["<think> a </think>"] * len(numbers)], ["yes" if n else "no" for n in numbers]
        )

    evaluation = metrics.evaluate_answers(write, rows, micro_batch=2, prefix="eval")
    assert evaluation.images is None
    assert evaluation.metrics["eval/exact_all"] == pytest.approx(2 / 3)
    assert evaluation.metrics["eval/exact_all/answer/count"] == pytest.approx(2 / 3)
    assert evaluation.metrics["eval/reward/format"] == 1.0
    assert "eval/reward_minus_exact" not in evaluation.metrics
    assert [caption["exact"] for caption in evaluation.captions] == [False, True, True]


def test_refinement_by_hand():
    rows, values = records(), np.array([[0, 200], [200, 200], [200, 0], [100, 200]], np.uint8)
    before, after = (np.broadcast_to(v[:, None, None, None], (4, 1, 1, 3)) for v in values.T)

    def check(image, record):
        return ImageReading(
            {"lit": bool(image.mean() > 50), "bright": bool(image.mean() > 150)}, {}
        )

    shares = metrics.refinement_metrics(rows, before, after, check)
    assert shares == {
        "refined/improved": 0.5, "refined/kept": 0.25, "refined/spoilt": 0.25, "refined/gain": 0.25
    }  # fmt: skip
    assert metrics.refinement_metrics(rows, before, after, lambda *_: NOTHING) == {}
