"""The pool against servers that misbehave: it goes on, or a sample is invalid; nothing is invented.

Every test ends by joining three accounts of the same events: what the pool handed out, its audit
log, and the servers' own logs of what they answered.
"""

import json
import logging
import threading

import bad_server
import numpy as np
import pytest
from bad_server import BadServer
from default_options import start_pool

from alphagrpo_jax.rewards.workers import ledger

QUESTIONS = ["Is there a circle?", "Is it red?"]
KEY = "sk-pool-0123456789abcdef"
ESCAPED = bad_server._escaped(KEY)[:12]  # its first two letters
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def server(folder):
    with BadServer(folder, "first") as server:
        yield server


@pytest.fixture(scope="module")
def second_server(folder):
    with BadServer(folder, "second") as server:
        yield server


def pool_of(folder, name, *servers, verifier=None, factories=None, **options):
    """A pool of one worker over all servers, or of the given factories."""
    fast = {"attempt_seconds": 30.0, "backoff_seconds": 0.001, "max_attempts": 2}
    factories = factories or [factory_of(*servers, **(verifier or {}))]
    options = fast | {"audit_path": str(folder / f"{name}.jsonl")} | options
    return start_pool(factories, **options)


def factory_of(*servers, **options):
    fast = {
        "question_seconds": 0.8,
        "answer_seconds": 20.0,
        "max_attempts": 2,
        "outage_attempts": 2,
        "backoff_seconds": 0.001,
    }
    urls = tuple(server.url for server in servers)
    return ("openai", {"endpoints": urls, "model": bad_server.MODEL} | fast | options)


@pytest.fixture(scope="module")
def pool(folder, server):
    with pool_of(folder, "shared", server) as pool:
        pool.wait_ready()
        yield pool


def pictures(count):
    """Images that no other test has: their accounts are told apart by what they show."""
    return [RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8) for _ in range(count)]


def truths(image, questions=QUESTIONS):
    return [bad_server.truth(image, question) for question in questions]


def score(pool, images):
    """Outcomes of images under the ids 0, 1, ..."""
    for number, image in enumerate(images):
        pool.submit(number, image, QUESTIONS)
    return list(pool.gather(range(len(images))).values())


def read_audit(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def check_accounts(audit, servers, images, outcomes):
    """No sample has a number that no server gave for this very image and question."""
    answered = {
        (row["image"], row["question"]): row["p_yes"]
        for server in servers
        for row in server.log()
        if row["p_yes"] is not None
    }
    by_key = {ledger.image_key(image): image for image in images}
    for row in audit:
        if row["image"] not in by_key:
            continue  # of an earlier test with the same pool
        assert (row["p_yes"] is None) != (row["failure"] is None)
        if row["p_yes"] is not None:
            image = bad_server.digest(by_key[row["image"]])
            answers = [answered[image, question] for question in row["questions"]]
            assert row["p_yes"] == pytest.approx(answers, abs=1e-9)
    for image, outcome in zip(images, outcomes, strict=True):
        rows = [row for row in audit if row["image"] == ledger.image_key(image)]
        answers = [tuple(row["p_yes"]) for row in rows if row["p_yes"] is not None]
        assert outcome.valid == bool(answers)
        assert outcome.p_yes == (answers[0] if answers else None)
        assert len(rows) == outcome.attempts
        if outcome.valid:
            assert outcome.p_yes == pytest.approx(truths(image), abs=1e-9)
        else:
            assert outcome.failure


def check_books(counters):
    assert counters["submitted"] == counters["answered"] + counters["invalid"]
    failures = sum(counters[name] for name in ("timeouts", "deaths", "bad_answers"))
    assert counters["attempts"] == counters["answered"] - counters["cached"] + failures
    assert counters["questions"] == len(QUESTIONS) * (counters["answered"] - counters["cached"])


FAULTS = {
    "reset": "Error",
    "cut": "Error",
    "429": "HTTP status 429",
    "500": "HTTP status 500",
    "503": "HTTP status 503",
    "503 for long": "HTTP status 503",
    "stall": "no reply within 0.8 s",
    "drip": "no reply within 0.8 s",
    "truncated": "truncated or malformed JSON",
    "not json": "truncated or malformed JSON",
    "no logprobs": "no log-probs",
    "nan": "got nan",
    "overfull": "sum to 1.8",
    "neither": "neither yes nor no",
    "other request": "answer to another request",
    "other model": "answer by another model",
    "no choices": "got 0 choices",
    "400": "HTTP status 400",
    "401": "HTTP status 401",
    "405": "HTTP status 405",
    "415": "HTTP status 415",
}


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "503 for long"])
def test_a_fault_that_passes_costs_attempts_only(fault, pool, server, folder):
    server.behave(fault, times=1)
    images = pictures(2)
    outcomes = score(pool, images)
    assert all(outcome.valid for outcome in outcomes)
    check_accounts(read_audit(folder, "shared"), [server], images, outcomes)
    check_books(pool.counters())


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "503 for long"])
def test_a_fault_that_stays_makes_samples_invalid(fault, pool, server, folder):
    before = pool.counters()
    server.behave(fault)
    images = pictures(1)
    (outcome,) = score(pool, images)
    server.behave()
    assert (outcome.valid, outcome.p_yes, outcome.worker) == (False, None, None)
    assert FAULTS[fault] in outcome.failure
    assert (outcome.attempts, outcome.unanswerable) == (2, None)  # the server may be at fault
    after = pool.counters()
    assert after["invalid"] - before["invalid"] == 1
    assert after["bad_answers"] - before["bad_answers"] == 2
    check_accounts(read_audit(folder, "shared"), [server], images, [outcome])
    check_books(after)


