"""Builds the small UMM's tokenizer: Qwen2's byte-level BPE, trained on the shapes world's texts.

Every word of the world and of the fixed protocol texts becomes one token; other text falls back to
smaller pieces, down to bytes. The result depends on the texts' words and their sampled
frequencies, and thus on the seed alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from alphagrpo_jax import tasks
from alphagrpo_jax.runtime.tokenizer import PAD, SPECIAL, SPLIT
from alphagrpo_jax.shapes import examples, language, questions, requests, riddles

SEED = 0
SAMPLES = 2000  # of each kind of example
MAX_VOCABULARY = 1024  # without special tokens; training stops when all words are whole
MODEL_MAX_LENGTH = 131072
SPECIAL_TOKENS = (PAD, *SPECIAL.values())


def training_texts(seed: int = SEED, samples: int = SAMPLES) -> Iterator[str]:
    """Yields the texts to train the tokenizer on: protocol, riddles, samples of each kind."""
    yield tasks.THINK_SYSTEM_PROMPT
    yield tasks.ANSWER_SYSTEM_PROMPT
    yield tasks.GENERATE_REFLECTION_REQUEST
    for riddle in riddles.RIDDLES:
        yield from (f" {riddle.phrase} {riddle.clue}", riddle.resolution(riddle.meaning))
        yield from (riddle.resolution(reading) for reading in riddles.OPTIONS[riddle.kind])
    for templates in (questions.WORDINGS, language.RELATION_PHRASES):
        for wordings in templates.values():
            yield from wordings
    yield from (questions.text(questions.quality(type_)) for type_ in questions.QUALITY)
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        drawing, repair = examples.draw_example(rng), examples.reflect_example(rng)
        yield from (drawing.prompt, drawing.think, repair.prompt, repair.think)
        yield requests.sample_implied(rng).text
        caption, answer = examples.caption_example(rng), examples.answer_example(rng)
        edit = examples.edit_example(rng)
        yield from (caption.instruction, caption.text, answer.question, answer.answer)
        yield from (edit.instruction, edit.think)


def train_tokenizer(seed: int = SEED) -> tokenizers.Tokenizer:
    """Trains the tokenizer and adds Qwen2's special tokens after the vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(training_texts(seed), trainer)
    special = [tokenizers.AddedToken(token, normalized=False) for token in SPECIAL_TOKENS]
    backend.add_special_tokens(special)
    return backend


def _config(backend: tokenizers.Tokenizer) -> dict:
    """Builds tokenizer_config.json, as Qwen2's."""
    added = {
        str(backend.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL.values()),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL["im_end"],
        "errors": "replace",
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": PAD,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def build_tokenizer(folder: str | Path, seed: int = SEED) -> None:
    """Writes vocab.json, merges.txt, tokenizer.json and tokenizer_config.json into a folder.

    Args:
      folder: made if it does not exist.
      seed: of the sampled texts.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend = train_tokenizer(seed)
    model = json.loads(backend.to_str())["model"]
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    merges = "\n".join(["#version: 0.2", *pairs]) + "\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    config = json.dumps(_config(backend), indent=2)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
