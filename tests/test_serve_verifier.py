"""The server as users start it: a process of its own, over the shipped verifier."""

import asyncio
import base64
import contextlib
import functools
import io
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import httpx2
import numpy as np
import openai as official
import pytest
from PIL import Image

from alphagrpo_jax import serve_verifier
from alphagrpo_jax.rewards.verifiers import openai
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.rewards.verifiers.instructions import AUDIT_INSTRUCTION, RATE_INSTRUCTION
from alphagrpo_jax.rewards.verifiers.openai import OpenAIVerifier
from alphagrpo_jax.rewards.verifiers.serving import batcher as batcher_lib
from alphagrpo_jax.rewards.verifiers.serving.batcher import Batcher, reply_tokens
from alphagrpo_jax.rewards.verifiers.serving.requests import (
    DEFAULT_TOKENS,
    IGNORED,
    NEUTRAL,
    ChatRequest,
    ImageQuestion,
    RequestError,
)
from alphagrpo_jax.runtime import images as images_lib
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import resolve

pytestmark = pytest.mark.torch

QUESTIONS = ["Is there a red circle?", "Are there exactly two squares?", "Is the background white?"]
KEY = "sk-serve-0123456789"


COMMAND = [sys.executable, "-m", "alphagrpo_jax.serve_verifier", "--model", "package:verifier"]


def start(*arguments, **variables):
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--threads", "1", *arguments],
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


def test_bad_requests_are_explained_as_the_protocol_does(url):
    for body, words, param in (
        (b"{", "the body: Invalid JSON", None),
        ({"temperature": 0.7}, "temperature: got 0.7, expected 0", "temperature"),
        ({"guided_choice": ["yes"]}, "guided_choice: not supported here", "guided_choice"),
        ({"top_logprobs": 5}, "top_logprobs needs logprobs", "top_logprobs"),
    ):
        reply = ask(url, body)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert words in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_a_long_prompt_is_refused_at_once_and_holds_nobody_up(url, images):
    """20,000 words kept the model busy for minutes; others are answered meanwhile."""
    image = openai.data_url(images[1])
    messages = openai.messages(image, "Is it red? " * 10_000, AUDIT_INSTRUCTION)
    reply = ask(url, {"messages": messages})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "and the model's context 1024" in error["message"]
    assert ask(url, {}).status_code == 200


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
    assert wrong.json()["error"]["code"] == "model_not_found"
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(trust_env=False, headers=headers) as client:
        row = client.get(f"{url}/models/verifier").json()
        assert client.get(f"{url}/models").json()["data"] == [row]
        missing = client.get(f"{url}/models/ORG/other")
    assert (row["id"], row["object"]) == ("verifier", "model")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "invalid_request_error"
    assert httpx2.get(f"{url}/models/verifier", trust_env=False).status_code == 401


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


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda n: n.name,
)
def test_a_signal_ends_it_in_order(number):
    process, url = start()
    assert ask(url, {}).status_code == 200
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("Traceback")) == (0, 0), errors


@pytest.mark.slow
def test_a_signal_ends_it_while_its_model_stalls():
    process, url = start("--max-wait", "0.1")
    model = model_process_of(process.pid)
    os.kill(model, signal.SIGSTOP)

    replies = []

    def wait_in_vain() -> None:
        with contextlib.suppress(httpx2.HTTPError):
            replies.append(ask(url, {}).status_code)

    client = threading.Thread(target=wait_in_vain, daemon=True)
    client.start()
    root = url.removesuffix("/v1")
    while httpx2.get(f"{root}/health", trust_env=False, timeout=60).status_code != 503:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.count("Traceback")) == (0, 0), errors
    assert "the model's process ended" not in errors
    client.join(60)
    assert replies in ([503], [])  # or the connection is closed


