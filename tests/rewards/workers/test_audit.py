"""The audit log accounts for every number, or the pool says that it cannot."""

import json
import os
import threading

import numpy as np
import pool_fakes
import pytest
from default_options import start_pool

from alphagrpo_jax.rewards.workers.audit import AuditLog
from alphagrpo_jax.rewards.workers.pool import PoolError

QUESTIONS = ["Is there a circle?", "Is it red?"]
FACTORY = ("callable", {"target": "pool_fakes:Rater", "folder": "unused"})


def pool_of(path, **options):
    return start_pool(FACTORY, workers=1, audit_path=str(path), **options)


def picture(number):
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0] = 0, 0, number
    return image


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def within(seconds, call):
    """What a call returns or raises; fails if it does neither in time."""
    outcomes = []

    def run():
        try:
            outcomes.append(call())
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcomes, f"no end within {seconds} s"
    return outcomes[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_ends_in_an_error_and_not_in_a_wait():
    with pool_of("/dev/full") as pool:
        pool.submit(0, picture(0), QUESTIONS)
        error = within(60, lambda: pool.gather([0]))
        assert isinstance(error, PoolError)
        assert "the audit log cannot be written: /dev/full: [Errno 28]" in str(error)
        with pytest.raises(PoolError, match="the audit log cannot be written"):
            pool.submit(1, picture(1), QUESTIONS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_no_number_is_handed_out_that_is_not_in_the_log(tmp_path):
    with pool_of(tmp_path / "audit.jsonl") as pool:
        pool.submit(0, picture(0), QUESTIONS)
        assert pool.gather([0])[0].valid
        pool._state.ledger._audit = AuditLog("/dev/full")
        pool.submit(1, picture(1), QUESTIONS)
        while pool.counters()["answered"] < 2:  # already settled when it is gathered
            with pool._state.changed:
                pool._state.changed.wait(1.0)
        with pytest.raises(PoolError, match="the audit log cannot be written"):
            pool.gather([1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unexpected_error_costs_the_sample_and_the_worker_but_no_wait(tmp_path):
    with pool_of(tmp_path / "audit.jsonl") as pool:
        pool.wait_ready()
        pool._members[0].worker.ask = lambda *_: 1 / 0
        pool.submit(0, picture(0), QUESTIONS)
        results = within(60, lambda: pool.gather([0]))
        assert not results[0].valid
        assert "unexpected ZeroDivisionError" in results[0].failure
        pool.submit(1, picture(1), QUESTIONS)
        assert "no verifier worker is left" in within(60, lambda: pool.gather([1]))[1].failure
        counters = pool.counters()
    assert (counters["submitted"], counters["invalid"], counters["lost_workers"]) == (2, 2, 1)


def test_remembered_answers_are_in_the_log_too(tmp_path):
    path = tmp_path / "audit.jsonl"
    with pool_of(path, cache_size=9) as pool:
        for sample in ("asked", "remembered"):
            pool.submit(sample, picture(3), QUESTIONS, ["How well is it drawn?"])
            scored = pool.gather([sample])[sample]
        assert pool.counters()["cached"] == 1
    first, second = read(path)
    assert (first["cached"], first["worker"], first["attempt"]) == (False, 0, 1)
    assert (second["cached"], second["worker"], second["attempt"]) == (True, None, 0)
    assert second["sample"] == "remembered"
    assert (tuple(second["p_yes"]), tuple(second["ratings"])) == (scored.p_yes, scored.ratings)
    assert tuple(second["p_yes"]) == tuple(pool_fakes.truth(picture(3), QUESTIONS))
    equal_keys = ("image", "questions", "rated", "p_yes", "ratings", "failure")
    assert [first[key] for key in equal_keys] == [second[key] for key in equal_keys]


def test_a_torn_row_swallows_no_other(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"sample": "0"}\n{"sample": "1", "p_')  # killed while it wrote
    for number in (2, 3):
        log = AuditLog(path)
        log.write({"sample": str(number)})
        log.close()
    lines = path.read_text().splitlines()
    assert lines[1] == '{"sample": "1", "p_'
    assert [json.loads(line)["sample"] for line in (lines[0], *lines[2:])] == ["0", "2", "3"]
