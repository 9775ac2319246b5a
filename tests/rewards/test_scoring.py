"""From answers to rewards of a batch, by hand; what is not known stays unknown."""

import dataclasses
import math
import pathlib

import numpy as np
import pytest
import tiny_world
from default_options import reward_options

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import tasks
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.verifiers import instructions
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.training import options as options_lib
from configs import grpo

CONFIGS = pathlib.Path(grpo.__file__).parent


class Answers:
    """A pool whose answers are given."""

    def __init__(self, answers):
        self.answers, self.submitted = answers, []

    def submit(self, sample_id, image, questions, rated=(), scored=()):
        self.submitted.append((sample_id, int(image[0, 0, 0]), list(questions), list(rated)))

    def gather(self, ids):
        return {sample_id: self.answers[sample_id] for sample_id in list(ids)}


def scored(*p_yes):
    return VerifierResult(p_yes, True, None, 1, 0, 0.1)


FAILED = VerifierResult(None, False, "server away", 4, None, 9.0)


def test_rewards_of_a_batch():
    record = parse_record(tiny_world.record("a circle"))
    pool = Answers({"a": scored(0.9, 0.5, 0.4), "b": FAILED, "c": scored(0.0, 0.0, 1.0)})
    images = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (1, 2, 3)])
    options = reward_options(aggregate="geometric", score="confidence", format_weight=0.5)
    scoring.submit(pool, ["a", "b", "c"], images, [record] * 3, options)
    assert pool.submitted[1] == ("b", 2, record.question_texts, [])
    texts = ["<think> x </think>", "<think> y </think>", "no form"]
    rewards = scoring.gather(pool, ["a", "b", "c"], [record] * 3, [texts], options)
    assert rewards.reward[0] == pytest.approx(math.sqrt(0.7 * 0.4))
    assert np.isnan(rewards.reward[1])
    text, image = scoring.totals(rewards, options)
    assert text is image
    assert np.isnan(text[1])
    assert rewards.reward[2] == 0.0
    assert rewards.format.tolist() == [1.0, 1.0, 0.0]
    assert text[0] == pytest.approx(rewards.reward[0] + 0.5)
    assert rewards.valid.tolist() == [True, False, True]
    assert rewards.failures == {"server away": 1}
    metrics = rewards.metrics()
    assert metrics["reward/mean"] == pytest.approx(rewards.reward[0] / 2)
    assert metrics["reward/semantic"] == pytest.approx(0.35)
    assert metrics["reward/quality"] == pytest.approx(0.7)
    assert metrics["reward/format"] == 0.5
    assert metrics["reward/valid_fraction"] == pytest.approx(2 / 3)
    assert rewards.p_yes == ((0.9, 0.5, 0.4), (), (0.0, 0.0, 1.0))
    assert rewards.reasons == (None, "server away", None)
    assert metrics["reward/tag/Existence"] == pytest.approx((0.9 + 0.5) / 4)
    assert metrics["reward/tag/Texture"] == pytest.approx(0.7)
    assert metrics["question/saturated_fraction"] == pytest.approx(3 / 6)
    assert not any(name.startswith("reward/score") for name in metrics)


def test_without_texts_there_is_no_format_reward():
    record = parse_record(tiny_world.record("a circle"))
    options = reward_options(aggregate="mean", score="binary", format_weight=0.0)
    rewards = scoring.gather(Answers({0: scored(0.9, 0.2, 0.6)}), [0], [record], (), options)
    assert rewards.reward[0] == 0.75
    assert scoring.totals(rewards, options)[0][0] == 0.75


def test_samples_without_a_verdict_are_invalid_and_say_why():
    records = [parse_record(tiny_world.record("a circle"))] * 3
    options = reward_options(aggregate="mean", score="binary", format_weight=0.0)
    outcomes = Answers({0: scored(0.9, 0.2, 0.6), 1: FAILED, 2: scored(0.9, 0.2, 0.6)})
    before = scoring.gather(outcomes, range(3), records, (), options)
    rewards = scoring.without(before, np.array([True, True, False]), "no verdict")
    assert rewards.valid.tolist() == [False, False, True]
    assert rewards.reasons == ("no verdict", before.reasons[1], None)
    assert rewards.failures == {before.reasons[1]: 1, "no verdict": 1}
    without_reasons = dataclasses.replace(before, reasons=())  # as rewards by rule have it
    rewards = scoring.without(without_reasons, np.array([True, False, False]), "x")
    assert rewards.reasons == ("x", None, None)


