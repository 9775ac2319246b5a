"""Ratings through the pool: the guarantees of yes/no answers hold for them as well."""

import json
import re

import numpy as np
import pool_fakes
import pytest
from default_options import start_pool

ASKED, RATED = ["Is there a circle?", "Is it red?"], ["How well is it drawn?"]


def make_pool(folder, target="pool_fakes:Rater", **options):
    factory = ("callable", {"target": target, "folder": str(folder)})
    fast = {"workers": 1, "backoff_seconds": 0.01, "max_attempts": 2}
    return start_pool(factory, **(fast | options))


def picture(fault):
    image = np.full((4, 4, 3), 77, np.uint8)
    image[0, 0] = fault, 9, fault
    return image


def test_answers_and_ratings_of_one_sample_come_together(tmp_path):
    audit = tmp_path / "audit.jsonl"
    with make_pool(tmp_path, cache_size=9, audit_path=str(audit)) as pool:
        pool.submit("both", picture(0), ASKED, RATED)
        pool.submit("rated", picture(20), [], RATED * 2)
        results = pool.gather(["both", "rated"])
        pool.submit("again", picture(0), ASKED[:1], RATED)
        again = pool.gather(["again"])["again"]
        # The same words, once to be rated and once to be answered: two different things.
        pool.submit("words", picture(0), RATED)
        words = pool.gather(["words"])["words"]
        counters = pool.counters()
    truth = tuple(pool_fakes.truth(picture(0), [*ASKED, *RATED]))
    assert results["both"].p_yes == truth[:2]
    assert results["both"].ratings == (10.0 * truth[2],)
    assert results["rated"].p_yes == ()
    assert len(results["rated"].ratings) == 2
    assert (again.p_yes, again.ratings) == (truth[:1], (10.0 * truth[2],))
    assert (words.p_yes, words.ratings) == (truth[2:], ())
    assert (counters["cached"], counters["questions"]) == (1, 6)
    rows = [json.loads(line) for line in audit.read_text().splitlines()]
    assert rows[0]["questions"] == ASKED
    assert rows[0]["rated"] == RATED
    assert rows[0]["ratings"] == [10.0 * truth[2]]
    assert "rated" not in rows[-1]


def test_a_wrong_rating_is_never_taken(tmp_path):
    messages = {
        21: r"question 2: got a rating of 10.5, expected a number in \[0, 10\]",
        22: "got a rating of nan",
        23: "no number",
        24: "got 0 ratings, expected 1",
        25: "the model is on fire",
        6: "got 1 answers, expected 2",  # ratings do not make up for it
        7: "got 3 answers, expected 2",
    }
    with make_pool(tmp_path) as pool:
        for fault in messages:
            pool.submit(fault, picture(fault), ASKED, RATED)
        results = pool.gather(messages)
        counters = pool.counters()
    for fault, scored in results.items():
        assert (scored.valid, scored.p_yes, scored.ratings) == (False, None, ()), fault
        assert scored.attempts == 2
        assert re.search(messages[fault], scored.failure)
    assert counters["bad_answers"] == 2 * len(messages)


def test_a_verifier_that_cannot_rate_says_so(tmp_path):
    with make_pool(tmp_path, target="pool_fakes:Fake") as pool:
        pool.submit(0, picture(0), ASKED, RATED)
        scored = pool.gather([0])[0]
        with pytest.raises(ValueError, match="expected lists, and at least 1 text"):
            pool.submit(1, picture(0), [], [])
        with pytest.raises(ValueError, match="expected lists, and at least 1 text"):
            pool.submit(1, picture(0), ASKED, "How well?")
    assert not scored.valid
    assert "rate" in scored.failure
