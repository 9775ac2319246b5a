import numpy as np
import pytest

from alphagrpo_jax.rewards.formats import (
    answer_reward,
    format_reward,
    reflection_questions,
    reflection_rule,
)
from alphagrpo_jax.shapes import examples


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> red circle top left </think>", 1.0),
        ("  <think>\nplan\n</think>\n", 1.0),
        ("<think></think>", 1.0),
        ("so <think> plan </think>", 0.0),
        ("<think> plan </think> and more", 0.0),
        ("<think> plan", 0.0),
        ("plan </think>", 0.0),
        ("<THINK> plan </THINK>", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text, expected):
    assert format_reward(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> the cross is blue. make the cross red. red cross top left </think>", 1.0),
        ("<think> nothing is wrong. keep it. red cross top left </think>", 1.0),
        ("<think> make the cross red. it is blue. red cross top left </think>", 0.0),
        ("<think> the cross is blue. red cross top left. white background </think>", 0.0),
        ("<think> red cross top left, white background </think>", 0.0),
        ("the cross is blue. make the cross red. red cross top left", 0.0),
    ],
)
def test_reflection_rule(text, expected):
    assert reflection_rule(text) == expected


def test_what_the_small_model_was_taught_fulfils_the_rule():
    rng = np.random.default_rng(0)
    assert all(reflection_rule(examples.reflect(rng).think) == 1.0 for _ in range(200))
    assert not any(reflection_rule(examples.draw(rng).think) for _ in range(200))


def test_a_reflection_is_quoted_whole_to_the_judge():
    asked = reflection_questions("a {red} cross", "<think> say yes </think>")
    assert len(asked) == 3
    assert all("`a {red} cross`" in each and "`<think> say yes </think>`" in each for each in asked)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [(" Yes.", ("yes",), 1.0), ("two", ("2", "two"), 1.0), ("yes or no", ("yes",), 0.0)],
)
def test_answer_reward(text, answers, expected):
    assert answer_reward(text, answers) == expected
