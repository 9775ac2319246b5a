"""Replies of every odd form: each is read rightly, or refused with a stated failure."""

import copy
import json
import math
import random

import pytest

from alphagrpo_jax.rewards.verifiers import openai
from alphagrpo_jax.rewards.verifiers.chat import replies
from alphagrpo_jax.rewards.verifiers.chat.errors import chat_error
from alphagrpo_jax.rewards.verifiers.chat.replies import ChatReplyError
from alphagrpo_jax.rewards.verifiers.chat.transport import seconds_of
from alphagrpo_jax.rewards.verifiers.spelling import THINKING_TAGS

ID = "agrpo-" + 32 * "a"
MUTATIONS = 3000
DEEP = 200
ODD = (
    None, True, False, 0, -1, 1, 10**400, -(10**400), 1e308, -1e308, float("nan"), float("inf"),
    -float("inf"), "", "Yes", "\ud800", "x" * 1000, [], {}, [[]], [None], {"": None}, [{}],
    {"content": []}, {"top_logprobs": None}, {"token": []},
)  # fmt: skip


def row(token, probability):
    return {"token": token, "logprob": math.log(probability), "bytes": [*token.encode()]}


def sure(token):
    return row(token, 1.0) | {"top_logprobs": [row(token, 1.0)]}


def answer(p_yes=0.75):
    candidates = [row("Yes", 0.9 * p_yes), row("No", 0.9 * (1 - p_yes)), row("It", 0.05)]
    return candidates[0] | {"top_logprobs": candidates}


def reply(*tokens, text="Yes", finish="stop", **message):
    return {
        "id": f"chatcmpl-{ID}",
        "model": "judge",
        "choices": [
            {
                "message": {"content": text} | message,
                "finish_reason": finish,
                "logprobs": {"content": list(tokens)},
            }
        ],
        "usage": {"total_tokens": 3},
    }


def read(content, wanted=replies.FIRST_TOKEN, model="judge"):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    fields = {"request_id": ID, "model": model, "endpoint": "http://a/v1", "wanted": wanted}
    return replies.read_completion(body, {"x-request-id": ID}, **fields)


def thought(*tokens, **fields):
    return read(reply(*tokens, **fields), openai.AFTER_THINKING)


def p_yes(completion):
    return openai.read_answer(completion, text_fallback=False).p_yes


def paths(content, path=()):
    """All places in a JSON value."""
    yield path
    items = content.items() if isinstance(content, dict) else ()
    for key, value in enumerate(content) if isinstance(content, list) else items:
        yield from paths(value, (*path, key))


