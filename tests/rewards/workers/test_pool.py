import json
import os
import signal
import sys
import threading
import time

import numpy as np
import pool_fakes
import pytest
from default_options import start_pool

from alphagrpo_jax.rewards.workers.pool import PoolError
from alphagrpo_jax.runtime.stopping import StoppedError, StopRequest

QUESTIONS = ["Is there a circle?", "Is it red?"]
FAST = {"attempt_seconds": 20.0, "backoff_seconds": 0.01, "total_seconds": 60.0}
DIE, HANG, STOP, RAISE, NAN, FEW, MANY, RANGE, NEITHER, NOTHING = range(1, 11)


def make_pool(tmp_path, **options):
    factory = ("callable", {"target": "pool_fakes:Fake", "folder": str(tmp_path)})
    return start_pool(factory, **(FAST | options))


def picture(number, fault=0, times=0):
    image = np.full((4, 4, 3), 10 * number % 256, np.uint8)
    image[0, 0] = fault, times, number
    return image


def expected(image):
    return tuple(pool_fakes.truth(image, QUESTIONS))


def check_books(counters):
    assert counters["submitted"] == counters["answered"] + counters["invalid"]
    failures = sum(counters[name] for name in ("timeouts", "deaths", "bad_answers"))
    assert counters["attempts"] == counters["answered"] - counters["cached"] + failures


def test_answers_every_sample_whoever_answers(tmp_path):
    images = {number: picture(number) for number in range(12)}
    with make_pool(tmp_path) as pool:
        pool.wait_ready()
        for number, image in images.items():
            pool.submit(number, image, QUESTIONS)
        late = pool.gather([11, 5, 0])
        early = pool.gather([number for number in images if number not in late])
        counters = pool.counters()
    assert list(late) == [11, 5, 0]
    for number, scored in (late | early).items():
        assert scored.valid
        assert scored.p_yes == expected(images[number])
        assert (scored.attempts, scored.failure) == (1, None)
        assert scored.latency_s >= 0
    check_books(counters)
    assert counters["questions"] == 24
    assert counters["starts"] == 2


@pytest.mark.parametrize("fault", [DIE, HANG, STOP])
def test_a_worker_that_dies_or_hangs_costs_one_attempt(tmp_path, fault):
    with make_pool(tmp_path, attempt_seconds=3.0, total_seconds=60.0) as pool:
        pool.wait_ready()
        pool.submit("bad", picture(1, fault, times=1), QUESTIONS)
        other_ids = list(range(2, 8))
        for number in other_ids:
            pool.submit(number, picture(number), QUESTIONS)
        results = pool.gather(other_ids)
        assert pool.counters()["timeouts"] == 0  # the others did not wait for the one that hangs
        bad = pool.gather(["bad"])["bad"]
        counters = pool.counters()
    assert all(scored.valid and scored.attempts == 1 for scored in results.values())
    assert bad.p_yes == expected(picture(1, fault, times=1))
    assert bad.attempts == 2
    assert counters["deaths" if fault == DIE else "timeouts"] == 1
    assert counters["retries"] == 1
    check_books(counters)


@pytest.mark.parametrize("fault", [RAISE, NAN, FEW, MANY, RANGE, NEITHER, NOTHING])
def test_bad_answers_are_tried_again_and_never_become_numbers(tmp_path, fault):
    with make_pool(tmp_path, max_attempts=3) as pool:
        pool.submit("once", picture(1, fault, times=2), QUESTIONS)
        pool.submit("always", picture(2, fault, times=99), QUESTIONS)
        results = pool.gather(["once", "always"])
        counters = pool.counters()
    assert results["once"].p_yes == expected(picture(1, fault, times=2))
    assert results["once"].attempts == 3
    always = results["always"]
    assert (always.valid, always.p_yes, always.worker) == (False, None, None)
    assert always.attempts == 3
    assert "attempt 3" in always.failure
    assert counters["bad_answers"] == 5
    assert counters["starts"] <= 2  # the processes lived on
    check_books(counters)


