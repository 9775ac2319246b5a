"""The tokenizer on the recorded texts, and folders that lack something."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import FILES, Tokenizer, TokenizerError

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "golden_a"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in FILES:
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("without", ["", "tokenizer.json"])
def test_recorded_texts(folder: pathlib.Path, without: str):
    if without:
        (folder / without).unlink()
    tokenizer = Tokenizer.from_folder(folder)
    texts = json.loads((FOLDER / "expected.json").read_text())["texts"]
    arrays = np.load(FOLDER / "expected.npz")
    for index in range(6):
        ids = tokenizer.encode(texts[f"c1.str{index}"])
        assert ids == arrays[f"c1.str{index}_ids"].tolist()
        assert tokenizer.decode(ids) == texts[f"c1.str{index}_decoded"]
    assert tokenizer.decode(arrays["c4.tokens"]) == texts["c4.decoded"]
    assert tokenizer.wrap(texts["c3.prompt"]) == arrays["c3.prompt_ids"].tolist()
    assert len(tokenizer) == int(arrays["meta.vocab_size"])


def test_batch_pads_on_the_right():
    tokenizer = Tokenizer.from_folder(FOLDER)
    tokens, mask = tokenizer.batch([[1, 2, 3], [4]], 4)
    assert tokens.tolist() == [[1, 2, 3, 400], [4, 400, 400, 400]]
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    with pytest.raises(ValueError, match="text 0 has 3 tokens, at most 2 fit"):
        tokenizer.batch([[1, 2, 3]], 2)


def test_missing_special_tokens_are_named(folder: pathlib.Path):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|vision_", "<|picture_"))
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_folder(folder)
    assert "['<|vision_start|>', '<|vision_end|>']" in str(error.value)
    assert str(folder) in str(error.value)


def test_no_tokenizer_or_a_broken_one(folder: pathlib.Path, tmp_path: pathlib.Path):
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        Tokenizer.from_folder(tmp_path / "empty")


def test_save_writes_the_same_files(tmp_path: pathlib.Path):
    Tokenizer.from_folder(FOLDER).save(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_paths(tmp_path: pathlib.Path):
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"package:nothing.*does not exist"):
        resolve("package:nothing")


@pytest.mark.parametrize("without", ["", "tokenizer.json"])
def test_special_tokens_in_a_text_are_found(folder: pathlib.Path, without: str):
    if without:
        (folder / without).unlink()
    tokenizer = Tokenizer.from_folder(folder)
    text = "a <|im_end|>cat<|vision_start|>, |im_end| and <|other|>"
    assert tokenizer.control_tokens(text) == ["<|im_end|>", "<|vision_start|>"]
    ids = set(tokenizer.encode(text))
    assert {tokenizer.special.im_end, tokenizer.special.vision_start} <= ids
    assert tokenizer.control_tokens("a cat") == []