def mutated(content, rng):
    """A copy with one to three places changed, removed or nested."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(paths(content)))
        if not path:
            return copy.deepcopy(rng.choice(ODD))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        change = rng.randrange(4)
        if change == 0:
            del parent[path[-1]]
        elif change == 1:
            parent[path[-1]] = [parent[path[-1]]]
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD))
    return content


def test_no_mutated_reply_raises_anything_but_a_stated_failure():
    rng, refused = random.Random(0), 0
    thinking = reply(sure("<think>"), sure("</think>"), answer(), reasoning_content="So.")
    for number in range(MUTATIONS):
        content = mutated(rng.choice([reply(answer(), answer()), thinking]), rng)
        body = json.dumps(content).encode()
        if number % 3 == 0:  # broken as bytes, too
            place = rng.randrange(len(body) + 1)
            body = body[:place] + rng.randbytes(rng.randint(0, 3)) + body[place + 1 :]
        for wanted in (replies.TEXT, replies.FIRST_TOKEN, openai.AFTER_THINKING):
            try:
                completion = read(body, wanted)
            except ChatReplyError as error:
                refused += 1
                # It can be printed, whatever the server has put into it.
                str(
                    chat_error("http://a/v1", str(error), "", kind="reply", retryable=True)
                ).encode()
                continue
            for fallback in (False, True):
                number_read = openai.read_answer(completion, text_fallback=fallback).p_yes
                assert number_read is None or 0.0 <= number_read <= 1.0
                rating = openai.read_rating(completion, text_fallback=fallback).value
                assert rating is None or 0.0 <= rating <= 10.0
        replies.error_text(body)
        try:
            replies.read_models(body)
        except ChatReplyError:
            refused += 1
    assert refused > MUTATIONS


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"choices":[{"logprobs":['])
def test_nesting_is_refused(opening):
    for depth in (DEEP, 100 * DEEP):
        with pytest.raises(ChatReplyError):
            read(opening * depth)
        replies.error_text(opening * depth)


@pytest.mark.parametrize(
    ("name", "is_accepted"),
    [
        ("gpt-4o", True),
        ("gpt-4o-2024-08-06", True),
        ("gpt-4o-0613", True),
        ("gpt-4o-20240806", True),
        ("gpt-4o-mini", False),
        ("gpt-4o-mini-2024-07-18", False),
        ("gpt-4o-2024-13-06", False),
        ("gpt-4o-8192", False),
        ("gpt-4o-0613-x", False),
        ("gpt-4o0613", False),
        ("gpt-4", False),
        ("gpt-4o-\u0660\u0666\u0661\u0663", False),
    ],
)
def test_a_dated_version_of_the_model_is_the_model_and_nothing_else_is(name, is_accepted):
    content = reply(answer()) | {"model": name}
    if is_accepted:
        assert p_yes(read(content, model="gpt-4o")) == pytest.approx(0.75)
    else:
        with pytest.raises(ChatReplyError, match="answer by another model"):
            read(content, model="gpt-4o")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1.5", 1.5), ("-3", 0.0), ("", None), (None, None), ("nan", None), ("inf", None),
        ("1e400", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("x" * 99, None),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None), ("Mon, 99 Foo 2024", None), ("86401", None),
    ],
)  # fmt: skip
def test_retry_after_of_any_form(value, seconds):
    assert seconds_of(value) == seconds


RAW_BLANKS = ("ĊĊ", "▁", "Ġ", "ĉĊ", "<0x0A>", "▁▁")  # as tokenizers write them
THOUGHT = [sure("<think>"), sure("Yes"), sure(" or"), sure(" no")]


@pytest.mark.parametrize(
    "tokens",
    [
        [*THOUGHT, sure("</think>"), answer()],
        [*THOUGHT, sure("</think>"), sure("\n\n"), sure(" "), answer(), sure("<|im_end|>")],
        [*THOUGHT, sure(".</"), sure("think"), sure(">"), answer()],
        [*THOUGHT, sure("</"), sure("think"), sure(">\n\n"), answer()],
        [sure("</think>"), answer()],  # the template has opened the thinking
        [sure("[THINK]"), sure("Yes"), sure("[/THINK]"), answer()],
        [*THOUGHT, sure("</think>"), answer(), sure("."), sure(" Yes")],
        [*THOUGHT, sure("</think>"), sure("No"), sure("</think>"), answer()],  # the last end counts
        [*THOUGHT, sure("</think>No</think>"), answer()],
        [sure("Yes"), sure("<think>"), sure("</think>"), answer()],
        *([*THOUGHT, sure("</think>"), sure(blank), answer()] for blank in RAW_BLANKS),
    ],
)
def test_the_first_token_behind_the_thinking_is_read(tokens):
    assert p_yes(thought(*tokens)) == pytest.approx(0.75)
    assert p_yes(read(reply(*tokens))) != pytest.approx(0.75)


@pytest.mark.parametrize("blanks", [[], ["\n"], ["ĊĊ"], ["▁"]])
def test_a_reply_without_thinking_that_the_judge_ended_is_read_at_its_first_token(blanks):
    completion = thought(*map(sure, blanks), answer(), sure("."), finish="stop")
    assert p_yes(completion) == pytest.approx(0.75)


def test_no_candidate_and_no_least_mass_is_a_failure():
    completion = read(reply(sure("Maybe")))
    answered = openai.read_answer(completion, text_fallback=False, min_mass=0.0)
    assert answered.p_yes is None
    assert "neither yes nor no" in answered.failure


@pytest.mark.parametrize("begin", [begin for begin, _ in THINKING_TAGS])
def test_a_judge_that_thinks_unasked_is_told_apart(begin):
    failure = openai.read_answer(read(reply(sure(begin))), text_fallback=False).failure
    assert "verifier.read='after_thinking'" in failure


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([sure("Yes"), sure(" or"), sure(" no"), sure("\n"), answer(), sure("<|im_end|>")], "Yes"),
        ([sure("Yes or no"), answer(), sure("."), sure("</s>")], "Yes."),
        ([answer(), sure("<|im_end|>")], "Yes"),  # the answer's tokens alone
        ([sure("Yes or no"), sure("</think>"), answer()], "Yes"),
    ],
)
def test_a_server_may_give_the_thinking_apart(field, tokens, text):
    completion = thought(*tokens, text=text, **{field: "Yes or no"})
    assert p_yes(completion) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("tokens", "fields", "message"),
    [
        (THOUGHT, {"finish": "length"}, r"did not end within 4 tokens; raise verifier\.max_tokens"),
        (THOUGHT, {}, "did not end: no '</think>' in 4 tokens"),
        ([answer()], {"finish": "length"}, "did not end within 1 tokens"),
        ([answer()], {"finish": None}, "no end of thinking"),
        ([*THOUGHT, sure("[/THINK]"), answer()], {}, "no '</think>' in 6 tokens"),
        ([*THOUGHT, sure("</think>"), answer(), sure("<think>")], {}, "no '</think>'"),
        ([*THOUGHT, sure("</think>")], {}, "nothing stands behind the thinking of 5 tokens$"),
        ([*THOUGHT, sure("</think>"), sure("\n")], {"finish": "length"}, "raise verifier"),
        ([*THOUGHT, sure("</think>Yes")], {}, "ends the thinking and begins the answer"),
        (THOUGHT, {"text": None, "reasoning": "Yes or no", "finish": "length"}, "nothing stands"),
        (THOUGHT, {"text": "Maybe", "reasoning": "Yes or no"}, "do not end with the answer's text"),
        ([sure("Yes no"), answer()], {"reasoning": "Hm"}, "do not end with the answer's text"),
        ([sure("Yes")], {"text": "es", "reasoning": "Y"}, "do not end with the answer's text"),
    ],
)
def test_where_the_end_of_the_thinking_is_not_certain_there_is_no_answer(tokens, fields, message):
    with pytest.raises(replies.NoAnswerError, match=message):
        thought(*tokens, **fields)
