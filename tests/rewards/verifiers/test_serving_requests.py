"""Requests of ordinary clients: what is read, ignored, and refused by its name."""

import base64
import concurrent.futures
import io
import json

import numpy as np
import pytest
from judge_families import FAMILIES
from PIL import Image

from alphagrpo_jax.rewards.verifiers.openai import data_url
from alphagrpo_jax.rewards.verifiers.prompt_limits import PromptLimits
from alphagrpo_jax.rewards.verifiers.serving import requests as requests_lib
from alphagrpo_jax.rewards.verifiers.serving.batcher import GreedyReply, ReplyToken
from alphagrpo_jax.rewards.verifiers.serving.replies import ReplyWriter
from alphagrpo_jax.rewards.verifiers.serving.requests import (
    DEFAULT_TOKENS,
    IGNORED,
    NEUTRAL,
    RequestError,
    RequestReader,
)
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import resolve

pytestmark = pytest.mark.torch

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
URL = data_url(PIXELS)
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": "Is it red?"}


@pytest.fixture(scope="module")
def limits():
    return PromptLimits.from_folder(resolve("package:verifier"))


@pytest.fixture
def reader(limits):
    return RequestReader(limits, max_logprobs=20, max_tokens=99)


def body(*content, system=None, **fields):
    user = {"role": "user", "content": list(content) or [IMAGE, TEXT]}
    messages = [user] if system is None else [{"role": "system", "content": system}, user]
    return json.dumps({"model": "m", "messages": messages} | fields).encode()


def refused(reader, request):
    with pytest.raises(RequestError) as caught:
        reader.read(request)
    assert caught.value.status == 400
    return caught.value


def test_a_plain_request(reader):
    request, question = reader.read(body(system="Be strict.", max_tokens=1, temperature=0.0))
    assert request.model == "m"
    np.testing.assert_array_equal(question.image, PIXELS)
    assert (question.text, question.instruction) == ("Is it red?", "Be strict.")
    assert (question.max_tokens, question.single, question.prompt) == (1, True, None)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, DEFAULT_TOKENS),
        ({"max_tokens": None, "max_completion_tokens": None}, DEFAULT_TOKENS),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 8}, 8),
        ({"max_tokens": 100_000}, 99),  # of --max-tokens; finish_reason tells that it was cut
    ],
)
def test_the_length_of_a_reply(reader, fields, tokens):
    assert reader.read(body(**fields))[1].max_tokens == tokens


def test_a_reply_ends_with_the_context(limits):
    reader = RequestReader(limits, max_logprobs=20, max_tokens=10_000)
    _, question = reader.read(body(max_tokens=9999))
    assert question.max_tokens + question.prompt_tokens == limits.context_tokens == 1024


def test_a_prompt_may_fill_the_context(limits, reader, monkeypatch):
    count = reader.read(body())[1].prompt_tokens
    prompt = limits.prompt([{"type": "image"}, TEXT], "")
    monkeypatch.setattr(limits, "context_tokens", count)
    assert reader.read(body())[1].max_tokens == 1  # the prompt's last token gives it
    assert limits.check(prompt, *PIXELS.shape[:2]) == count
    monkeypatch.setattr(limits, "context_tokens", count - 1)
    assert refused(reader, body()).kind == "too_long"
    with pytest.raises(InputError, match=f"has {count} tokens .* context {count - 1};"):
        limits.check(prompt, *PIXELS.shape[:2])


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    "content",
    ["Be strict.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "strict."}]],
)
def test_instructions(reader, role, content):
    messages = [{"role": role, "content": content, "name": "x"}]
    messages.append({"role": "user", "content": [IMAGE, TEXT]})
    assert reader.read(body(messages=messages))[1].instruction == "Be strict."


