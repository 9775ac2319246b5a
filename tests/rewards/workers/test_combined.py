"""A verifier and scorers as one pool: joint results, and nothing where one of them failed."""

import math

import numpy as np
import pytest

from alphagrpo_jax.rewards.verifiers.base import Answer, Score
from alphagrpo_jax.rewards.workers.combined import VERIFIER, CombinedPool
from alphagrpo_jax.rewards.workers.in_process import InProcessPool

QUESTIONS = ["Is it red?", "Is it flat?"]


class Judge:
    """Answers 0.25 and scores prompts by their length; fails at what says so."""

    def answer_batch(self, images, questions):
        return [
            [Answer(None, "no answer") if "fail" in text else Answer(0.25) for text in texts]
            for texts in questions
        ]

    def score(self, images, prompts):
        return [Score(-float(len(prompt))) for prompt in prompts]


class Brightness:
    """Scores by brightness; fails at black images, and gives NaN for white ones."""

    def score(self, images, prompts):
        values = [float(image.mean()) for image in images]
        odd = {0.0: Score(None, "too dark"), 255.0: Score(math.nan)}
        return [odd.get(value, Score(value)) for value in values]


def picture(value=100):
    return np.full((2, 2, 3), value, np.uint8)


@pytest.fixture
def pool():
    judge = InProcessPool(Judge())
    scorers = {
        "first": InProcessPool(Brightness()),
        "likelihood": judge,
        "last": InProcessPool(Brightness()),
    }
    return CombinedPool(judge, scorers)


def test_results_are_joined_in_the_scorers_order(pool):
    pool.submit("all", picture(), QUESTIONS, (), ["a", "four", "b"])
    pool.submit("questions", picture(), QUESTIONS)
    pool.submit("scores", picture(7), [], (), ["a", "two", "b"])
    results = pool.gather(["scores", "all", "questions"])
    assert list(results) == ["scores", "all", "questions"]
    assert (results["all"].p_yes, results["all"].scores) == ((0.25, 0.25), (100.0, -4.0, 100.0))
    assert (results["questions"].p_yes, results["questions"].scores) == ((0.25, 0.25), ())
    assert (results["scores"].p_yes, results["scores"].scores) == ((), (7.0, -3.0, 7.0))
    assert all(result.valid for result in results.values())
    assert results["all"].attempts == 3


@pytest.mark.parametrize(
    ("value", "questions", "failure"),
    [
        (0, QUESTIONS, "first: too dark"),
        (255, QUESTIONS, "first: got a score of nan, expected a finite number"),
        (100, ["fail"], "no answer"),
        (0, ["fail"], "no answer"),
    ],
)
def test_one_failure_leaves_no_number(pool, value, questions, failure):
    pool.submit("x", picture(value), questions, (), ["a", "b", "c"])
    result = pool.gather(["x"])["x"]
    assert (result.valid, result.p_yes, result.scores) == (False, None, ())
    assert result.failure == failure


def test_refuses_wrong_samples(pool):
    for prompts in (["one"], ["a", "b", "c", "d"], "abc"):
        with pytest.raises(ValueError, match=r"expected none or one for each of \['first', 'like"):
            pool.submit("x", picture(), QUESTIONS, (), prompts)
    with pytest.raises(ValueError, match="got no text"):
        pool.submit("x", picture(), [])
    with pytest.raises(ValueError, match=r"got sample ids \['x'\], expected ids submitted"):
        pool.gather(["x"])
    pool.submit("x", picture(), QUESTIONS)
    pool.gather(["x"])
    with pytest.raises(ValueError, match="not yet gathered"):
        pool.gather(["x"])


def test_a_pool_without_processes_has_no_counters(pool):
    assert VERIFIER not in pool.worker_pools
    assert pool.counters() == {}
