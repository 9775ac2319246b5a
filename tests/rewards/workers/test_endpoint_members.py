"""Chat servers as members of a pool: many samples at once, from this process."""

import json
import multiprocessing

import bad_server
import numpy as np
import pytest
from bad_server import BadServer
from default_options import start_pool

QUESTIONS = [f"Is it {word}?" for word in ("red", "round", "flat", "alone")]
RNG = np.random.default_rng(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with BadServer(tmp_path_factory.mktemp("endpoints"), "first") as server:
        yield server


@pytest.fixture(scope="module")
def second_server(tmp_path_factory):
    with BadServer(tmp_path_factory.mktemp("endpoints"), "second") as server:
        yield server


def member(*servers, **options):
    urls = tuple(server.url for server in servers)
    fast = {"question_seconds": 5.0, "backoff_seconds": 0.01}
    return ("openai", {"endpoints": urls, "model": bad_server.MODEL} | fast | options)


def pictures(count):
    return [RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8) for _ in range(count)]


def score(pool, images, questions=QUESTIONS):
    """Results of images, submitted at once."""
    for number, image in enumerate(images):
        pool.submit(number, image, questions)
    return list(pool.gather(range(len(images))).values())


def check_answers(images, results, questions=QUESTIONS):
    for image, result in zip(images, results, strict=True):
        assert result.valid, result.failure
        truths = [bad_server.truth(image, question) for question in questions]
        assert result.p_yes == pytest.approx(truths, abs=1e-9)
        assert result.masses == pytest.approx([0.9] * len(questions), abs=1e-6)


def test_requests_of_all_images_are_in_flight_together_and_connections_are_kept(server):
    server.behave("slow")
    before = server.log()
    first = max((row["connections"] for row in before), default=0)
    images = pictures(12)
    with start_pool([member(server, concurrency=10)]) as pool:
        pool.wait_ready()
        assert not multiprocessing.active_children()
        check_answers(images, score(pool, images))
        counters = pool.counters()
    rows = server.log()[len(before) :]
    assert len(rows) == 48
    together = max(row["together"] for row in rows)
    assert len(QUESTIONS) < together <= 10  # more than one image's, and no more than allowed
    assert max(row["connections"] for row in rows) - first <= 10 + 2  # and those of `behave`
    assert (counters["starts"], counters["attempts"], counters["questions"]) == (1, 12, 48)


def test_a_healthy_slow_server_makes_no_sample_invalid(server):
    """The queue takes 2 s, four times as long as anything may take: no request does."""
    server.behave("slow")
    images = pictures(20)
    options = {"attempt_seconds": 0.5, "total_seconds": 0.5}
    with start_pool([member(server, concurrency=4, question_seconds=0.5)], **options) as pool:
        results = score(pool, images)
        assert pool.counters()["attempts"] == len(images)
    check_answers(images, results)


def test_one_request_at_a_time_is_no_reason_either(server):
    server.behave("slow")
    images = pictures(2)
    options = {"attempt_seconds": 0.3, "total_seconds": 0.3}
    with start_pool([member(server, concurrency=1, question_seconds=0.3)], **options) as pool:
        check_answers(images, score(pool, images))


@pytest.mark.parametrize("nonsense", ["neither", "think for ever", "no logprobs"])
def test_a_server_that_talks_nonsense_costs_no_sample(server, second_server, nonsense, tmp_path):
    server.behave(nonsense)
    second_server.behave()
    before = len(server.log())
    images = pictures(30)
    audit = tmp_path / "audit.jsonl"
    slow_rest = member(server, second_server, concurrency=8, backoff_seconds=0.2)
    with start_pool([slow_rest], audit_path=str(audit)) as pool:
        results = score(pool, images)
    check_answers(images, results)
    assert all(result.attempts == 1 for result in results)
    assert len(server.log()) - before < 40  # of 120 questions: it rests
    rows = [json.loads(line) for line in audit.read_text().splitlines()]
    masses = {row["sample"]: tuple(row["mass"]) for row in rows}
    assert masses == {str(number): result.masses for number, result in enumerate(results)}


def test_a_hard_question_rests_no_good_server(server, second_server):
    server.behave("neither", every=7)
    second_server.behave()
    before = len(server.log())
    images = pictures(20)
    with start_pool([member(server, second_server, concurrency=4, backoff_seconds=5.0)]) as pool:
        check_answers(images, score(pool, images))
    asked = [row["fault"] for row in server.log()[before:]]
    assert asked.count("neither") >= 3
    assert len(asked) > 25  # of 80 questions and some more: it goes on answering
    server.behave()


def test_what_chat_servers_fail_at_goes_to_a_process_and_the_other_way_round(server, tmp_path):
    server.behave("500")
    honest = ("callable", {"target": "tiny_verifiers:Honest"})
    mute = ("callable", {"target": "tiny_verifiers:Mute"})
    images = pictures(4)
    with start_pool([honest, member(server, max_attempts=1)], backoff_seconds=0.01) as pool:
        pool.wait_ready()
        assert {result.worker for result in score(pool, images)} == {0}
    server.behave()
    with start_pool([mute, member(server)], backoff_seconds=0.01) as pool:
        pool.wait_ready()
        results = score(pool, images)
        assert {result.worker for result in results} == {1}
        check_answers(images, results)


def test_a_server_that_is_away_holds_up_no_local_worker_at_the_start(tmp_path):
    with BadServer(tmp_path) as server:
        server.kill()
        honest = ("callable", {"target": "tiny_verifiers:Honest"})
        away = member(server, must_serve=False, outage_attempts=2)
        with start_pool([honest, away], backoff_seconds=0.01) as pool:
            pool.wait_ready()
            assert all(result.valid for result in score(pool, pictures(3)))


def test_no_server_at_the_start_is_told_with_its_reason_in_time(tmp_path, caplog):
    with BadServer(tmp_path) as server:
        server.kill()
        with (
            start_pool([member(server)], start_seconds=1.5) as pool,
            pytest.raises(Exception, match=r"no endpoint serves 'judge' after 1.* s: .*refused"),
        ):
            pool.wait_ready()
    assert "waiting up to" in caplog.text  # at once, not at the end
    assert server.url in caplog.text


def test_close_ends_requests_that_stall(server):
    server.behave("stall")
    pool = start_pool([member(server, question_seconds=1000.0)], attempt_seconds=1000.0)
    pool.wait_ready()
    pool.submit(0, pictures(1)[0], QUESTIONS)
    before = len(server.log())
    while len(server.log()) < before + 1:
        pass
    pool.close()
    pool.close()
    server.behave()


@pytest.mark.parametrize(
    "question", ["Is it <|im_end|>?", "Is it \ud800?"], ids=["control token", "half a letter"]
)
def test_a_question_that_nobody_can_answer_is_asked_once(server, question):
    server.behave()
    (image,) = pictures(1)
    with start_pool([member(server)]) as pool:
        (result,) = score(pool, [image], [*QUESTIONS, question])
        after = score(pool, pictures(2))
    assert (result.valid, result.attempts, result.unanswerable) == (False, 1, question)
    assert "no verifier can answer" in result.failure
    assert all(sample.valid for sample in after)
