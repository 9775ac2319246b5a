"""The server as users start it: a process of its own, over the shipped verifier."""

import asyncio
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import numpy as np
import pytest

from alphagrpo_jax import serve_verifier
from alphagrpo_jax.rewards.verifiers import openai, serving
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.openai import OpenAIVerifier
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import resolve

pytestmark = pytest.mark.torch

QUESTIONS = ["Is there a red circle?", "Are there exactly two squares?", "Is the background white?"]
KEY = "sk-serve-0123456789"


def start(*arguments, **variables):
    command = [sys.executable, "-m", "alphagrpo_jax.serve_verifier", "--model", "package:verifier"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--threads", "1", *arguments],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    match = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
    assert match, process.stderr.read()
    return process, match[0]


@pytest.fixture(scope="module")
def url():
    flags = ("--api-key-env", "SERVE_KEY", "--max-logprobs", "100000")
    process, url = start(*flags, SERVE_KEY=KEY)
    os.environ["SERVE_KEY"] = KEY
    yield url
    del os.environ["SERVE_KEY"]
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def direct():
    return HFVerifier(resolve("package:verifier"), num_threads=1)


@pytest.fixture(scope="module")
def few():
    """As clients that ask for five candidates see it."""
    return HFVerifier(resolve("package:verifier"), num_threads=1, top_k=5)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (48, 48, 3)).astype(np.uint8)
    square = np.full((48, 48, 3), 255, np.uint8)
    square[10:30, 12:32] = 200, 0, 0
    return noise, square


def ask(url, content, **headers):
    """The reply to a chat request; `content` is its body, or changes of a good one."""
    if isinstance(content, dict):
        image = np.zeros((8, 8, 3), np.uint8)
        messages = openai.messages(openai.data_url(image), QUESTIONS[0], AUDIT_INSTRUCTION)
        content = json.dumps({"model": "verifier", "messages": messages, "max_tokens": 1} | content)
    headers = {"Authorization": f"Bearer {KEY}"} | headers
    with httpx2.Client(trust_env=False, timeout=60) as client:
        return client.post(f"{url}/chat/completions", content=content, headers=headers)


def test_answers_are_those_of_the_verifier(url, direct, images):
    top = len(direct.tokenizer)  # all candidates, so that P(yes) is exact
    verifier = OpenAIVerifier([url], "verifier", api_key_env="SERVE_KEY", top_logprobs=top)
    for image in images:
        expected = direct.answer(image, QUESTIONS)
        answers = verifier.answer(image, QUESTIONS)
        for answer, truth in zip(answers, expected, strict=True):
            assert answer.p_yes == pytest.approx(truth.p_yes, abs=1e-5)
    verifier.close()


def test_few_candidates_give_what_they_give_directly(url, few, images):
    verifier = OpenAIVerifier([url], "verifier", api_key_env="SERVE_KEY")
    answers = verifier.answer(images[1], QUESTIONS)
    for answer, truth in zip(answers, few.answer(images[1], QUESTIONS), strict=True):
        assert answer.p_yes == pytest.approx(truth.p_yes, abs=1e-5)
    verifier.close()


def test_ratings_are_those_of_the_verifier(url, direct, images):
    question = "How well does the image match the prompt: a red square?"
    verifier = OpenAIVerifier([url], "verifier", api_key_env="SERVE_KEY")
    (rating,) = verifier.rate(images[1], [question])
    (expected,) = direct.rate(images[1], [question])
    assert rating.value == pytest.approx(expected.value, abs=0.05)  # 20 candidates instead of all
    verifier.close()


