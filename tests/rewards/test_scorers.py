"""Rewards with scorers: how scores and answers combine, and what scorers are asked."""

import math
import pathlib
import re

import numpy as np
import pytest
import tiny_world
from default_options import reward_options

from alphagrpo_jax.rewards import exact, report, scoring
from alphagrpo_jax.rewards.verifiers import functions
from alphagrpo_jax.rewards.verifiers.base import Score, VerifierLoadError
from alphagrpo_jax.rewards.workers.ledger import VerifierResult
from alphagrpo_jax.runtime.records import RecordError, parse_record
from alphagrpo_jax.shapes import scenes

CLIP = "hf_clip:a/clip?range=0.1..0.5"


class Numbers:
    """A pool whose results are given; it records what it was asked."""

    def __init__(self, results):
        self.results, self.submitted = results, []

    def submit(self, sample_id, image, questions, rated=(), scored=()):
        self.submitted.append((sample_id, list(questions), list(scored)))

    def gather(self, sample_ids):
        return {sample_id: self.results[sample_id] for sample_id in sample_ids}


def result(*p_yes, scores=()):
    return VerifierResult(p_yes, True, None, 1, 0, 0.1, scores=scores)


FAILED = VerifierResult(None, False, "hf_clip.clip: the model is on fire", 4, None, 9.0)


@pytest.fixture
def record():
    return parse_record(tiny_world.record("a circle"))


def mixed_options(**changes):
    scorers = (CLIP, "callable:ocr:match", "likelihood")
    defaults = {"aggregate": "mean", "extra_scores": scorers, "extra_weights": (2.0, 3.0, 4.0)}
    return reward_options(**(defaults | changes))


def test_scores_count_by_range_and_weight(record):
    options = mixed_options()
    log_prob = math.log(0.2)
    pool = Numbers({0: result(0.9, 0.3, 0.6, scores=(0.3, -7.0, log_prob)), 1: FAILED})
    images = np.zeros((2, 2, 2, 3), np.uint8)
    scoring.submit(pool, [0, 1], images, [record] * 2, options)
    assert pool.submitted[0] == (0, record.question_texts, ["a circle"] * 3)
    rewards = scoring.gather(pool, [0, 1], [record] * 2, (), options)
    assert rewards.reward[0] == pytest.approx((0.6 + 2 * 0.5 - 3 * 7.0 + 4 * 0.2) / 10)
    assert (rewards.semantic[0], rewards.quality[0]) == (pytest.approx(0.6), pytest.approx(0.6))
    shown = {"confidence": 0.6, "hf_clip.clip": 0.3, "callable.match": -7.0, "likelihood": 0.2}
    assert {name: values[0] for name, values in rewards.by_score.items()} == pytest.approx(shown)
    metrics = rewards.metrics()
    assert {name: metrics[f"reward/score/{name}"] for name in shown} == pytest.approx(shown)
    assert rewards.valid.tolist() == [True, False]
    assert np.isnan(rewards.reward[1])
    assert rewards.failures == {"hf_clip.clip: the model is on fire": 1}
    assert all(np.isnan(values[1]) for values in rewards.by_score.values())


def test_a_scorer_may_be_the_whole_reward(record):
    options = reward_options(score="callable:ocr:match", format_weight=0.0)
    pool = Numbers({0: result(scores=(-3.5,)), 1: result(scores=(2.0,))})
    scoring.submit(pool, [0, 1], np.zeros((2, 2, 2, 3), np.uint8), [record] * 2, options)
    assert pool.submitted[0] == (0, [], ["a circle"])
    rewards = scoring.gather(pool, [0, 1], [record] * 2, (), options)
    assert rewards.reward.tolist() == [-3.5, 2.0]
    assert np.isnan(rewards.semantic).all()
    assert rewards.metrics()["reward/score/callable.match"] == -0.75
    with pytest.raises(ValueError, match="expected one of a verifier's answers"):
        scoring.judged_only(options)