def test_failing_reply_says_what_was_wrong(tmp_path):
    messages = {}
    with make_pool(tmp_path, workers=1, max_attempts=1) as pool:
        for number, fault in enumerate([RAISE, NAN, FEW, NEITHER]):
            pool.submit(number, picture(number, fault, times=9), QUESTIONS)
        messages = {n: scored.failure for n, scored in pool.gather(range(4)).items()}
    assert messages[0].endswith("RuntimeError: the model is on fire")
    assert messages[1].endswith("question 0: got P(yes) = nan, expected a number in [0, 1]")
    assert messages[2].endswith("got 1 answers, expected 2")
    assert messages[3].endswith("question 0: neither yes nor no")


def test_workers_may_be_of_different_kinds(tmp_path):
    fake = ("callable", {"target": "pool_fakes:Fake", "folder": str(tmp_path)})
    with start_pool([fake, ("callable", {"target": "pool_fakes:Slow"})], **FAST) as pool:
        pool.wait_ready()
        for number in range(20):
            pool.submit(number, picture(number), QUESTIONS)
        results = pool.gather(range(20))
        assert pool.counters()["starts"] == 2
    assert all(scored.p_yes == expected(picture(n)) for n, scored in results.items())


def test_one_kind_may_be_missing(tmp_path):
    fake = ("callable", {"target": "pool_fakes:Fake", "folder": str(tmp_path)})
    broken = ("callable", {"target": "pool_fakes:broken"})
    with start_pool([broken, fake], **FAST) as pool:
        pool.wait_ready()
        pool.submit(0, picture(0), QUESTIONS)
        assert pool.gather([0])[0].worker == 1
        assert pool.counters()["lost_workers"] == 1


def test_retries_go_to_another_worker(tmp_path):
    audit = tmp_path / "audit.jsonl"
    with make_pool(tmp_path, audit_path=str(audit), max_attempts=2) as pool:
        pool.wait_ready()
        for number in range(6):
            pool.submit(number, picture(number, RAISE, times=1), QUESTIONS)
        results = pool.gather(range(6))
    assert all(scored.valid for scored in results.values())
    rows = [json.loads(line) for line in audit.read_text().splitlines()]
    for number in range(6):
        first, second = (row for row in rows if row["sample"] == str(number))
        assert first["worker"] != second["worker"]
        assert (first["p_yes"], second["failure"]) == (None, None)
        assert tuple(second["p_yes"]) == results[number].p_yes


def test_audit_log_has_an_answer_for_every_reward_and_only_those(tmp_path):
    audit = tmp_path / "audit.jsonl"
    with make_pool(tmp_path, audit_path=str(audit), max_attempts=2) as pool:
        for number in range(10):
            pool.submit(number, picture(number, (0, NAN, RAISE)[number % 3], times=2), QUESTIONS)
        results = pool.gather(range(10))
        counters = pool.counters()
    rows = [json.loads(line) for line in audit.read_text().splitlines()]
    assert len(rows) == counters["attempts"]
    audited = {row["sample"]: tuple(row["p_yes"]) for row in rows if row["p_yes"] is not None}
    assert audited == {str(n): scored.p_yes for n, scored in results.items() if scored.valid}
    assert counters["invalid"] == 6
    check_books(counters)


def test_a_worker_that_dies_every_time_is_given_up_and_samples_become_invalid(tmp_path):
    with make_pool(tmp_path, workers=1, max_attempts=9, max_restarts=2) as pool:
        for number in range(3):
            pool.submit(number, picture(number, DIE, times=99), QUESTIONS)
        results = pool.gather(range(3))
        pool.submit("after", picture(9), QUESTIONS)
        after = pool.gather(["after"])["after"]
        counters = pool.counters()
    assert not any(scored.valid for scored in (*results.values(), after))
    assert after.failure.startswith("no verifier worker is left: it failed 3 times in a row, last")
    assert counters["lost_workers"] == 1
    assert counters["starts"] == 3
    check_books(counters)


