import logging
import threading

import bad_server
import pytest
from bad_server import BadServer

from alphagrpo_jax.rewards.verifiers.chat import replies
from alphagrpo_jax.rewards.verifiers.chat.client import ChatClient, ChatError

MESSAGES = [{"role": "user", "content": "Is it?"}]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with BadServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def client(server):
    server.behave()
    with client_of(server) as client:
        yield client


def client_of(*servers, **options):
    fast = {"timeout": 10.0, "max_attempts": 3, "backoff_seconds": 0.01}
    return ChatClient([server.url for server in servers], bad_server.MODEL, **(fast | options))


def test_a_reply_has_text_candidates_and_usage(client, server):
    reply = client.complete(MESSAGES, max_tokens=1, top_logprobs=4)
    assert reply.text in ("Yes", "No", "It", " yes.")
    assert [candidate.token for candidate in reply.candidates] == ["Yes", " yes.", "No", "It"]
    assert (reply.finish_reason, reply.endpoint) == ("length", server.url)
    assert reply.usage["completion_tokens"] == 1
    sent = server.log()[-1]
    assert (sent["question"], sent["max_tokens"], sent["temperature"]) == ("Is it?", 1, 0.0)
    assert client.complete(MESSAGES).candidates is None


def test_a_schema_is_sent_as_response_format(client, server):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    client.complete(MESSAGES, schema=schema)
    sent = server.log()[-1]["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("reset", "connection", ""),
        ("cut", "connection", ""),
        ("429", "busy", "HTTP status 429"),
        ("503", "busy", "HTTP status 503"),
        ("500", "status", "HTTP status 500: <html>oh no</html>"),
        ("truncated", "reply", "truncated or malformed JSON"),
        ("not json", "reply", "truncated or malformed JSON"),
        ("no logprobs", "reply", "no log-probs"),
        ("nan", "reply", "got nan, expected a number of at most 0"),
        ("overfull", "reply", "probabilities of the candidates sum to 1.8"),
        ("other request", "reply", "answer to another request"),
        ("other model", "reply", "answer by another model: got 'parrot'"),
        ("no choices", "reply", "got 0 choices"),
    ],
)
def test_faults_are_tried_again_and_then_stated(server, fault, kind, words):
    with client_of(server) as client:
        server.behave(fault, times=2)
        assert client.complete(MESSAGES, top_logprobs=4).text
        server.behave(fault)
        before = len(server.log())
        with pytest.raises(ChatError) as caught:
            client.complete(MESSAGES, top_logprobs=4)
        assert len(server.log()) - before == 3
    assert (caught.value.kind, caught.value.retryable) == (kind, True)
    assert words in str(caught.value)
    assert server.url in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "kind", "requests"),
    [
        ("400", "wrong request", 2),
        ("401", "refused", 1),
        ("405", "refused", 1),
        ("415", "refused", 1),
    ],
)
def test_what_cannot_succeed_is_not_tried_again(client, server, fault, kind, requests):
    server.behave(fault)
    before = len(server.log())
    with pytest.raises(ChatError, match=f"HTTP status {fault}") as caught:
        client.complete(MESSAGES)
    assert (caught.value.kind, caught.value.retryable) == (kind, False)
    assert not caught.value.permanent  # it is not known whether the request is at fault
    assert len(server.log()) - before == requests


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_request_that_never_ends_is_given_up(server, fault):
    server.behave(fault)
    with (
        client_of(server, timeout=0.3, max_attempts=1) as client,
        pytest.raises(ChatError, match=r"no reply within 0\.3 s") as caught,
    ):
        client.complete(MESSAGES)
    assert caught.value.kind == "timeout"


def test_the_whole_call_has_a_deadline_that_names_the_last_failure(server):
    server.behave("500", "stall")
    with client_of(server, max_attempts=9) as client, pytest.raises(ChatError) as caught:
        client.complete(MESSAGES, total_seconds=0.8)
    assert "no reply within 0.8 s; the last failure" in str(caught.value)
    assert "HTTP status 500" in str(caught.value)


