"""Balancing under a clock that the tests set."""

import pytest

from alphagrpo_jax.rewards.verifiers.chat import endpoints as endpoints_lib
from alphagrpo_jax.rewards.verifiers.chat.endpoints import LONGEST_REST, Endpoints


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(endpoints_lib, "time", clock)
    return clock


@pytest.fixture
def three(clock):
    return Endpoints(["http://a/v1", "http://b/v1/", "https://c:1/v1"], rest_seconds=1.0)


def test_the_least_loaded_is_picked_and_then_the_least_used(three):
    a, b, c = three.all
    assert [endpoint.url for endpoint in (a, b, c)] == [
        "http://a/v1",
        "http://b/v1",
        "https://c:1/v1",
    ]
    a.in_flight, b.in_flight, c.in_flight = 2, 1, 3
    assert three.pick() is b
    a.in_flight = b.in_flight = c.in_flight = 0
    a.served, b.served, c.served = 5, 4, 3
    assert three.pick() is c
    assert three.pick(avoid=c) is b


def test_a_server_that_failed_rests_ever_longer_and_is_forgiven(three, clock):
    a, b, c = three.all
    rests = []
    for _ in range(12):
        clock.now = max(clock.now, a.rests_until)
        three.failed(a, clock.now, None)
        rests.append(a.rests_until - clock.now)
        assert three.pick() in (b, c)
        assert not three.health()[a.url]
    for number, seconds in enumerate(rests):
        low = min(0.5 * 2.0**number, LONGEST_REST)
        assert low <= seconds <= min(1.5 * 2.0**number, LONGEST_REST)
    three.succeeded(a)
    assert all(three.health().values())


def test_failures_of_requests_under_way_together_count_once(three, clock):
    a = three.all[0]
    started = clock.now
    clock.now += 1.0
    for _ in range(8):
        three.failed(a, started, None)
    assert a.failures == 1
    clock.now += 10.0
    three.failed(a, clock.now, None)
    assert a.failures == 2


def test_a_server_that_asks_for_time_gets_it(three, clock):
    a = three.all[0]
    three.failed(a, clock.now, 600.0)
    assert a.rests_until == clock.now + 600.0


def test_if_all_rest_the_first_to_be_back_is_picked(three, clock):
    a, b, c = three.all
    for endpoint, seconds in ((a, 30.0), (b, 20.0), (c, 40.0)):
        three.failed(endpoint, clock.now, seconds)
    assert three.pick() is b
    assert three.pick(avoid=b) is b
    clock.now += 31.0
    assert three.pick(avoid=b) is a


def test_a_rest_that_the_server_asked_for_outlasts_answers_to_other_requests(three, clock):
    a = three.all[0]
    three.failed(a, clock.now, 30.0)
    three.succeeded(a)  # to a request that was sent before
    assert a.failures == 0
    assert not three.health()[a.url]
    clock.now += 29.0
    three.failed(a, clock.now, 0.5)  # asks for less than is left
    three.succeeded(a)
    assert not three.health()[a.url]
    clock.now += 1.5
    assert three.health()[a.url]


def test_replies_without_answers_rest_a_server_only_if_they_go_on(three, clock):
    a = three.all[0]
    for _ in range(20):  # two hard questions among every three
        three.unanswered(a, clock.now)
        three.unanswered(a, clock.now)
        three.succeeded(a)
        clock.now += 0.1
    assert three.health()[a.url]
    rests = []
    for number in range(6):
        clock.now = max(clock.now, a.rests_until) + 0.1
        three.unanswered(a, clock.now)
        if number >= endpoints_lib.UNANSWERED - 1:
            rests.append(a.rests_until - clock.now)
    assert all(three.health()[server.url] != (server is a) for server in three.all)
    assert rests[-1] > 2 * rests[0] > 0


def test_the_only_server_does_not_rest_for_replies_without_answers(clock):
    alone = Endpoints(["http://a/v1"], rest_seconds=1.0)
    for _ in range(20):
        alone.unanswered(alone.all[0], clock.now)
    assert alone.health() == {"http://a/v1": True}


def test_after_a_rest_one_request_tries_the_server(three, clock):
    a, b, c = three.all
    three.failed(a, clock.now, None)
    clock.now = a.rests_until + 0.1
    b.in_flight = c.in_flight = 5
    assert three.pick() is a
    a.in_flight = 1  # that one; the others do not join it
    assert three.pick() in (b, c)
    three.succeeded(a)
    assert three.pick() is a