def test_all_invalid_has_no_mean():
    record = parse_record(tiny_world.record("a circle"))
    options = reward_options(aggregate="geometric", score="confidence", format_weight=0.0)
    metrics = scoring.gather(Answers({0: FAILED}), [0], [record], (), options).metrics()
    assert math.isnan(metrics["reward/mean"])
    assert metrics["reward/valid_fraction"] == 0.0


@pytest.mark.parametrize("dependencies", [False, True])
def test_the_configuration_arrives(dependencies):
    fields = grpo.get_config()
    fields.reward.dependencies = dependencies
    config = config_lib.from_config_dict(fields)
    options = options_lib.scoring_options(config, tasks.TASKS["rt2i"])
    assert options.dependencies is dependencies
    assert (options.aggregate, options.score) == ("geometric", "confidence")


def test_dependencies_count_if_asked_for():
    """Two of three questions depend on the first, which does not hold."""
    fields = tiny_world.record("a red circle")
    asks = [("Is there a circle?", []), ("Is it red?", [0]), ("Is it alone?", [])]
    fields["semantic_questions"] = [
        {"question": text, "tag": "Existence", "dependency": needs} for text, needs in asks
    ]
    fields["quality_questions"] = [
        {"question": "Is it round?", "tag": "Geometry", "dependency": [0]}
    ]
    record = parse_record(fields)
    pool = Answers({0: scored(0.3, 0.9, 0.6, 0.8)})
    for dependencies, semantic, quality in ((False, 0.6, 0.8), (True, 0.3, 0.0)):
        options = reward_options(
            aggregate="mean", score="confidence", format_weight=0.0, dependencies=dependencies
        )
        rewards = scoring.gather(pool, [0], [record], (), options)
        assert rewards.semantic[0] == pytest.approx(semantic)
        assert rewards.quality[0] == pytest.approx(quality)
        assert rewards.reward[0] == pytest.approx((semantic + quality) / 2)
        assert rewards.valid[0]


def rewards_of(reward, form):
    nothing = np.zeros(len(reward))
    valid = np.ones(len(reward), bool)
    return scoring.Rewards(np.array(reward), nothing, nothing, np.array(form), valid, {})


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_form_may_count_for_the_text_alone(weight):
    """By half of the format terms' mean, whatever `format_weight`."""
    options = reward_options(format_weight=weight, isolate=True)
    text, image = scoring.totals(rewards_of([0.2, 0.4], [1.0, 0.0]), options)
    np.testing.assert_allclose(text, [0.7, 0.4])
    np.testing.assert_allclose(image, [0.2, 0.4])


def test_the_form_counts_for_both_by_its_weight():
    totals = scoring.totals(rewards_of([0.2, 0.4], [1.0, 0.0]), reward_options(format_weight=0.25))
    for total in totals:
        np.testing.assert_allclose(total, [0.45, 0.4])


@pytest.mark.parametrize("path", ["srr", "bagel_7b_srr", "mixed"])
def test_refinements_are_rewarded_by_the_rectified_reward_alone(path):
    config = config_lib.read_config(CONFIGS / f"{path}.py")
    options = options_lib.scoring_options(config, tasks.TASKS["srr"])
    rectified, judged = np.array([0.3, 0.5]), np.array([1.0, 1.0])
    scores = rewards_of([0.2, 0.5], [1.0, 0.0])
    for reflection in (None, judged):  # a judged reflection is a metric without `isolate`
        totals = scoring.totals(scores, options, reward=rectified, reflection=reflection)
        for total in totals:
            np.testing.assert_array_equal(total, rectified)
    if "rt2i" in config.tasks:
        options = options_lib.scoring_options(config, tasks.TASKS["rt2i"])
        np.testing.assert_allclose(scoring.totals(scores, options)[0], [1.2, 0.5])


def test_a_judged_reflection_is_half_of_what_the_form_adds():
    options = reward_options(isolate=True)
    scores = rewards_of([0.2, 0.4, 0.6], [1.0, 1.0, 0.0])
    text, image = scoring.totals(
        scores, options, reward=np.array([0.1, 0.4, 0.6]), reflection=np.array([1.0, 0.0, 0.0])
    )
    np.testing.assert_allclose(text, [0.1 + 0.5, 0.4 + 0.25, 0.6])
    np.testing.assert_allclose(image, [0.1, 0.4, 0.6])


def test_answers_are_rewarded_by_rule():
    fields = {"prompt": "Is it red?", "answer": ["yes", "it is"]}
    records = [parse_record(fields, form="answer")] * 4
    answers = ["Yes.", "no", " it is ", "yes and no"]
    rewards = scoring.answer_scores(records, answers, [["<think> a </think>"] * 3 + ["b"]])
    assert rewards.reward.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert rewards.format.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert rewards.valid.all()
    assert rewards.metrics()["reward/mean"] == 0.5
    assert math.isnan(rewards.metrics()["reward/semantic"])