def test_a_question_that_a_working_server_always_rejects_is_named(server, folder):
    server.behave("400 for unicorns")
    with pool_of(folder, "unicorns", server, max_attempts=4) as pool:
        for number, image in enumerate(pictures(8)):
            pool.submit(
                number, image, [*QUESTIONS, "Is it a unicorn?"] if number < 4 else QUESTIONS
            )
        results = pool.gather(range(8))
    assert [result.valid for result in results.values()] == [False] * 4 + [True] * 4
    assert "Is it a unicorn?" in {result.unanswerable for result in results.values()}
    assert {result.unanswerable for result in results.values()} <= {"Is it a unicorn?", None}


# At half of all requests six rejections of one question in a row are no rarity any more.
@pytest.mark.parametrize("every", [1, 5])
def test_stray_and_constant_rejections_blame_no_question(every, server, folder):
    server.behave("400", every=every)
    with pool_of(folder, f"stray{every}", server, max_attempts=5) as pool:
        results = score(pool, pictures(20))
    server.behave()
    assert {result.unanswerable for result in results} == {None}
    assert any(result.valid for result in results) == (every > 1)


def test_slow_answers_are_answers(pool, server, folder):
    server.behave("slow")
    images = pictures(3)
    outcomes = score(pool, images)
    assert all(outcome.valid for outcome in outcomes)
    check_accounts(read_audit(folder, "shared"), [server], images, outcomes)


def test_all_faults_in_turn(pool, server, folder):
    server.behave(*(name for name in FAULTS if "long" not in name), "slow", every=3)
    images = pictures(30)
    outcomes = score(pool, images)
    server.behave()
    assert any(outcome.valid for outcome in outcomes)
    check_accounts(read_audit(folder, "shared"), [server], images, outcomes)
    check_books(pool.counters())


def test_a_server_that_wants_long_pauses_is_not_waited_for(server, folder):
    server.behave("503 for long")
    with pool_of(folder, "long", server) as pool:
        (outcome,) = score(pool, pictures(1))
        check_books(pool.counters())
    server.behave()
    assert not outcome.valid
    assert "HTTP status 503" in outcome.failure or "no endpoint is available" in outcome.failure


def test_another_endpoint_takes_over_within_a_worker(server, second_server, folder):
    server.behave("500")
    second_server.behave()
    images = pictures(8)
    with pool_of(folder, "both", server, second_server) as pool:
        outcomes = score(pool, images)
        check_books(pool.counters())
    server.behave()
    assert all(outcome.valid for outcome in outcomes)
    check_accounts(read_audit(folder, "both"), [server, second_server], images, outcomes)