def test_samples_past_their_total_time_are_invalid(tmp_path):
    options = {"workers": 1, "attempt_seconds": 1.5, "total_seconds": 0.8}
    with make_pool(tmp_path, **options) as pool:
        pool.wait_ready()
        pool.submit("hangs", picture(1, HANG, times=1), QUESTIONS)
        time.sleep(0.2)
        pool.submit("waits", picture(2), QUESTIONS)
        waits = pool.gather(["waits"])["waits"]
        hangs = pool.gather(["hangs"])["hangs"]
    assert not waits.valid
    assert waits.attempts == 0
    assert waits.failure.startswith("gave up after")
    assert not hangs.valid
    assert hangs.attempts == 1


def test_submit_waits_while_the_pool_is_full():
    slow = ("callable", {"target": "pool_fakes:Slow"})
    with start_pool(slow, workers=1, capacity=2) as pool:
        pool.wait_ready()
        most = 0
        for number in range(8):
            pool.submit(number, picture(number), QUESTIONS)
            counters = pool.counters()
            under_way = counters["submitted"] - counters["answered"] - counters["invalid"]
            most = max(most, under_way)
        assert all(scored.valid for scored in pool.gather(range(8)).values())
    assert most == 2


def test_workers_get_their_threads_and_no_jax():
    questions = ["OMP_NUM_THREADS=3", "imported numpy", "imported jax", "imported torch"]
    environment = ("callable", {"target": "pool_fakes:Environment"})
    with start_pool(environment, workers=1, threads=3) as pool:
        pool.submit(0, picture(0), questions)
        assert pool.gather([0])[0].p_yes == (1.0, 1.0, 0.0, 0.0)


def test_cache_answers_the_same_image_and_questions_without_asking(tmp_path):
    with make_pool(tmp_path, cache_size=4) as pool:
        for sample_id, number in enumerate([1, 1, 2, 3, 1]):  # 1 has been dropped at the end
            pool.submit(sample_id, picture(number), QUESTIONS)
            assert pool.gather([sample_id])[sample_id].p_yes == expected(picture(number))
        pool.submit("fewer", picture(1), QUESTIONS[:1])  # known one by one
        assert pool.gather(["fewer"])["fewer"].p_yes == expected(picture(1))[:1]
        pool.submit("more", picture(1), [*QUESTIONS, "Is it flat?"])
        assert len(pool.gather(["more"])["more"].p_yes) == 3
        counters = pool.counters()
    assert counters["cached"] == 2
    assert counters["attempts"] == 5
    check_books(counters)


def test_a_verifier_that_cannot_be_built_is_reported_at_once(capfd):
    with (
        start_pool(("callable", {"target": "pool_fakes:broken"})) as pool,
        pytest.raises(PoolError, match="no weights in /nowhere"),
    ):
        pool.wait_ready()
    printed = capfd.readouterr().err
    assert "Traceback" in printed  # a bug of the verifier: whoever wrote it sees the line
    assert "in broken" in printed
    with start_pool(("nonsense", {})) as pool, pytest.raises(PoolError, match="got verifier kind"):
        pool.wait_ready()
    assert "Traceback" not in capfd.readouterr().err  # a user's error is its message


def test_a_process_that_dies_while_starting_is_given_up():
    mortal = ("callable", {"target": "pool_fakes:dies_at_once"})
    with (
        start_pool(mortal, workers=1, max_restarts=1, backoff_seconds=0.01) as pool,
        pytest.raises(PoolError, match=r"failed 2 times in a row, last: .* ended with code 7"),
    ):
        pool.wait_ready()


def test_a_verifier_that_never_starts_is_told_with_the_reason_after_the_time_for_it():
    """Not once more for each restart."""
    slow = ("callable", {"target": "pool_fakes:never_starts"})
    begun = time.monotonic()
    with (
        start_pool(slow, start_seconds=3.0, backoff_seconds=0.01) as pool,
        pytest.raises(PoolError, match=r"did not start within 3\.0 s: no answer within"),
    ):
        pool.wait_ready()
    assert time.monotonic() - begun < 30.0