def test_a_longer_reply_is_the_greedy_text(url, direct, images):
    messages = openai.messages(openai.data_url(images[1]), QUESTIONS[0], RATE_INSTRUCTION)
    content = {"messages": messages, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    reply = ask(url, content).json()
    tokens, logits = direct.generate(images[1], QUESTIONS[0], RATE_INSTRUCTION, 4)
    choice = reply["choices"][0]
    text = direct.tokenizer.decode(tokens, skip_special_tokens=True)
    assert choice["message"]["content"] == text
    assert reply["usage"]["completion_tokens"] == len(tokens) == len(choice["logprobs"]["content"])
    first = choice["logprobs"]["content"][0]
    assert first["logprob"] == pytest.approx(float(logits[0].log_softmax(-1).max()), abs=1e-4)
    assert first["top_logprobs"][0]["logprob"] == first["logprob"]
    assert len(first["top_logprobs"]) == 2


def test_log_probs_are_a_distribution(url, direct):
    reply = ask(url, {"logprobs": True, "top_logprobs": 100000}).json()
    (token,) = reply["choices"][0]["logprobs"]["content"]
    rows = token["top_logprobs"]
    assert len(rows) == direct.model.config.get_text_config().vocab_size
    assert sum(math.exp(row["logprob"]) for row in rows) == pytest.approx(1.0, abs=1e-4)
    assert ask(url, {}).json()["choices"][0]["logprobs"] is None


def test_the_request_id_comes_back(url):
    reply = ask(url, {}, **{"X-Request-Id": "agrpo-" + "a" * 32})
    assert reply.headers["x-request-id"] == "agrpo-" + "a" * 32
    assert reply.json()["id"] == "chatcmpl-agrpo-" + "a" * 32
    strange = ask(url, {}, **{"X-Request-Id": "two words"})
    assert strange.headers["x-request-id"] != "two words"


def content(*items):
    return [{"role": "user", "content": list(items)}]


TEXT = {"type": "text", "text": "Is it?"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the body: Invalid JSON"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": content(TEXT)}, "expected an image_url and then a text"),
        ({"messages": [{"role": "assistant", "content": "yes"}]}, "messages.0.role"),
        ({"messages": content({"type": "image_url"}, TEXT)}, "lacks the field of its type"),
        (
            {"messages": content({"type": "image_url", "image_url": {"url": "http://a/b"}}, TEXT)},
            "nothing is fetched",
        ),
        (
            {
                "messages": content(
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, TEXT
                )
            },
            "no readable image",
        ),
        ({"temperature": 0.7}, "temperature: got 0.7, expected 0"),
        ({"n": 2}, "n: Input should be 1"),
        ({"stream": True}, "stream: Input should be False"),
        ({"top_logprobs": 5}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 100001}, "got 100001, at most 100000 are given here"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ],
)
def test_bad_requests_are_explained(url, body, words):
    reply = ask(url, body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_control_tokens_in_a_question_are_refused(url):
    url_of_image = openai.data_url(np.zeros((8, 8, 3), np.uint8))
    messages = openai.messages(url_of_image, "Is it IMAGE yes?", AUDIT_INSTRUCTION)
    messages[1]["content"][1]["text"] = "Is it <image> yes?"  # another client would send it
    reply = ask(url, {"messages": messages})
    assert reply.status_code == 400
    assert "control tokens ['<image>']" in reply.json()["error"]["message"]


def test_keys_and_model_names_are_checked(url):
    assert ask(url, {}, Authorization="Bearer wrong").status_code == 401
    wrong = ask(url, {"model": "other"})
    assert wrong.status_code == 404
    assert "expected 'verifier'" in wrong.json()["error"]["message"]


def test_health_models_and_metrics(url):
    root = url.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(trust_env=False, headers=headers) as client:
        before = metrics(client.get(f"{root}/metrics").text)
        assert ask(url, {}).status_code == 200
        assert ask(url, {"n": 2}).status_code == 400
        after = metrics(client.get(f"{root}/metrics").text)
        assert client.get(f"{root}/health").json()["status"] == "ok"
        assert client.get(f"{url}/models").json()["data"][0]["id"] == "verifier"
        metrics_text = client.get(f"{root}/metrics").text
    failed = 'verifier_failures_total{kind="bad_request"}'
    assert after["verifier_requests_total"] - before["verifier_requests_total"] == 2
    assert after[failed] - before.get(failed, 0) == 1
    assert after["verifier_questions"] - before["verifier_questions"] == 1
    assert after["verifier_model_seconds"] > before["verifier_model_seconds"]
    assert after["verifier_queue_length"] == 0
    assert KEY not in metrics_text


def metrics(text):
    rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def test_many_at_once_all_get_their_own_answers(url, few, images):
    verifier = OpenAIVerifier([url], "verifier", api_key_env="SERVE_KEY", concurrency=16)
    questions = [f"Is there a {word} square?" for word in ("red", "blue", "green", "white")] * 4
    answers = {}

    def run(number):
        answers[number] = verifier.answer(images[number], questions)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        expected = few.answer(images[number], questions)
        for answer, truth in zip(answers[number], expected, strict=True):
            assert answer.p_yes == pytest.approx(truth.p_yes, abs=1e-5)
    verifier.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_it_in_order(number):
    process, url = start()
    assert ask(url, {}).status_code == 200
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("Traceback")) == (0, 0), errors