def test_finite_scores_without_a_finite_sum_make_no_reward(record):
    options = mixed_options(extra_scores=("callable:a:b?range=0..1e-300",), extra_weights=(1.0,))
    pool = Numbers({0: result(0.9, 0.3, 0.6, scores=(1e300,))})
    rewards = scoring.gather(pool, [0], [record], (), options)
    assert not rewards.valid[0]
    assert "make no finite reward" in rewards.reasons[0]
    assert sum(rewards.failures.values()) == 1


def test_a_second_verifier_is_compared_on_the_same_scores(record):
    options = mixed_options()
    judged = scoring.judged_only(options)
    assert judged.scores == ("confidence",)
    scores = (0.3, 1.0, math.log(0.5))
    first = {
        0: result(0.9, 0.3, 0.6, scores=scores),
        1: result(0.9, 0.3, 0.6, scores=scores),
        2: FAILED,
    }
    second = {0: result(0.9, 0.3, 0.6), 1: result(0.1, 0.1, 0.1), 2: result(0.9, 0.3, 0.6)}
    records = [record] * 3
    rewards = scoring.gather(Numbers(first), range(3), records, (), options)
    others = scoring.gather(Numbers(second), range(3), records, (), judged)
    compared = scoring.with_scores_of(others, rewards, options)
    assert compared.reward[0] == pytest.approx(rewards.reward[0])
    assert compared.reward[1] == pytest.approx(rewards.reward[1] - (0.6 - 0.1) / 10)
    assert compared.valid.tolist() == [True, True, False]
    assert np.isnan(compared.reward[2])
    assert list(compared.by_score) == list(rewards.by_score)


def test_weights_of_judged_scores_stay_in_proportion():
    options = mixed_options(
        score=CLIP, extra_scores=("binary", "exact", "confidence"), extra_weights=(2.0, 5.0, 3.0)
    )
    judged = scoring.judged_only(options)
    assert judged.scores == ("binary", "confidence")
    assert scoring.score_weights(judged) == pytest.approx([0.4, 0.6])


def test_scorers_get_the_caption_and_exact_the_facts():
    fields = tiny_world.record("make it blue") | {"caption": "a blue circle", "facts": {"a": 1}}
    options = reward_options(extra_scores=("callable:a:b", "exact"), extra_weights=(1.0, 1.0))
    assert scoring.scored_texts(options, parse_record(fields)) == ["a blue circle", '{"a": 1}']
    plain = parse_record(tiny_world.record("a circle") | {"caption": None})
    assert scoring.scored_texts(options, plain) == ["a circle", ""]
    with pytest.raises(RecordError, match="field 'caption': got 3, expected a text"):
        parse_record(fields | {"caption": 3})


def test_the_exact_checker_scores_the_share_of_facts():
    rng = np.random.default_rng(0)
    groups = [{"count": 1, "shape": "circle", "color": "red"}]
    facts = {"groups": groups, "background": "white", "relation": None}
    text = scoring.facts_text(parse_record(tiny_world.record("x") | {"facts": facts}))
    scorer = exact.ExactScorer()
    pictures = [
        scenes.render(scenes.place_objects(rng, [(shape, "red")], background))
        for shape, background in (("circle", "white"), ("circle", "black"), ("square", "black"))
    ]
    scores = [score.value for score in scorer.score(pictures, [text] * 3)]
    assert scores[0] == 1.0
    assert 0.0 <= scores[2] < scores[1] < 1.0
    (missing,) = scorer.score(pictures[:1], [""])
    (strange,) = scorer.score(pictures[:1], ['{"mood": "good"}'])
    assert (missing.value, missing.permanent) == (None, True)
    assert 'the record has no "facts"' in missing.failure
    assert (strange.value, strange.permanent) == (None, True)
    assert "cannot read the facts" in strange.failure
    (large,) = scorer.score([np.zeros((64, 64, 3), np.uint8)], [text])
    assert (large.value, large.permanent) == (None, False)  # another image may have a score
    assert "cannot read the image" in large.failure


def count_words(images, prompts):
    return [len(prompt.split()) if prompt else None for prompt in prompts]


