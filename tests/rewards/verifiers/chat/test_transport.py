"""HTTP of every broken form ends as a stated failure."""

import json
import random
import socket
import threading

import pytest

from alphagrpo_jax.rewards.verifiers.chat.client import ChatClient, ChatError

BODY = json.dumps({"model": "m", "choices": [{"message": {"content": "Yes"}}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
SOUND = HEAD % len(BODY) + BODY
FORMS = [
    SOUND,
    b"HTTP/1.1 429 Busy\r\nRetry-After: 0.001\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
    b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Max-Age=x\r\nContent-Length: 2\r\n\r\n{}",
]
REPLIES = 300


@pytest.fixture
def raw_server():
    """raw_server(replies): URL of a server that sends these bytes, one after another."""
    listener = socket.create_server(("127.0.0.1", 0))
    queue = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    received = b""
                    while b"\r\n\r\n" not in received:
                        received += connection.recv(1 << 16) or b"\r\n\r\n"
                    connection.sendall(queue.pop(0) if queue else SOUND)
                except OSError:
                    continue

    threading.Thread(target=serve, daemon=True).start()

    def start(replies):
        queue[:] = replies
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    listener.close()


def broken(rng):
    """A reply with some bytes changed, removed, doubled or cut off."""
    reply = bytearray(rng.choice(FORMS))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(reply) + 1)
        change = rng.randrange(4)
        if change == 0:
            reply[place : place + 1] = rng.randbytes(1)
        elif change == 1:
            del reply[place : place + rng.randint(1, 9)]
        elif change == 2:
            reply[place:place] = reply[:place][-9:] + b"\r\n"
        else:
            del reply[max(place, 1) :]
    return bytes(reply)


def test_broken_http_raises_nothing_but_a_stated_failure(raw_server):
    rng, messages = random.Random(0), []
    url = raw_server([broken(rng) for _ in range(REPLIES)])
    with ChatClient([url], "m", timeout=1.0, max_attempts=1, backoff_seconds=1e-4) as client:
        for _ in range(REPLIES):
            try:
                reply = client.complete([{"role": "user", "content": "Is it?"}])
            except ChatError as error:
                messages.append(str(error))
            else:
                assert isinstance(reply.text, str)
    assert len(messages) > REPLIES / 3
    assert not [text for text in messages if not text.startswith((url, "no endpoint"))]


def test_redirections_are_not_followed(raw_server):
    url = raw_server([FORMS[2]])
    with ChatClient([url], "m", max_attempts=1) as client:
        with pytest.raises(ChatError, match="HTTP status 302") as caught:
            client.complete([{"role": "user", "content": "Is it?"}])
        assert caught.value.kind == "refused"


def test_a_reply_without_end_is_cut(raw_server, monkeypatch):
    monkeypatch.setattr(
        "alphagrpo_jax.rewards.verifiers.chat.transport.MAX_REPLY_BYTES", len(BODY) - 1
    )
    with (
        ChatClient([raw_server([SOUND])], "m", max_attempts=1) as client,
        pytest.raises(ChatError, match="a reply without end"),
    ):
        client.complete([{"role": "user", "content": "Is it?"}])
