"""The tokenizer: whole words, special tokens, both readers, the same files every time."""

import json

import numpy as np
import pytest
import transformers

from alphagrpo_jax import tasks
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.shapes import examples
from alphagrpo_jax.shapes.pretraining import tokenizer_build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer_build.build_tokenizer(path)
    return path


def test_special_tokens_follow_the_vocabulary(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer) == len(vocabulary) + 5 < 1000
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert tokenizer.pad == len(vocabulary)
    assert tokenizer.special.im_start == len(vocabulary) + 1
    assert tokenizer.special.vision_end == len(vocabulary) + 4


def test_transformers_reads_it(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    ours = Tokenizer.from_folder(folder)
    layout = "<think> red circle top left </think>"
    for text in (layout, "a naïve 12\n x", tasks.THINK_SYSTEM_PROMPT):
        assert theirs(text).input_ids == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.pad_token == "<|endoftext|>"


def test_it_can_be_read_from_vocabulary_and_merges(folder, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = "a shape with three sides in the colour of a ripe banana"
    ours = Tokenizer.from_folder(folder).encode(text)
    assert Tokenizer.from_folder(tmp_path).encode(text) == ours
    assert len(ours) == len(text.split())


def test_words_are_whole_and_texts_short(folder):
    tokenizer, rng = Tokenizer.from_folder(folder), np.random.default_rng(11)
    for _ in range(150):
        drawing, repair = examples.draw_example(rng), examples.reflect_example(rng)
        words = drawing.prompt.replace(",", " ,").split()
        assert len(tokenizer.encode(drawing.prompt)) == len(words)
        assert len(tokenizer.encode(drawing.think)) <= 48
        assert len(tokenizer.encode(repair.think)) <= 72
    for text in (
        tasks.THINK_SYSTEM_PROMPT,
        tasks.ANSWER_SYSTEM_PROMPT,
        tasks.GENERATE_REFLECTION_REQUEST,
    ):
        assert len(tokenizer.encode(text)) < len(text) / 3


def test_the_same_files_every_time(folder, tmp_path):
    tokenizer_build.build_tokenizer(tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
