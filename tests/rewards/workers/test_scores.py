"""Scores in a pool: any finite number arrives as it is; a failed scorer never invents one."""

import json
import re

import numpy as np
import pool_fakes
import pytest
from default_options import start_pool

PROMPTS = ["a red circle", "two blue squares on a plain background"]
HANGS, DIES = 39, 38


def make_pool(folder, target="pool_fakes:Scorer", **options):
    factory = ("callable", {"target": target, "folder": str(folder)})
    fast = {"workers": 1, "backoff_seconds": 0.01, "max_attempts": 2}
    return start_pool(factory, **(fast | options))


def picture(fault=0, times=0, number=1):
    image = np.full((4, 4, 3), 90, np.uint8)
    image[0, 0] = (fault, times, number)
    return image


def test_any_finite_number_arrives_and_is_in_the_log(tmp_path):
    audit = tmp_path / "audit.jsonl"
    with make_pool(tmp_path, audit_path=str(audit), cache_size=9) as pool:
        pool.submit("new", picture(), [], scored=PROMPTS)
        result = pool.gather(["new"])["new"]
        pool.submit("again", picture(), [], scored=PROMPTS[:1])
        cached = pool.gather(["again"])["again"]
        counters = pool.counters()
    truth = tuple(pool_fakes.true_scores([picture()] * 2, PROMPTS))
    assert min(truth) < 0.0 < max(truth)
    assert (result.valid, result.scores, result.p_yes, result.ratings) == (True, truth, (), ())
    assert (cached.scores, cached.worker) == (truth[:1], None)
    rows = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(row["scored"], row["scores"]) for row in rows] == [
        (PROMPTS, list(truth)),
        (PROMPTS[:1], list(truth[:1])),
    ]
    assert (counters["answered"], counters["cached"]) == (2, 1)


def test_a_wrong_score_is_never_taken(tmp_path):
    messages = {
        31: "question 1: got a score of nan, expected a finite number",
        32: "got a score of -inf, expected a finite number",
        33: "question 1: no text in the image",
        34: "got 2 scores, expected 1",
        35: "got 0 scores, expected 1",
        36: "object of type 'NoneType' has no len",
        37: "RuntimeError: the model is on fire",
    }
    with make_pool(tmp_path, target="pool_fakes:AnswersAndScores") as pool:
        for fault in messages:
            pool.submit(fault, picture(fault), ["Is it?"], scored=PROMPTS[:1])
        results = pool.gather(messages)
        counters = pool.counters()
    for fault, result in results.items():
        assert (result.valid, result.p_yes, result.scores) == (False, None, ()), fault
        assert result.attempts == 2
        assert re.search(messages[fault], result.failure)
    assert counters["bad_answers"] == 2 * len(messages)
    assert (counters["answered"], counters["invalid"]) == (0, len(messages))


@pytest.mark.parametrize(("fault", "counter"), [(HANGS, "timeouts"), (DIES, "deaths")])
def test_a_scorer_that_hangs_or_dies_is_restarted(tmp_path, fault, counter):
    with make_pool(tmp_path, attempt_seconds=2.0) as pool:
        pool.submit("once", picture(fault, times=1, number=1), [], scored=PROMPTS)
        pool.submit("always", picture(fault, times=99, number=2), [], scored=PROMPTS)
        results = pool.gather(["once", "always"])
        counters = pool.counters()
    image = picture(fault, times=1, number=1)
    assert results["once"].scores == tuple(pool_fakes.true_scores([image] * 2, PROMPTS))
    assert (results["always"].valid, results["always"].scores) == (False, ())
    assert counters[counter] == 3
    assert counters["attempts"] == 4


def test_a_verifier_that_cannot_score_says_so(tmp_path):
    with make_pool(tmp_path, target="pool_fakes:Fake") as pool:
        pool.submit(0, picture(), ["Is it?"], scored=PROMPTS)
        result = pool.gather([0])[0]
        with pytest.raises(ValueError, match="expected lists, and at least 1 text"):
            pool.submit(1, picture(), [], scored=PROMPTS[0])
    assert not result.valid
    assert "score" in result.failure
