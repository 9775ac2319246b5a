"""Throughput of the server: requests that are sent, what is read of replies, and a small run."""

import json
import math

import numpy as np
import pytest

from alphagrpo_jax.rewards.verifiers.prompt_limits import PromptLimits
from alphagrpo_jax.rewards.verifiers.serving.requests import RequestReader
from alphagrpo_jax.runtime.paths import resolve
from benchmarks import server_throughput

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("side", "shape"), [(0, (6, 6, 3)), (24, (24, 24, 3))])
def test_every_question_is_a_request_of_its_own_with_the_whole_image(side, shape):
    pictures = [np.full((6, 6, 3), value, np.uint8) for value in (10, 200)]
    samples = [(pictures[0], ("Is it?", "Is it red?")), (pictures[1], ("Is it blue?",))]
    limits = PromptLimits.from_folder(resolve("package:verifier"))
    reader = RequestReader(limits, max_logprobs=20, max_tokens=9)
    questions = [reader.read(request)[1] for request in server_throughput.bodies(samples, side)]
    assert [question.text for question in questions] == ["Is it?", "Is it red?", "Is it blue?"]
    assert [question.image[0, 0, 0] for question in questions] == [10, 10, 200]
    assert {question.image.shape for question in questions} == {shape}
    assert all(question.single for question in questions)


def test_what_is_read_of_a_reply():
    top = [{"token": " Yes", "logprob": math.log(0.6)}, {"token": "no", "logprob": math.log(0.2)}]
    top += [{"token": "YES", "logprob": math.log(0.1)}, {"token": "maybe", "logprob": -3.0}]
    reply = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    assert server_throughput.p_yes((200, json.dumps(reply).encode())) == pytest.approx(7 / 9)
    with pytest.raises(ValueError, match="the server answered 503"):
        server_throughput.p_yes((503, b"busy"))


@pytest.mark.slow
def test_a_small_run_measures_both_ways(capsys):
    flags = ["--images", "2", "--repeats", "1", "--clients", "4", "--threads", "1"]
    assert server_throughput.main(flags) == 0
    printed = capsys.readouterr().out
    assert "server,   4 clients:" in printed
    assert "ratio" in printed
