import pytest

from alphagrpo_jax.rewards.formats import format_reward


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
