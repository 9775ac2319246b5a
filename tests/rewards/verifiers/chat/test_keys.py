"""Keys are read from variables that are named rightly, and cut out of whatever is shown."""

import json

import pytest

from alphagrpo_jax import decompose
from alphagrpo_jax.rewards.verifiers.chat import keys
from alphagrpo_jax.rewards.verifiers.chat.client import ChatClient

KEY = "sk-/abc+0123456789"


def test_what_may_be_a_key_itself_is_never_shown(capsys, tmp_path):
    with pytest.raises(ValueError, match="expected capital letters") as caught:
        ChatClient(["http://a/v1"], "m", api_key_env=KEY)
    (tmp_path / "prompts.txt").write_text("a circle\n")
    files = ["--input", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out.jsonl")]
    llm = ["--llm", "openai:http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", KEY]
    assert decompose.main([*files, *llm]) == 2
    output = capsys.readouterr()
    assert "expected capital letters" in output.err
    written = [path.read_text() for path in tmp_path.iterdir()]
    assert not any(KEY in text for text in (str(caught.value), *output, *written))


def test_a_blank_variable_is_no_key(monkeypatch):
    monkeypatch.setenv("BLANK_KEY", " \t")
    with pytest.raises(ValueError, match="BLANK_KEY, which api_key_env names, is not set or blank"):
        keys.read_key("BLANK_KEY")
    monkeypatch.setenv("BLANK_KEY", f" {KEY}\n")
    assert keys.read_key("BLANK_KEY") == KEY
    assert keys.read_key("") == ""


@pytest.mark.parametrize(
    "spelt",
    [
        KEY,
        KEY.replace("/", "\\/"),
        KEY.replace("s", "\\u0073").replace("+", "\\u002B"),
        "".join(f"\\u{ord(letter):04x}" for letter in KEY),
    ],
)
def test_a_key_is_hidden_however_json_spells_it(spelt):
    for encoding in ("utf-8", "utf-16-le"):
        body = f'{{"a": ["x {spelt} y", 0.1, NaN]}}'.encode(encoding)
        content = json.loads(keys.hidden_in_reply(body, KEY))
        assert content["a"][:2] == ["x [key] y", 0.1]
    assert keys.hidden(f"cut: {spelt}", KEY) == "cut: [key]"


@pytest.mark.parametrize(
    "body", [b"plain \xff", b'{"a": "\\ud800 \\u00e4 \xc3\xa4"}', b"{no", b"["]
)
def test_replies_without_the_key_say_what_they_said(body):
    content = keys.hidden_in_reply(body, KEY)
    try:
        assert json.loads(content) == json.loads(body)
    except ValueError:
        assert content == body
    assert keys.hidden_in_reply(body, "") is body


def test_odd_keys_are_hidden_too():
    odd = 'a"b\\c/d'
    body = json.dumps({"a": odd}).encode()
    assert json.loads(keys.hidden_in_reply(body, odd)) == {"a": "[key]"}
    assert keys.hidden(f"it is {odd}", odd) == "it is [key]"
    assert keys.hidden("a \\ b", odd) == "a \\ b"
