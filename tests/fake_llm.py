"""A language model for tests of the decomposer: it obeys the stages' forms, or a script instead.

Every word of a prompt is an entity; what a test wants otherwise (replies of the wrong form,
verdicts, failures, waiting) is said by a hook. `serve` puts it behind an OpenAI-compatible
loopback server.
"""

import collections
import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alphagrpo_jax.decomposition import texts
from alphagrpo_jax.rewards.verifiers.chat import base
from alphagrpo_jax.rewards.verifiers.chat.control_tokens import CONTROL

# Takes the stage's name, its data and how often it was asked for this prompt (from 1). Returns the
# reply, or None for the rule's.
Hook = Callable[[str, dict[str, Any], int], str | dict | None]
# The questions of a record.
FIELDS = {
    "semantic_questions": [
        {"question_type": "semantic", "question": "Is it?", "is_valid": True, "tag": "Existence"}
    ],
    "quality_questions": [
        {"question_type": "quality", "question": "Is it fine?", "is_valid": True, "tag": "Texture"}
    ],
}
STAGE_OF = {stage.instruction: stage.name for stage in texts.STAGES}


def data_of(messages: Sequence[base.Message]) -> dict[str, Any]:
    """The data of a stage's chat, the way it was passed: after the worked example."""
    body = messages[3]["content"]
    assert body.startswith("<data>\n")
    assert body.endswith("\n</data>")
    return json.loads(body[len("<data>\n") : -len("\n</data>")])


class FakeModel:
    """Replies to stages; remembers what it was asked. May be called by many threads."""

    def __init__(self, hook: Hook = lambda *_: None) -> None:
        self.hook = hook
        self.asked: list[tuple[str, str]] = []  # (stage, prompt)
        self.chats: list[list[base.Message]] = []
        self.formats: list[dict[str, Any] | None] = []  # response_format of served requests
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._lock = threading.Lock()

    def complete(self, messages: Sequence[base.Message], form: Any = None) -> str:
        stage, data = STAGE_OF[messages[0]["content"]], data_of(messages)
        with self._lock:
            self.asked.append((stage, data["prompt"]))
            self.chats.append(list(messages))
            self._counts[stage, data["prompt"]] += 1
            number = self._counts[stage, data["prompt"]]
        reply = self.hook(stage, data, number)
        reply = RULES[stage](data) if reply is None else reply
        return reply if isinstance(reply, str) else json.dumps(reply)

    def prompts(self, stage: str) -> list[str]:
        """Prompts that a stage was asked for, in order."""
        return [prompt for name, prompt in self.asked if name == stage]


def _tuples(data: dict) -> dict:
    words = list(dict.fromkeys(data["prompt"].lower().split()))
    return {
        "tuples": [
            {"id": n, "category": "entity", "detail": "whole", "arguments": [word]}
            for n, word in enumerate(words, start=1)
        ]
    }


def _questions(data: dict) -> dict:
    names = {fact["id"]: fact["tuple"].split("(")[1].rstrip(")") for fact in data["tuples"]}
    names = {n: CONTROL.sub("", name) for n, name in names.items()}  # which no question may hold
    return {"questions": [{"id": n, "question": f"Is there a {w}?"} for n, w in names.items()]}


def _dependencies(data: dict) -> dict:
    ids = [question["id"] for question in data["questions"]]
    return {"dependencies": [{"id": n, "parents": ids[:1] if n != ids[0] else []} for n in ids]}


def verdicts(data: dict, *names: str, wrong: dict[int, str] | None = None) -> dict:
    """Verdicts of a check: all true, but for what `wrong` names by id."""
    wrong = wrong or {}
    return {
        "verdicts": [
            {"id": question["id"], "reason": "as told"}
            | {name: wrong.get(question["id"]) != name for name in names}
            for question in data["questions"]
        ]
    }


SEMANTIC_CHECKS = ("necessary", "unambiguous", "requested", "positive")
QUALITY_CHECKS = ("one_aspect", "adds_nothing", "positive")
RULES: dict[str, Callable[[dict], dict]] = {
    "tuples": _tuples,
    "questions": _questions,
    "dependencies": _dependencies,
    "validation": lambda data: verdicts(data, *SEMANTIC_CHECKS),
    "tags": lambda data: {
        "tags": [{"id": question["id"], "tag": "Existence"} for question in data["questions"]]
    },
    "quality": lambda data: {
        "questions": [
            {"question": "Is everything well formed?", "tag": "Geometry"},
            {"question": "Is the light even?", "tag": "Lighting"},
        ]
    },
    "quality_validation": lambda data: verdicts(data, *QUALITY_CHECKS),
}


@contextlib.contextmanager
def serve(model: FakeModel, *, key: str = "") -> Iterator[str]:
    """The base URL of a loopback server of the model; it refuses other keys, if one is given."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every reply waits for an acknowledgement

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if key and self.headers["Authorization"] != f"Bearer {key}":
                return self._send(401, {"error": {"message": "wrong key"}})
            request = json.loads(body)
            text = model.complete(request["messages"])
            model.formats.append(request.get("response_format"))
            if text.startswith("HTTP "):
                return self._send(
                    int(text.removeprefix("HTTP ")), {"error": {"message": "told so"}}
                )
            reason = "length" if text == "CUT" else "stop"
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": reason}
            return self._send(
                200, {"id": "x", "model": request["model"], "choices": [choice], "usage": {}}
            )

        def _send(self, status: int, fields: dict) -> None:
            content = json.dumps(fields).encode()
            with contextlib.suppress(ConnectionError):  # the client may have been killed
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keeps the output of the tests clean."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients may be killed in the middle of a request
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