def test_another_worker_takes_over(server, second_server, folder):
    server.behave("nan")
    second_server.behave()
    images = pictures(10)
    factories = [factory_of(server), factory_of(second_server)]
    with pool_of(folder, "beside", factories=factories, max_attempts=4) as pool:
        pool.wait_ready()
        outcomes = score(pool, images)
        check_books(pool.counters())
    server.behave()
    assert {outcome.worker for outcome in outcomes} == {1}
    check_accounts(read_audit(folder, "beside"), [server, second_server], images, outcomes)


def test_a_server_that_dies_and_comes_back(folder):
    images = pictures(6)
    patient = {"outage_attempts": 100, "backoff_seconds": 0.05}
    with BadServer(folder, "mortal") as server:
        with pool_of(folder, "mortal_audit", server, verifier=patient) as pool:
            pool.wait_ready()
            server.behave("die", after=5, times=1)
            back = threading.Event()

            def revive():
                server.wait()
                server.start()
                back.set()

            threading.Thread(target=revive).start()
            outcomes = score(pool, images)
            check_books(pool.counters())
        assert back.is_set()  # it did die
        assert all(outcome.valid for outcome in outcomes)
        check_accounts(read_audit(folder, "mortal_audit"), [server], images, outcomes)


def test_a_server_that_stays_dead(folder):
    images = pictures(3)
    with BadServer(folder, "dead") as server:
        with pool_of(folder, "dead_audit", server) as pool:
            pool.wait_ready()
            server.kill()
            outcomes = score(pool, images)
            check_books(pool.counters())
        assert not any(outcome.valid for outcome in outcomes)
        assert all("Error" in outcome.failure for outcome in outcomes)
        check_accounts(read_audit(folder, "dead_audit"), [server], images, outcomes)
        assert server.log() == []


def test_a_request_that_never_ends_costs_no_more_than_the_attempt_may_take(folder, server):
    server.behave("stall", times=2)
    endless = {"question_seconds": 1000.0, "max_attempts": 1}
    options = {"verifier": endless, "attempt_seconds": 0.5, "max_attempts": 9}
    with pool_of(folder, "endless", server, **options) as pool:
        images = pictures(1)
        (outcome,) = score(pool, images)
        counters = pool.counters()
    server.behave()
    assert outcome.valid
    assert counters["bad_answers"] >= 1
    assert counters["starts"] == 1
    check_accounts(read_audit(folder, "endless"), [server], images, [outcome])


@pytest.mark.parametrize("fault", ["echo", "echo answer", "echo escaped", "echo torn"])
def test_a_key_appears_nowhere(fault, server, folder, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FAULTS_KEY", KEY)
    server.behave(fault)
    name = f"key {fault}"
    with pool_of(folder, name, server, verifier={"api_key_env": "FAULTS_KEY"}) as pool:
        (outcome,) = score(pool, pictures(1))
        texts = [repr(outcome), str(pool.counters()), repr(vars(pool))]
    server.behave()
    assert not outcome.valid
    assert "[key]" in outcome.failure
    texts += [caplog.text, *capfd.readouterr()]
    texts += [path.read_text() for path in folder.iterdir() if path.is_file()]
    assert not any(KEY in text or ESCAPED in text for text in texts)


def test_a_missing_key_is_reported_by_its_name(server, folder):
    with pool_of(folder, "nokey", server, verifier={"api_key_env": "NO_SUCH_KEY"}) as pool:
        (outcome,) = score(pool, pictures(1))
    assert "NO_SUCH_KEY, which api_key_env names, is not set" in outcome.failure


def test_rewards_do_not_depend_on_order_time_or_number_of_workers(server, second_server, folder):
    """Sync and async give the same numbers: whoever answers, whenever, in whatever order."""
    server.behave()
    second_server.behave("slow", every=2)
    images = pictures(12)
    with pool_of(folder, "one", server) as pool:  # synchronous: one after another
        in_turn = []
        for image in images:
            in_turn += [score(pool, [image])[0].p_yes]
    factories = [factory_of(server), factory_of(second_server)]
    with pool_of(folder, "two", factories=factories) as pool:  # all at once, backwards, by two
        for number in reversed(range(len(images))):
            pool.submit(number, images[number], QUESTIONS)
        at_once = pool.gather(range(len(images)))
    assert [at_once[number].p_yes for number in range(len(images))] == in_turn