def test_a_pause_longer_than_the_deadline_is_not_waited_for(client, server):
    server.behave("503 for long")
    with pytest.raises(ChatError, match="HTTP status 503") as caught:
        client.complete(MESSAGES, total_seconds=60.0)
    assert caught.value.kind == "busy"
    assert client.health() == {server.url: False}


def test_another_server_takes_over(server, tmp_path):
    server.behave()
    with BadServer(tmp_path) as second, client_of(second, server) as client:
        second.behave("401")
        assert {client.complete(MESSAGES).endpoint for _ in range(6)} == {server.url}
        assert {row["fault"] for row in second.log()} == {"401"}


def test_a_server_that_comes_back_is_used_again(server, tmp_path):
    server.behave()
    with BadServer(tmp_path) as second, client_of(second, server) as client:
        second.kill()
        assert {client.complete(MESSAGES).endpoint for _ in range(4)} == {server.url}
        second.start()
        threading.Event().wait(0.2)
        assert second.url in {client.complete(MESSAGES).endpoint for _ in range(20)}


def test_load_is_shared(server, tmp_path):
    server.behave("slow")
    answered = []
    with BadServer(tmp_path) as second, client_of(second, server) as client:
        second.behave("slow")

        def ask():
            answered.append(client.complete(MESSAGES).endpoint)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(answered.count(url) for url in (server.url, second.url)) == [6, 6]


def test_a_key_is_sent_and_shown_nowhere(server, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEST_KEY", KEY)
    server.behave("echo")
    with client_of(server, api_key_env="TEST_KEY", max_attempts=2) as client:
        with pytest.raises(ChatError, match=r"not allowed: Bearer \[key\]") as caught:
            client.complete(MESSAGES)
        texts = [str(caught.value), repr(caught.value), repr(client), caplog.text]
        texts += [repr(caught.value.__cause__), str(client.health()), *capfd.readouterr()]
    assert not any(KEY in text for text in texts)


def test_models_says_what_each_endpoint_serves(server):
    with ChatClient([server.url, "http://127.0.0.1:9/v1"], bad_server.MODEL) as client:
        models = client.models()
    assert models[server.url] == [bad_server.MODEL]
    assert models["http://127.0.0.1:9/v1"].kind == "connection"


@pytest.mark.parametrize(
    ("urls", "words"),
    [
        ([], "at least 1"),
        ("http://a/v1", "at least 1"),
        (["ftp://a/v1"], "expected http"),
        (["http://a:x/v1"], "expected http"),
        (["http://a/v1", "http://a/v1/"], "each of them once"),
        (["http://me:hidden@a/v1"], "with a user, password"),
    ],
)
def test_wrong_endpoints_are_refused(urls, words):
    with pytest.raises(ValueError, match=words) as caught:
        ChatClient(urls, "m")
    assert "hidden" not in str(caught.value)


def test_keys_that_are_none_are_refused_without_showing_them(monkeypatch):
    with pytest.raises(ValueError, match="NO_SUCH_KEY, which api_key_env names, is not set"):
        ChatClient(["http://a/v1"], "m", api_key_env="NO_SUCH_KEY")
    monkeypatch.setenv("BAD_KEY", "two words\nand lines")
    with pytest.raises(ValueError, match="BAD_KEY holds no key") as caught:
        ChatClient(["http://a/v1"], "m", api_key_env="BAD_KEY")
    assert "words" not in str(caught.value)


def test_minus_infinity_is_a_probability_and_other_oddities_are_not():
    def read(logprob):
        row = {"token": "Yes", "logprob": logprob}
        return replies._token(row | {"top_logprobs": [row]}, "token")

    assert read(float("-inf")) == (("Yes", float("-inf")),)
    assert read(0) == (("Yes", 0.0),)
    for odd in (float("inf"), float("nan"), 1.0, None, "0.5", True):
        with pytest.raises(replies.ChatReplyError, match="expected a number"):
            read(odd)
