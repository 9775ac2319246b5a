"""The pace of requests by a clock of our own, patience with failures, and stops."""

import random
import threading

import pytest

from alphagrpo_jax.decomposition.limits import Pace, PatientModel, StopRequestedError
from alphagrpo_jax.rewards.verifiers.chat.base import LanguageModelError


class Clock:
    """Time passes only by sleeping."""

    def __init__(self):
        self.now, self.naps = 100.0, 0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds
        self.naps += 1


def test_requests_per_minute_by_counting():
    clock = Clock()
    pace = Pace(30, clock=clock, sleep=clock.sleep)
    begins = []
    for _ in range(91):
        pace.wait()
        begins.append(clock.now - 100.0)
    for minute in range(3):
        assert sum(60 * minute <= t + 1e-6 < 60 * (minute + 1) for t in begins) == 30
    assert begins[:3] == pytest.approx([0.0, 2.0, 4.0])


def test_a_pause_is_not_made_up_for():
    clock = Clock()
    pace = Pace(60, clock=clock, sleep=clock.sleep)
    pace.wait()
    clock.now += 30.0  # nobody asks
    begins = []
    for _ in range(3):
        pace.wait()
        begins.append(clock.now - 130.0)
    assert begins == pytest.approx([0.0, 1.0, 2.0])


def test_threads_share_the_pace():
    lock, begins = threading.Lock(), []
    clock = Clock()

    def sleep(seconds):
        raise AssertionError("without a limit nobody sleeps")

    free = Pace(0, clock=clock, sleep=sleep)

    def ask():
        for _ in range(50):
            free.wait()
            with lock:
                begins.append(clock.now)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begins == [100.0] * 200


def test_a_stop_ends_the_waiting():
    clock = Clock()
    pace = Pace(1, stopped=lambda: clock.naps >= 3, clock=clock, sleep=clock.sleep)
    pace.wait()
    with pytest.raises(StopRequestedError):
        pace.wait()
    assert clock.now < 101.0


def test_a_request_is_abandoned_once_a_stop_is_overdue():
    """And the model may answer when nobody waits any more."""
    free, overdue = threading.Event(), threading.Event()

    class Stalling:
        def complete(self, messages, form=None):
            overdue.set()
            free.wait(60.0)
            return "too late"

    pace = Pace(0, overdue=overdue.is_set)
    with pytest.raises(StopRequestedError):
        PatientModel(Stalling(), pace).complete([])
    assert not free.is_set()
    free.set()
    assert pace.request(lambda: "reply") == "reply"


class Flaky:
    """Fails as told, then replies."""

    def __init__(self, *failures):
        self.failures, self.calls = list(failures), 0

    def complete(self, messages, form=None):
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "reply"


def test_failures_that_may_pass_are_repeated_at_the_pace():
    clock = Clock()
    pace = Pace(1, clock=clock, sleep=clock.sleep)
    flaky = Flaky(*[LanguageModelError("busy", kind="silent", retryable=True)] * 2)
    assert PatientModel(flaky, pace).complete([]) == "reply"
    assert flaky.calls == 3
    assert clock.now == pytest.approx(220.0)  # two more requests, a minute each


def test_back_off_grows_and_the_last_failure_is_told():
    clock = Clock()
    flaky = Flaky(*[LanguageModelError("busy", kind="silent", retryable=True)] * 9)
    model = PatientModel(flaky, Pace(0, clock=clock, sleep=clock.sleep), tries=4)
    with pytest.raises(LanguageModelError, match="busy"):
        model.complete([])
    assert flaky.calls == 4
    assert 100 + 0.5 * 7 <= clock.now <= 100 + 1.5 * 7  # 1 + 2 + 4 seconds, with jitter


def test_the_waits_are_those_of_the_formula():
    waits = []

    class Recorder(Pace):
        def pause(self, seconds):
            if seconds > 0:
                waits.append(seconds)

    flaky = Flaky(*[LanguageModelError("busy", kind="silent", retryable=True)] * 9)
    assert PatientModel(flaky, Recorder(0), tries=10).complete([]) == "reply"
    jitter = random.Random(0)
    assert waits == [min(2.0**n, 60.0) * jitter.uniform(0.5, 1.5) for n in range(9)]


def test_a_stop_ends_the_back_off():
    clock = Clock()
    pace = Pace(0, stopped=lambda: clock.naps >= 3, clock=clock, sleep=clock.sleep)
    flaky = Flaky(*[LanguageModelError("busy", kind="silent", retryable=True)] * 9)
    with pytest.raises(StopRequestedError):
        PatientModel(flaky, pace, tries=9).complete([])
    assert flaky.calls == 1


def test_failures_that_stay_are_not_repeated():
    flaky = Flaky(LanguageModelError("wrong key", kind="silent", retryable=False))
    with pytest.raises(LanguageModelError, match="wrong key"):
        PatientModel(flaky, Pace(0)).complete([])
    assert flaky.calls == 1