def text(content):
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    ("content", "user_turn"),
    [
        ((IMAGE, TEXT), "<image>Is it red?"),
        ((TEXT, IMAGE), "Is it red?<image>"),
        ((text("Is"), text(" it?"), IMAGE), "Is it?<image>"),
        ((text("See: "), IMAGE, text("Is "), text("it?")), "See: <image>Is it?"),
        ((text(""), IMAGE, TEXT), "<image>Is it red?"),
        (({"type": "image_url", "image_url": URL}, TEXT), "<image>Is it red?"),
        (({"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, TEXT),
         "<image>Is it red?"),
    ],
)  # fmt: skip
def test_texts_and_image_keep_their_order(reader, limits, content, user_turn):
    _, question = reader.read(body(*content, max_tokens=1))
    image_first = user_turn.startswith("<image>")
    prompt = f"<|user|>{user_turn}<|assistant|>"
    assert question.prompt == (None if image_first else prompt)
    assert question.single == image_first
    assert question.prompt_tokens == limits.count(prompt, *PIXELS.shape[:2])


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_cannot_change_a_greedy_reply_is_ignored(reader, name):
    reader.read(body(**{name: "anything"}))


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_would_change_the_reply_is_refused_by_name(reader, name):
    for value in (*NEUTRAL[name], None):
        reader.read(body(**{name: value}))
    error = refused(reader, body(**{name: ["something else"]}))
    assert error.param == name
    assert str(error).startswith(f"{name}: got ['something else'], which would change the reply")


@pytest.mark.parametrize(
    "field",
    [
        {"guided_choice": ["yes", "no"]},
        {"guided_json": {}},
        {"structured_outputs": {"choice": ["yes"]}},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
        {"prompt_logprobs": 1},
        {"chat_template": "{{ x }}"},
        {"tempreature": 0},  # a slip of the pen
    ],
)
def test_unknown_fields_are_refused_by_name(reader, field):
    (name,) = field
    error = refused(reader, body(**field))
    assert (error.param, str(error)) == (name, f"{name}: not supported here; leave it out")
    reader.read(body(**{name: None}))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 0.7}, "temperature", "got 0.7, expected 0; replies are greedy here"),
        ({"temperature": -1}, "temperature", "got -1.0, expected 0"),
        ({"n": 2}, "n", "Input should be 1"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "(or give {})"),
        ({"stop": "yes"}, "stop", "got yes, which would change the reply"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "got 0.1"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "'json_schema'"),
        ({"tools": [{"type": "function"}]}, "tools", "which would change the reply"),
        ({"top_logprobs": 5}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "got 21, at most 20 are given"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"logit_bias": [[[]]] }, "logit_bias", "which would change the reply"),
        ({"stream_options": {}}, "stream_options", "needs stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options: x", "not supported here"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "yes"}]}, "messages.0.role", "'developer'"),
        ({"messages": [{"role": "user", "content": "Is it?"}]}, "messages", "got 0 images and 1"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(reader, fields, param, words):
    error = refused(reader, body(**fields))
    assert error.param == param
    assert words in str(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((TEXT,), "got 0 images and 1 texts"),
        ((IMAGE, IMAGE, TEXT), "got 2 images and 1 texts"),
        ((IMAGE,), "got 1 images and 0 texts"),
        ((IMAGE, text(" ")), "expected one image_url and a text that is not empty"),
        (({"type": "image_url"}, TEXT), "an image_url part needs image_url"),
        ((IMAGE, {"type": "text"}), "a text part needs text"),
        ((IMAGE, TEXT | {"cache_control": {}}), "messages: cache_control: not supported"),
        (({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, TEXT), "'high'"),
        (({"type": "image_url", "image_url": {"url": "http://a/b.png"}}, TEXT), "nothing is fetch"),
        (({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, TEXT),
         "not a readable image"),
        (({"type": "image_url", "image_url": {"url": "data:text/plain;base64,AAAA"}}, TEXT),
         "expected data:image/"),
        ((IMAGE, text("Is it <|assistant|>yes?")), "control tokens ['<|assistant|>']"),
        ((text("<image>"), IMAGE), "control tokens ['<image>']"),
    ],
)  # fmt: skip
def test_contents_that_no_judge_can_be_asked(reader, content, words):
    assert words in str(refused(reader, body(*content)))


@pytest.mark.parametrize(
    ("request_body", "words"),
    [
        (b"", "EOF while parsing"),
        (b"[]", "should be an object"),
        (body().replace(b"Is it", b"Is \xff it"), "invalid unicode code point"),
        (body(x=0).replace(b'"x": 0', b'"x": ' + b"[" * 5000 + b"]" * 5000), "recursion limit"),
        (body(max_tokens=7).replace(b": 7", b": " + b"9" * 5000), "out of range"),
        (body(temperature=7).replace(b": 7", b": NaN"), "temperature: got nan, expected 0"),
    ],
    ids=["empty", "no object", "not UTF-8", "deep", "long number", "NaN"],
)
def test_bodies_that_are_no_requests(reader, request_body, words):
    assert words in str(refused(reader, request_body))


def test_half_a_character_is_refused(reader):
    request = body(IMAGE, text("Is it @?")).replace(b"@", b"\\ud83d")
    assert "Invalid JSON: unexpected end of hex escape" in str(refused(reader, request))


@pytest.mark.parametrize("words", [1000, 20_000, 200_000])
def test_prompts_beyond_the_context_are_refused(reader, words):
    error = refused(reader, body(TEXT, IMAGE, text("red circle " * words)))
    assert (error.code, error.kind, error.param) == (
        "context_length_exceeded", "too_long", "messages"
    )  # fmt: skip


def test_a_large_picture_is_refused_before_it_is_decoded(reader):
    file = io.BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    message = str(refused(reader, body({"type": "image_url", "image_url": {"url": url}}, TEXT)))
    assert f"5000x5000 pixels, at most {requests_lib.MAX_PIXELS} in all" in message


def test_equal_images_are_decoded_once_and_the_memory_is_bounded(limits, monkeypatch):
    decoded = []
    original = requests_lib.images_lib.from_data_url

    def counting(url, **options):
        decoded.append(url)
        return original(url, **options)

    monkeypatch.setattr(requests_lib.images_lib, "from_data_url", counting)
    monkeypatch.setattr(requests_lib, "CACHED_BYTES", 3000)
    reader = RequestReader(limits, max_logprobs=20, max_tokens=9)
    urls = [data_url(np.full((9, 12, 3), value, np.uint8)) for value in range(12)]
    for url in (*urls, urls[-1], urls[0]):
        image = {"type": "image_url", "image_url": {"url": url}}
        _, question = reader.read(body(image, TEXT))
        assert question.image[0, 0, 0] == urls.index(url)
    assert decoded == [*urls, urls[0]]  # the last one was there still, the first one no longer


def test_many_threads_read_at_once(limits):
    reader = RequestReader(limits, max_logprobs=20, max_tokens=9)

    def read(number):
        url = data_url(np.full((5 + number % 7, 8, 3), number, np.uint8))
        image = {"type": "image_url", "image_url": {"url": url}}
        return reader.read(body(image, text(f"Are there {number} circles?")))[1]

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        questions = list(threads.map(read, range(100)))
    for number, question in enumerate(questions):
        assert question.text == f"Are there {number} circles?"
        assert question.image[0, 0, 0] == number


def test_prompts_are_those_of_the_template_whatever_the_text(limits):
    """Prompts are put together from a frame; the template must write the same."""
    for words in (
        "Is it?",
        "  blanks ",
        "{{ x }}",
        "<b> & 'q' \"d\"",
        "a\nb\n",
        "\u00e9\u4e2d",
        "\\n",
    ):
        for content in (
            [{"type": "image"}, text(words)],
            [text(words), {"type": "image"}],
            [text("x"), {"type": "image"}, text(words)],
        ):
            for instruction in ("", "Be strict.", "TEXT-0-OF-THE-TURN"):
                rendered = limits._render(content, instruction)
                assert limits.prompt(content, instruction) == rendered


class Halves:
    """A tokenizer that spells one letter by two tokens."""

    all_special_ids = (9,)

    def decode(self, ids, skip_special_tokens=False):
        raw = b"".join({1: b"a", 2: b"\xc3", 3: b"\xa9", 9: b""}[index] for index in ids)
        return raw.decode(errors="replace")


def test_pieces_of_a_stream_never_hold_half_a_letter():
    ids = [1, 2, 3, 1, 9]
    assert ReplyWriter(Halves())._pieces(ids) == ["a", "", "\u00e9", "a", ""]


def test_how_a_reply_ended(reader):
    request, question = reader.read(body(max_tokens=2))
    writer = ReplyWriter(Halves())

    def finish(*ids):
        reply = GreedyReply(tuple(ReplyToken(index, -0.5, ()) for index in ids))
        return writer.completion(request, question, reply, "x")["choices"][0]["finish_reason"]

    assert (finish(1), finish(1, 1), finish(1, 9)) == ("stop", "length", "stop")


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (4, 900)])
def test_an_image_that_the_processor_refuses_is_a_bad_request(shape):
    """Qwen-VL takes no image that is 200 times as long as it is wide."""
    judge = FAMILIES["qwen2_vl"]()
    limits = PromptLimits(judge.processor, judge.model.config)
    reader = RequestReader(limits, max_logprobs=20, max_tokens=99)
    image = {"type": "image_url", "image_url": {"url": data_url(np.zeros((*shape, 3), np.uint8))}}
    error = refused(reader, body(image, TEXT))
    assert f"refuses the image of {shape[1]}x{shape[0]} pixels" in str(error)
    assert error.param == "messages"
