"""A chat-completions server that misbehaves on command: a process of its own on loopback.

`BadServer` starts it, tells it what to do, kills it and reads its own log of what it answered. The
process knows no third-party web framework, so that it can break the protocol wherever it likes.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

MODEL = "judge"
# Fields of requests; all others are further ones of the user's.
KNOWN = ("model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs")
KNOWN += ("response_format", "seed")


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def truth(image: np.ndarray, question: str) -> float:
    """What the honest server answers: a number that depends on image and question."""
    number = hashlib.sha256((digest(image) + question).encode()).digest()
    return int.from_bytes(number[:4], "big") / 2**32


class BadServer:
    """Handle of one server process; a context manager."""

    def __init__(self, folder: pathlib.Path, name: str = "server") -> None:
        self._log, self._errors = folder / f"{name}.jsonl", folder / f"{name}.err"
        self.port = 0
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Starts the process, at a second time on the port of the first."""
        command = [sys.executable, __file__, "--port", str(self.port), "--log", str(self._log)]
        with self._errors.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True
            )
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def wait(self) -> None:
        """Waits until the process has ended by itself."""
        self._process.wait()

    def behave(
        self, *faults: str, every: int = 1, times: int | None = None, after: int = 0
    ) -> None:
        """From now on every `every`-th chat request gets the next fault in turn, `times` at most.

        Args:
          faults: names in `FAULTS`; none: it is honest.
          every: 1 is each request.
          times: None is for ever.
          after: so many honest answers first.
        """
        command = {"faults": faults, "every": every, "times": times, "after": after}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/behave", json.dumps(command).encode()
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(request, timeout=10).read()

    def log(self) -> list[dict]:
        """Every chat request that the process had: what was asked, the fault, the answer."""
        if not self._log.exists():
            return []
        return [json.loads(line) for line in self._log.read_text().splitlines()]