class Threshold:
    """A scorer with a state."""

    def __init__(self):
        self.threshold = 100

    def score(self, images, prompts):
        bright = [float(image.mean()) > self.threshold for image in images]
        return [Score(1.0) if is_bright else Score(None, "too dark") for is_bright in bright]


def no_list(images, prompts):
    return 0.5


def test_functions_and_classes_are_scorers():
    images = [np.full((2, 2, 3), value, np.uint8) for value in (0, 255)]
    scorer = functions.FunctionScorer("test_scorers:count_words")
    scores = scorer.score(images, ["two words", ""])
    assert scores == [Score(2.0), Score(None, "the scorer gave no score")]
    scorer = functions.FunctionScorer("test_scorers:Threshold")
    assert scorer.score(images, ["", ""]) == [Score(None, "too dark"), Score(1.0)]
    with pytest.raises(TypeError, match=r"returned 0\.5, expected a list of 2 numbers"):
        functions.FunctionScorer("test_scorers:no_list").score(images, ["", ""])
    for target, reason in (
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("test_scorers:no_such_name", "got None, expected a function"),
        ("test_scorers:CLIP", "expected a function of images and prompts"),
        ("test_scorers:Numbers_without_score", "expected a function"),
    ):
        with pytest.raises(VerifierLoadError, match=reason):
            functions.FunctionScorer(target)


def test_reports_show_each_score_with_the_text_it_was_made_of(record):
    options = mixed_options()
    pool = Numbers({0: result(0.9, 0.3, 0.6, scores=(0.3, -7.0, 0.0)), 1: FAILED})
    rewards = scoring.gather(pool, [0, 1], [record] * 2, (), options)
    rows = report.rows(["0", "1"], ["", ""], [record] * 2, rewards, options)
    lines = [line for line in rows[0].lines if line.kind == "score"]
    assert [(line.tag, line.question, line.value) for line in lines] == [
        ("hf_clip.clip", "a circle", pytest.approx(0.3)),
        ("callable.match", "a circle", -7.0),
        ("likelihood", "a circle", 1.0),
    ]
    page = report.Report("t", report.describe(options), tuple(rows))
    assert [row.name for row in page.worst_first] == ["1", "0"]  # although its reward is negative
    assert f"0.2 x hf_clip.clip ({CLIP}, 0.1 counts as 0 and 0.5 as 1)" in page.how
    tags = {tag.tag: tag for tag in page.tags if tag.kind == "score"}
    assert (tags["callable.match"].mean, tags["callable.match"].yes) == (-7.0, None)
    html, csv, text = (form(page) for form in report.FORMATS.values())
    assert "callable.match" in html
    assert "score,callable.match,a circle,-7.0" in csv
    assert '"callable.match": -7.0' in text
    assert "the model is on fire" in html


FAKE_OCR = """
def image_to_string(picture):
    return {0: "OPEN\\n", 1: "  oper ", 2: ""}[picture.getpixel((0, 0))[0]]
"""


def test_the_manuals_scorer_reads_text(tmp_path, monkeypatch):
    manual = pathlib.Path(__file__).parent.parent.parent / "docs" / "rewards.md"
    (code,) = re.findall(r"```python\n(# my_ocr\.py\n.*?)```", manual.read_text(), re.DOTALL)
    (tmp_path / "my_ocr.py").write_text(code)
    (tmp_path / "pytesseract.py").write_text(FAKE_OCR)
    monkeypatch.syspath_prepend(tmp_path)
    scorer = functions.FunctionScorer("my_ocr:match")
    images = [np.full((4, 4, 3), value, np.uint8) for value in (0, 1, 2, 0)]
    prompts = ['a door that says "Open"'] * 3 + ["a door"]
    right, similar, nothing, unasked = scorer.score(images, prompts)
    assert (right.value, similar.value, nothing.value) == (1.0, 0.75, 0.0)
    assert (unasked.value, unasked.permanent) == (None, True)
    assert "no text in quotes" in unasked.failure