def test_a_stop_ends_waits_for_workers(tmp_path):
    """While they start, while they answer, and while the pool is full."""
    stop, hanging = StopRequest(grace_seconds=60.0), picture(1, HANG, times=9)
    with make_pool(tmp_path, capacity=1, attempt_seconds=900.0, stop=stop) as pool:
        pool.wait_ready()
        pool.submit("answered", picture(2), QUESTIONS)
        pool.gather(["answered"])
        pool.submit("hangs", hanging, QUESTIONS)
        timer = threading.Timer(0.5, stop.hurry)
        timer.start()
        pool.submit("beyond capacity", hanging, QUESTIONS)  # `gather` is the place to leave
        assert stop.requested
        with pytest.raises(StoppedError):
            pool.gather(["hangs", "beyond capacity"])
    never = ("callable", {"target": "pool_fakes:never_starts"})
    with start_pool(never, start_seconds=900.0, stop=stop) as pool, pytest.raises(StoppedError):
        pool.wait_ready()


def test_close_ends_busy_workers_and_waiting_callers(tmp_path):
    pool = make_pool(tmp_path, attempt_seconds=60.0)
    pool.wait_ready()
    pids = [worker.pid for worker in (member.worker for member in pool._members)]
    pool.submit("hangs", picture(1, HANG, times=9), QUESTIONS)
    caught = []

    def wait():
        with pytest.raises(PoolError, match="closed") as info:
            pool.gather(["hangs"])
        caught.append(info)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.2)
    pool.close()
    pool.close()
    waiter.join(timeout=5)
    assert len(caught) == 1
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(PoolError, match="closed"):
        pool.submit("later", picture(1), QUESTIONS)


def test_workers_ignore_ctrl_c(tmp_path):
    with make_pool(tmp_path) as pool:
        pool.wait_ready()
        for worker in (member.worker for member in pool._members):
            os.kill(worker.pid, signal.SIGINT)
        pool.submit(0, picture(0), QUESTIONS)
        assert pool.gather([0])[0].attempts == 1
        assert pool.counters()["starts"] == 2


def test_workers_end_when_their_parent_is_killed(run_python, tmp_path):
    program = (
        "import os, signal, numpy as np\n"
        "from default_options import start_pool\n"
        f"factory = ('callable', {{'target': 'pool_fakes:Fake', 'folder': {str(tmp_path)!r}}})\n"
        "pool = start_pool(factory, workers=2)\n"
        "pool.wait_ready()\n"
        "image = np.zeros((4, 4, 3), np.uint8)\n"
        f"image[0, 0] = {HANG}, 9, 0\n"
        "pool.submit(0, image, ['Is it?'])\n"  # one worker is busy for ever, the other idle
        "print(*[member.worker.pid for member in pool._members], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = run_python("-c", program, PYTHONPATH=os.pathsep.join(sys.path))
    pids = [int(word) for word in process.stdout.split()]
    assert len(pids) == 2
    end = time.monotonic() + 8
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_refuses_wrong_samples(tmp_path):
    with make_pool(tmp_path, workers=1) as pool:
        with pytest.raises(ValueError, match=r"got an image float64\[4, 4, 3\]"):
            pool.submit(0, np.zeros((4, 4, 3)), QUESTIONS)
        with pytest.raises(ValueError, match="expected lists, and at least 1 text"):
            pool.submit(0, picture(0), [])
        with pytest.raises(ValueError, match="expected ids submitted"):
            pool.gather([0])
        pool.submit(0, picture(0), QUESTIONS)
        with pytest.raises(ValueError, match="not yet gathered"):
            pool.submit(0, picture(0), QUESTIONS)
        pool.gather([0])
        pool.submit(0, picture(0), QUESTIONS)
        assert pool.gather([0, 0])[0].valid


def test_refuses_wrong_options():
    slow = ("callable", {"target": "pool_fakes:Slow"})
    with pytest.raises(ValueError, match="got no verifier factories, expected one per worker"):
        start_pool(slow, workers=0)
    with pytest.raises(ValueError, match=r"attempt_seconds\n  Input should be a finite number"):
        start_pool(slow, attempt_seconds=float("nan"))
    with pytest.raises(ValueError, match="cannot be pickled"):
        start_pool(("callable", {"target": lambda: None}))