class _State:
    """What the process was told to do, and how far it is."""

    def __init__(self, log: pathlib.Path) -> None:
        self._lock, self._log = threading.Lock(), log
        self.together = 0  # requests under way
        self.connections = 0  # accepted so far
        self.tell({"faults": [], "every": 1, "times": None, "after": 0})

    def tell(self, command: dict) -> None:
        with self._lock:
            self._command, self._asked, self._shown = command, 0, 0

    def next_fault(self) -> str | None:
        with self._lock:
            command = self._command
            self._asked += 1
            over = command["times"] is not None and self._shown >= command["times"]
            turn = self._asked - command["after"]
            if not command["faults"] or over or turn <= 0 or turn % command["every"]:
                return None
            self._shown += 1
            return command["faults"][(self._shown - 1) % len(command["faults"])]

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self.together += 1
        try:
            yield
        finally:
            with self._lock:
                self.together -= 1

    def write(self, row: dict) -> None:
        with self._lock, self._log.open("a") as file:
            file.write(json.dumps(row) + "\n")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: _State

    def do_GET(self) -> None:
        self.send_json({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/behave":
            self.state.tell(body)
            self.send_json({})
            return
        with self.state.counted():
            self.chat(body)

    def chat(self, body: dict) -> None:
        request, fault = read_request(body), self.state.next_fault()
        if fault == "400 for unicorns" and "unicorn" not in request["question"]:
            fault = None
        row = {key: value for key, value in request.items() if key != "pixels"}
        row |= {"fault": fault, "id": self.headers["X-Request-Id"], "p_yes": None}
        row["together"], row["connections"] = self.state.together, self.state.connections
        if request["pixels"] is not None:
            image = request["pixels"]
            p_yes = truth(image, request["question"])
            row["image"] = digest(image)
            if fault in HONEST:
                row["p_yes"] = p_yes
        else:
            p_yes = 0.5
        self.state.write(row)
        reply = completion(p_yes, body, self.headers["X-Request-Id"])
        FAULTS[fault](self, reply)

    def send_json(self, content: object, status: int = 200, **headers: str) -> None:
        self.send_body(json.dumps(content).encode(), status=status, **headers)

    def send_body(self, body: bytes, status: int = 200, length: int | None = None, **headers: str):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The log is the state's."""

    def abort(self) -> None:
        """Ends the connection by a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()
        self.close_connection = True


def read_request(body: dict) -> dict:
    """System text, question and image of a chat request."""
    system = [m["content"] for m in body["messages"] if m["role"] == "system"]
    content = body["messages"][-1]["content"]
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [item["text"] for item in items if item["type"] == "text"]
    urls = [item["image_url"]["url"] for item in items if item["type"] == "image_url"]
    pixels = None
    if urls:
        data = base64.b64decode(urls[0].partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(data)))
    return {
        "system": system[0] if system else None,
        "question": texts[0] if len(texts) == 1 else texts,
        "max_tokens": body.get("max_tokens"),
        "temperature": body.get("temperature"),
        "top_logprobs": body.get("top_logprobs"),
        "response_format": body.get("response_format"),
        "extra": {name: value for name, value in body.items() if name not in KNOWN},
        "pixels": pixels,
    }


def completion(p_yes: float, body: dict, request_id: str | None) -> dict:
    """An honest reply: nine tenths of the mass on yes and no, the two spellings of yes alike."""
    rows = [("Yes", 0.45 * p_yes), (" yes.", 0.45 * p_yes), ("No", 0.9 * (1 - p_yes)), ("It", 0.05)]
    top = [{"token": token, "logprob": math.log(max(p, 1e-30))} for token, p in rows]
    first = max(top, key=lambda row: row["logprob"])
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": first["token"]},
                "finish_reason": "length",
                "logprobs": {"content": [first | {"top_logprobs": top}]},
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
    }


def _with_logprobs(reply: dict, rows: list[tuple[str, float]]) -> dict:
    top = [{"token": token, "logprob": logprob} for token, logprob in rows]
    reply["choices"][0]["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
    return reply


def _without_logprobs(reply: dict) -> dict:
    reply["choices"][0]["logprobs"] = None
    return reply


def _stall(handler: _Handler, reply: dict) -> None:
    time.sleep(1000)


def _slow(handler: _Handler, reply: dict) -> None:
    time.sleep(0.1)
    handler.send_json(reply)


def _drip(handler: _Handler, reply: dict) -> None:
    """A byte now and then: each read is quick, the whole never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def _echo(handler: _Handler, reply: dict) -> None:
    """Sends back what it was sent as authorisation, as a careless server would."""
    said = handler.headers.get("Authorization", "")
    handler.send_json({"error": {"message": f"not allowed: {said}"}}, status=500)


def _echo_answer(handler: _Handler, reply: dict) -> None:
    """The same, as an answer: neither yes nor no."""
    said = handler.headers.get("Authorization", "")
    token = {"token": said, "logprob": 0.0}
    reply["choices"][0]["logprobs"] = {"content": [token | {"top_logprobs": [token]}]}
    handler.send_json(reply)


def _escaped(text: str) -> str:
    return "".join(f"\\u{ord(letter):04x}" for letter in text)


def _echo_escaped(handler: _Handler, reply: dict) -> None:
    """As `_echo_answer`, every letter as JSON may also write it."""
    said = handler.headers.get("Authorization", "").removeprefix("Bearer ")
    rows = [{"token": "KEY", "logprob": 0.0}]
    reply["choices"][0]["logprobs"] = {"content": [rows[0] | {"top_logprobs": rows}]}
    handler.send_body(json.dumps(reply).replace("KEY", _escaped(said)).encode())


def _echo_torn(handler: _Handler, reply: dict) -> None:
    """As `_echo`, so written, in a body that is cut."""
    said = handler.headers.get("Authorization", "").removeprefix("Bearer ")
    handler.send_body(b'{"error": "not allowed: %s' % _escaped(said).encode(), status=500)


def _truncated(handler: _Handler, reply: dict) -> None:
    body = json.dumps(reply).encode()
    handler.send_body(body[: len(body) // 2])


def _cut(handler: _Handler, reply: dict) -> None:
    """Ends the connection before the promised length."""
    body = json.dumps(reply).encode()
    handler.send_body(body[: len(body) // 2], length=len(body))
    handler.close_connection = True


def _thinking(reply: dict, before: list[str], *, behind: tuple[str, ...] = (), **message) -> dict:
    """The honest answer behind tokens of thinking, as servers without a parser send it."""
    choice = reply["choices"][0]
    thought = [_sure(token) for token in before]
    answer = choice["logprobs"]["content"]
    choice["logprobs"] = {"content": [*thought, *answer, *map(_sure, behind)]}
    choice["message"] |= {"content": "".join(before) + answer[0]["token"]} | message
    return reply


def _sure(token: str) -> dict:
    """The row of a token that the model was sure of."""
    row = {"token": token, "logprob": 0.0}
    return row | {"top_logprobs": [row]}


def _parsed(reply: dict) -> dict:
    """The same from a server that has split off the thinking."""
    text = reply["choices"][0]["message"]["content"]
    message = {"content": text.strip(), "reasoning_content": "So yes or no."}
    before = ["So", " yes or", " no.", "\n\n"]
    return _thinking(reply, before, behind=("<|im_end|>",), **message)


def _cut_thinking(reply: dict) -> dict:
    """Thinking that was cut before its end."""
    reply["choices"][0]["logprobs"] = {"content": [_sure("<think>"), _sure("Yes"), _sure(" or")]}
    return reply


_THOUGHT = ["<think>", "So", " yes", " or no", ".</", "think", ">", "\n\n"]
_NEITHER = [("Maybe", math.log(0.6)), ("It", math.log(0.3))]
_NANS = [("Yes", math.nan), ("No", math.log(0.3))]
_OVERFULL = [("Yes", math.log(0.9)), ("No", math.log(0.9))]
# Sound replies, which hold the truth.
HONEST = (None, "slow", "think", "think parsed", "think twice")
FAULTS = {
    "think": lambda handler, reply: handler.send_json(_thinking(reply, _THOUGHT)),
    "think parsed": lambda handler, reply: handler.send_json(_parsed(reply)),
    "think cut": lambda handler, reply: handler.send_json(_cut_thinking(reply)),
    "think twice": lambda handler, reply: handler.send_json(
        _thinking(reply, [*_THOUGHT, "No", "</think>"])
    ),
    "think for ever": lambda handler, reply: handler.send_json(
        _with_logprobs(reply, [("<think>", math.log(0.998)), ("Yes", math.log(0.0012))])
    ),
    None: lambda handler, reply: handler.send_json(reply),
    "slow": _slow,
    "reset": lambda handler, reply: handler.abort(),
    "stall": _stall,
    "drip": _drip,
    "die": lambda handler, reply: os._exit(1),
    "429": lambda handler, reply: handler.send_json({}, status=429, Retry_After="0.1"),
    "500": lambda handler, reply: handler.send_body(b"<html>oh no</html>", status=500),
    "503": lambda handler, reply: handler.send_json({}, status=503, Retry_After="0.1"),
    "503 for long": lambda handler, reply: handler.send_json({}, status=503, Retry_After="600"),
    "400": lambda handler, reply: handler.send_json({"error": {"message": "bad"}}, status=400),
    "400 for unicorns": lambda handler, reply: handler.send_json({}, status=400),
    "405": lambda handler, reply: handler.send_json({}, status=405),
    "415": lambda handler, reply: handler.send_json({}, status=415),
    "401": lambda handler, reply: handler.send_json({"detail": "who are you"}, status=401),
    "echo": _echo,
    "echo answer": _echo_answer,
    "echo escaped": _echo_escaped,
    "echo torn": _echo_torn,
    "truncated": _truncated,
    "cut": _cut,
    "not json": lambda handler, reply: handler.send_body(b"I am fine, thanks"),
    "no logprobs": lambda handler, reply: handler.send_json(_without_logprobs(reply)),
    "nan": lambda handler, reply: handler.send_json(_with_logprobs(reply, _NANS)),
    "overfull": lambda handler, reply: handler.send_json(_with_logprobs(reply, _OVERFULL)),
    "neither": lambda handler, reply: handler.send_json(_with_logprobs(reply, _NEITHER)),
    "other request": lambda handler, reply: handler.send_json(
        reply | {"id": "chatcmpl-agrpo-" + 32 * "0"}
    ),
    "other model": lambda handler, reply: handler.send_json(reply | {"model": "parrot"}),
    "no choices": lambda handler, reply: handler.send_json(reply | {"choices": []}),
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def get_request(self):
        request = super().get_request()
        _Handler.state.connections += 1
        return request

    def handle_error(self, *_: object) -> None:
        """Connections that the client gave up are no news."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=pathlib.Path)
    options = parser.parse_args()
    _Handler.state = _State(options.log)
    with _Server(("127.0.0.1", options.port), _Handler) as server:
        sys.stdout.write(f"{server.server_address[1]}\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main()