@pytest.mark.slow
def test_ctrl_c_while_it_loads_ends_it_in_one_line():
    """Ctrl-C in a terminal reaches the model's process too, in the middle of its imports."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not model_processes_of(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        maps = pathlib.Path(f"/proc/{model_process_of(process.pid)}/maps")
        while "numpy" not in maps.read_text():  # in the middle of its imports
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (1, "error: interrupted\n")
    finally:
        process.kill()
        process.communicate()


def test_clients_are_accepted_as_soon_as_its_address_is_printed(capsys, monkeypatch):
    """Before uvicorn has begun, which a busy machine may delay by seconds."""
    addresses = []

    def run_server(sockets):
        address = sockets[0].getsockname()
        assert f"serving verifier on http://127.0.0.1:{address[1]}/v1" in capsys.readouterr().out
        socket.create_connection(address, timeout=60).close()
        addresses.append(address)

    # Its real Config closes all handlers of the process's logging, pytest's streams with them.
    uvicorn = mock.MagicMock(Config=lambda *_, **options: mock.Mock(backlog=5))
    uvicorn.Server.return_value.run = run_server
    monkeypatch.setattr(serve_verifier, "uvicorn", uvicorn)
    monkeypatch.setattr(serve_verifier, "ModelProcess", mock.MagicMock())
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests' handlers stay
    assert serve_verifier.main(["--model", "package:verifier", "--port", "0"]) == 0
    assert len(addresses) == 1


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


def client_of(url, kind=official.OpenAI):
    return kind(base_url=url, api_key=KEY, max_retries=0, timeout=60)


def turns(url, text, *, role="system", image_first=True):
    """A chat as the official client takes it."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [
        {"role": role, "content": AUDIT_INSTRUCTION},
        {"role": "user", "content": content if image_first else content[::-1]},
    ]


ONE_TOKEN = {"model": "verifier", "max_tokens": 1, "temperature": 0, "logprobs": True}


def p_yes(choice):
    """P(yes) among the first token's candidates, as the official client shows them."""
    mass = {"yes": 0.0, "no": 0.0}
    for candidate in choice.logprobs.content[0].top_logprobs:
        mass[candidate.token.strip().lower()] = math.exp(candidate.logprob)
    return mass["yes"] / (mass["yes"] + mass["no"])


def test_the_official_client(url, few, images):
    client, image = client_of(url), openai.data_url(images[1])
    assert [model.id for model in client.models.list()] == ["verifier"]
    assert client.models.retrieve("verifier").id == "verifier"
    with pytest.raises(official.NotFoundError) as missing:
        client.models.retrieve("other")
    assert missing.value.code == "model_not_found"
    for role in ("system", "developer"):
        reply = client.chat.completions.create(
            messages=turns(image, QUESTIONS[0], role=role), top_logprobs=5, seed=1, user="me",
            metadata={"run": "7"}, store=False, top_p=0.9, **ONE_TOKEN
        )  # fmt: skip
        (expected,) = few.answer(images[1], QUESTIONS[:1])
        assert p_yes(reply.choices[0]) == pytest.approx(expected.p_yes, abs=1e-5)
    inputs = few.processor(
        text=[few.passes.prompter.prompt(QUESTIONS[0], AUDIT_INSTRUCTION)], images=[[images[1]]]
    )
    usage = reply.usage
    assert usage.prompt_tokens == len(inputs["input_ids"][0])
    assert (usage.completion_tokens, usage.total_tokens) == (1, usage.prompt_tokens + 1)
    with pytest.raises(official.BadRequestError, match="response_format: got") as refused:
        client.chat.completions.create(
            messages=turns(image, QUESTIONS[0]),
            response_format={"type": "json_object"},
            **ONE_TOKEN,
        )
    assert refused.value.param == "response_format"


def test_the_official_client_asynchronously(url, few, images):
    async def ask_all():
        async with client_of(url, official.AsyncOpenAI) as client:
            requests = (
                client.chat.completions.create(
                    messages=turns(openai.data_url(image), text), top_logprobs=5, **ONE_TOKEN
                )
                for image in images
                for text in QUESTIONS * 6
            )
            return await asyncio.gather(*requests)

    replies = asyncio.run(ask_all())
    expected = [answer for image in images for answer in few.answer(image, QUESTIONS) * 6]
    for reply, answer in zip(replies, expected, strict=True):
        assert p_yes(reply.choices[0]) == pytest.approx(answer.p_yes, abs=1e-5)