def rated(*ratings, p_yes=()):
    return VerifierResult(p_yes, True, None, 1, 0, 0.1, ratings)


def test_holistic_scores_ask_for_ratings_only():
    record = parse_record(tiny_world.record("a {circle}"))
    pool = Answers({0: rated(8.0, 5.0), 1: rated(0.0, 10.0), 2: FAILED})
    options = reward_options(aggregate="geometric", score="holistic", format_weight=0.0)
    images = np.zeros((3, 2, 2, 3), np.uint8)
    scoring.submit(pool, [0, 1, 2], images, [record] * 3, options)
    match = "How well does the image match the prompt: a {circle}?"
    assert pool.submitted[0] == (0, 0, [], [match, "How well is the image drawn?"])
    rewards = scoring.gather(pool, [0, 1, 2], [record] * 3, (), options)
    assert rewards.reward[:2].tolist() == [pytest.approx(math.sqrt(40.0) / 10), 0.0]
    assert (rewards.semantic[0], rewards.quality[0]) == (0.8, 0.5)
    assert rewards.valid.tolist() == [True, True, False]
    assert rewards.ratings == ((8.0, 5.0), (0.0, 10.0), ())
    metrics = rewards.metrics()
    assert not any("tag" in name or "saturated" in name for name in metrics)


def test_the_least_of_several_ratings_counts():
    record = parse_record(tiny_world.record("a circle"))
    options = reward_options(
        score="holistic", rate_semantic=("a?", "b?"), rate_quality=("c?", "d?", "e?")
    )
    pool = Answers({0: rated(9.0, 4.0, 10.0, 9.0, 8.0)})
    rewards = scoring.gather(pool, [0], [record], (), options)
    assert rewards.reward[0] == pytest.approx(math.sqrt(4.0 * 8.0) / 10)


def test_several_scores_are_averaged_by_weight():
    record = parse_record(tiny_world.record("a circle"))
    pool = Answers({0: rated(9.0, 4.0, p_yes=(0.9, 0.3, 0.6)), 1: FAILED})
    options = reward_options(
        aggregate="mean", extra_scores=("binary", "holistic"), extra_weights=(0.5, 2.5)
    )
    images = np.zeros((1, 2, 2, 3), np.uint8)
    scoring.submit(pool, [0], images, [record], options)
    assert pool.submitted[0][2] == record.question_texts
    assert len(pool.submitted[0][3]) == 2
    rewards = scoring.gather(pool, [0, 1], [record] * 2, (), options)
    by_score = {"confidence": 0.6, "binary": 0.75, "holistic": 0.6}
    assert {name: values[0] for name, values in rewards.by_score.items()} == pytest.approx(by_score)
    assert rewards.reward[0] == pytest.approx((0.6 + 0.5 * 0.75 + 2.5 * 0.6) / 4.0)
    assert rewards.valid.tolist() == [True, False]
    assert (rewards.semantic[0], rewards.quality[0]) == (pytest.approx(0.6), pytest.approx(0.6))
    assert rewards.metrics()["reward/score/binary"] == pytest.approx(0.75)


def test_the_scores_of_the_configuration_arrive():
    fields = grpo.get_config()
    fields.reward.score = "holistic"
    fields.reward.extra_scores, fields.reward.extra_weights = ("binary",), (0.5,)
    config = config_lib.from_config_dict(fields)
    options = options_lib.scoring_options(config, tasks.TASKS["rt2i"])
    assert options.scores == ("holistic", "binary")
    assert scoring.score_weights(options) == pytest.approx([2 / 3, 1 / 3])
    # The shipped verifier was trained on these two texts.
    assert options.rate_semantic == (instructions.RATE_PROMPT,)
    assert options.rate_quality == (instructions.RATE_QUALITY,)
    plain = options_lib.scoring_options(
        config_lib.from_config_dict(grpo.get_config()), tasks.TASKS["rt2i"]
    )
    assert plain.scores == ("confidence",)


def test_binary_tags_count_right_answers():
    record = parse_record(tiny_world.record("a circle"))
    options = reward_options(aggregate="mean", score="binary", format_weight=0.0)
    pool = Answers({0: scored(0.9, 0.2, 0.6), 1: scored(0.51, 0.6, 0.1)})
    rewards = scoring.gather(pool, [0, 1], [record] * 2, (), options)
    assert rewards.tags == {"Existence": 0.75, "Texture": 0.5}