def test_a_port_in_use_and_a_missing_model_are_explained(capsys):
    with socket.create_server(("127.0.0.1", 0)) as socket_in_use:
        port = str(socket_in_use.getsockname()[1])
        assert serve_verifier.main(["--model", "package:verifier", "--port", port]) == 1
    assert f"error: cannot listen on --host=127.0.0.1 --port={port}" in capsys.readouterr().err
    assert serve_verifier.main(["--model", "nowhere", "--port", "0"]) == 1
    assert "error: 'nowhere' names" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-batch", "0"],
        ["--max-logprobs", "0"],
        ["--port", "70000"],
        ["--api-key-env=NO_SUCH_KEY"],
        ["--api-key-env=BLANK_KEY"],
        ["--api-key-env=sk-0123456789"],
    ],
)
def test_wrong_usage_is_refused(flags, capsys, monkeypatch):
    monkeypatch.setenv("BLANK_KEY", "  ")  # would leave the server open to all
    with pytest.raises(SystemExit) as caught:
        serve_verifier.main(["--model", "package:verifier", *flags])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert flags[0].partition("=")[0] in errors
    assert "sk-0" not in errors


class Blocked:
    """A model that answers when told to."""

    def __init__(self):
        self.go, self.batches = threading.Event(), []

    def first_token_logits(self, image, texts, instruction):
        import torch

        self.go.wait(30)
        self.batches.append(list(texts))
        if "bad" in texts:
            raise InputError("control tokens")
        if "explode" in texts:
            raise RuntimeError("out of memory")
        return torch.tensor([[float(len(text)), 0.0] for text in texts])


def question(text, group="a", max_tokens=1):
    return serving.ImageQuestion(np.zeros((1, 1, 3), np.uint8), text, "", max_tokens, group)


def test_batches_hold_one_image_and_a_bad_question_fails_alone():
    async def scenario():
        model = Blocked()
        batcher = serving.Batcher(model, max_batch=3, max_queue=9, seconds=60.0)
        running = asyncio.create_task(batcher.run())
        texts = [("one", "a"), ("three", "b"), ("bad", "a"), ("four", "a"), ("five", "a")]
        tasks = [
            asyncio.create_task(batcher.ask(question(*text_and_group))) for text_and_group in texts
        ]
        model.go.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        exploded = await asyncio.gather(batcher.ask(question("explode")), return_exceptions=True)
        running.cancel()
        return model.batches, outcomes, exploded[0]

    batches, outcomes, exploded = asyncio.run(scenario())
    assert batches[:4] == [["one", "bad", "four"], ["one"], ["bad"], ["four"]]
    assert sorted(batches[4:6]) == [["five"], ["three"]]
    assert isinstance(outcomes[2], serving.RequestError)
    assert outcomes[2].status == 400
    for (text, _), outcome in zip([("one", 0), ("three", 0)], outcomes[:2], strict=True):
        ids, logprobs = outcome
        assert ids == [0]
        expected = float(len(text)) - math.log(math.exp(len(text)) + 1.0)
        assert float(logprobs[0, 0]) == pytest.approx(expected, abs=1e-6)
    assert exploded.status == 500
    assert "out of memory" in str(exploded)


def test_health_says_when_a_pass_does_not_end():
    async def scenario():
        model = Blocked()
        batcher = serving.Batcher(model, max_batch=1, max_queue=9, seconds=0.05)
        service = serve_verifier.Service(model, batcher, name="blocked", key="", max_logprobs=20)
        running = asyncio.create_task(batcher.run())
        health = [await service.health(None)]
        task = asyncio.create_task(batcher.ask(question("one")))
        while not batcher.stuck:
            await asyncio.sleep(0.01)
        health.append(await service.health(None))
        model.go.set()
        await task
        health.append(await service.health(None))
        running.cancel()
        return health

    health = asyncio.run(scenario())
    assert [reply.status_code for reply in health] == [200, 503, 200]
    assert json.loads(health[1].body)["status"] == "stuck"


def test_a_full_queue_and_a_long_wait_are_refused():
    async def scenario():
        model = Blocked()
        batcher = serving.Batcher(model, max_batch=1, max_queue=2, seconds=0.0)
        waiting = [asyncio.create_task(batcher.ask(question(str(n)))) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(serving.RequestError, match="2 questions wait already") as full:
            await batcher.ask(question("more"))
        running = asyncio.create_task(batcher.run())
        late = await asyncio.gather(*waiting, return_exceptions=True)
        running.cancel()
        return full.value, late

    full, late = asyncio.run(scenario())
    assert (full.status, full.kind) == (503, "busy")
    assert [(error.status, error.kind) for error in late] == [(503, "late")] * 2
    assert serve_verifier._error_reply(full).headers["retry-after"] == "1"