def test_a_stream_is_the_whole_reply_in_pieces(url, images):
    client = client_of(url)
    options = {"messages": turns(openai.data_url(images[0]), QUESTIONS[1]), "model": "verifier",
               "max_tokens": 5, "logprobs": True, "top_logprobs": 3}  # fmt: skip
    complete = client.chat.completions.create(**options)
    stream = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    )
    *chunks, last = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        complete.choices[0].message.content
    )
    tokens = [
        token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content
    ]
    assert [token.model_dump() for token in tokens] == [
        token.model_dump() for token in complete.choices[0].logprobs.content
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    finishes = [c.choices[0].finish_reason for c in chunks]
    assert finishes == [None] * (len(chunks) - 1) + [complete.choices[0].finish_reason]
    assert all(c.usage is None for c in chunks)
    assert (last.choices, last.usage) == ([], complete.usage)
    plain = ask(url, {"stream": True, "logprobs": None})
    assert plain.headers["content-type"].startswith("text/event-stream")
    lines = plain.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-2])
    assert not any("usage" in line for line in lines)
    refused = ask(url, {"stream": True, "n": 2})
    assert (refused.status_code, refused.headers["content-type"]) == (400, "application/json")


def test_the_model_gets_text_and_image_in_the_clients_order(url, direct, images):
    client, image = client_of(url), openai.data_url(images[1])
    probabilities = {}
    for image_first in (True, False):
        reply = client.chat.completions.create(
            messages=turns(image, QUESTIONS[0], image_first=image_first),
            top_logprobs=5,
            **ONE_TOKEN,
        )
        content = turns("", QUESTIONS[0], image_first=image_first)[1]["content"]
        content = [{"type": "image"} if "image_url" in item else item for item in content]
        prompt = direct.passes.prompter.prompt_of(content, AUDIT_INSTRUCTION)
        _, logits = direct.reply(images[1], prompt, 1)
        (token,) = reply_tokens(logits.argmax(-1), logits, 5)
        first = reply.choices[0].logprobs.content[0]
        assert first.logprob == pytest.approx(token.logprob, abs=1e-5)
        probabilities[image_first] = first.logprob
    assert probabilities[True] != probabilities[False]


def test_a_reply_without_a_limit_is_short(url):
    reply = ask(url, {"max_tokens": None}).json()
    assert 1 <= reply["usage"]["completion_tokens"] <= DEFAULT_TOKENS


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def image_files():
    """Files that a careless reader gets wrong, each with another picture."""
    rng = np.random.default_rng(5)
    noise = Image.fromarray(rng.integers(0, 256, (24, 40, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    hidden = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    hidden.paste((200, 0, 0, 255), (8, 8, 30, 30))
    deep = Image.fromarray((rng.integers(0, 256, (20, 20)) * 256).astype(np.uint16))
    return {
        "exif": encoded(noise, "JPEG", exif=exif),
        "alpha": encoded(hidden, "PNG"),
        "palette": encoded(hidden.convert("P"), "PNG", transparency=0),
        "16 bits": encoded(deep, "PNG"),
        "cmyk": encoded(noise.convert("CMYK"), "JPEG"),
        "grey": encoded(noise.convert("L"), "PNG"),
        "tiff": encoded(noise, "TIFF"),
        "thin": encoded(noise.crop((0, 0, 40, 3)), "PNG"),
    }


@pytest.mark.parametrize("name", image_files())
def test_images_are_read_as_score_reads_them(url, few, tmp_path, name):
    contents = image_files()[name]
    (tmp_path / "image").write_bytes(contents)
    pixels = np.asarray(images_lib.open_rgb(tmp_path / "image"))  # as score does
    (expected,) = few.answer(pixels, QUESTIONS[2:])
    address = "data:image/jpg;base64," + base64.b64encode(contents).decode()
    reply = client_of(url).chat.completions.create(
        messages=turns(address, QUESTIONS[2]), top_logprobs=5, **ONE_TOKEN
    )
    assert p_yes(reply.choices[0]) == pytest.approx(expected.p_yes, abs=1e-5)


def test_fields_that_are_null_count_as_left_out(url):
    names = {*IGNORED, *NEUTRAL, *ChatRequest.model_fields} - {"model", "messages", "max_tokens"}
    reply = ask(url, dict.fromkeys(names))
    assert reply.status_code == 200, reply.text


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


def answer_by(model):
    return functools.partial(batcher_lib.answer, model)


def question(text, group="a"):
    image = np.zeros((1, 1, 3), np.uint8)
    return ImageQuestion(image, text, "", None, len(text), 1, 2, group)


def test_batches_hold_one_image_and_a_bad_question_fails_alone():
    async def scenario():
        model = Blocked()
        batcher = Batcher(
            functools.partial(batcher_lib.answer, model), max_batch=3, max_queue=9, seconds=60.0
        )
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
    assert isinstance(outcomes[2], RequestError)
    assert outcomes[2].status == 400
    for (text, _), outcome in zip([("one", 0), ("three", 0)], outcomes[:2], strict=True):
        assert outcome.ids == [0]
        (token,) = outcome.tokens
        expected = float(len(text)) - math.log(math.exp(len(text)) + 1.0)
        assert token.logprob == pytest.approx(expected, abs=1e-6)
        assert token.top[0] == (0, token.logprob)
        assert len(token.top) == 2
    assert exploded.status == 500
    assert "out of memory" in str(exploded)


def test_health_says_when_a_pass_does_not_end():
    async def scenario():
        model = Blocked()
        batcher = Batcher(
            functools.partial(batcher_lib.answer, model), max_batch=1, max_queue=9, seconds=0.05
        )
        service = serve_verifier.Service(None, batcher, None, name="blocked", key="")
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


def test_waiting_questions_are_refused_in_time_while_a_pass_does_not_end():
    async def scenario():
        model = Blocked()
        batcher = Batcher(answer_by(model), max_batch=1, max_queue=9, seconds=0.05)
        running = asyncio.create_task(batcher.run())
        taken = asyncio.create_task(batcher.ask(question("taken")))
        while batcher._started is None:
            await asyncio.sleep(0.005)
        late = asyncio.gather(*(batcher.ask(question(t)) for t in "ab"), return_exceptions=True)
        errors = await asyncio.wait_for(late, 20)
        waiting = len(batcher)
        assert not taken.done()
        model.go.set()
        await taken
        reply = await batcher.ask(question("after"))
        running.cancel()
        return errors, waiting, reply, model.batches

    errors, waiting, reply, batches = asyncio.run(scenario())
    assert [(error.status, error.kind) for error in errors] == [(503, "late")] * 2
    assert (waiting, reply.ids) == (0, [0])
    assert batches == [["taken"], ["after"]]


def test_a_full_queue_and_a_long_wait_are_refused():
    async def scenario():
        model = Blocked()
        batcher = Batcher(
            functools.partial(batcher_lib.answer, model), max_batch=1, max_queue=2, seconds=0.0
        )
        waiting = [asyncio.create_task(batcher.ask(question(str(n)))) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="2 questions wait already") as full:
            await batcher.ask(question("more"))
        running = asyncio.create_task(batcher.run())
        late = await asyncio.gather(*waiting, return_exceptions=True)
        running.cancel()
        return full.value, late

    full, late = asyncio.run(scenario())
    assert (full.status, full.kind) == (503, "busy")
    assert [(error.status, error.kind) for error in late] == [(503, "late")] * 2
    assert serve_verifier._error_reply(full).headers["retry-after"] == "1"


def model_processes_of(pid):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def model_process_of(pid):
    (model,) = model_processes_of(pid)
    return model


@pytest.mark.slow
def test_a_server_whose_model_has_died_ends():
    process, url = start()
    try:
        os.kill(model_process_of(process.pid), signal.SIGKILL)
        with pytest.raises(httpx2.TransportError):
            ask(url, {})
        assert process.wait(30) == 1
        assert "the model's process ended with code -9: the server ends" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_is_no_verifier_is_refused_in_one_line(tmp_path):
    command = [sys.executable, "-m", "alphagrpo_jax.serve_verifier", "--model", str(tmp_path)]
    ended = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert str(tmp_path) in ended.stderr
