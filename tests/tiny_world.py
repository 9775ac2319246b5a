"""A tiny random model and prompts for tests of the trainer; nothing here is trained."""

import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers, trainers

from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.bagel_weights import CONFIG_FILES, LoadedModel, save_model
from alphagrpo_jax.runtime import images
from alphagrpo_jax.runtime.tokenizer import PAD, SPECIAL, Tokenizer
from configs import grpo

SIDE = 32  # pixels; 2x2 latent tokens
WORDS = ("a red circle", "a blue square", "two green crosses", "a shape with three sides")
TRANSFORM = {"max": SIDE, "min": SIDE, "stride": 16}
LLM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": SIDE,
}
VAE = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4}
BAGEL = {
    "latent_patch_size": 2,
    "max_latent_size": 2,
    "vit_max_num_patch_per_side": SIDE // 8,
    "vae_transform": TRANSFORM,
    "vit_transform": TRANSFORM | {"stride": 8},
}


def tokenizer(words: Sequence[str] = ()) -> Tokenizer:
    """A byte-level tokenizer with the special tokens, and one token for each of `words`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*WORDS, "<think> </think>"], trainer)
    backend.add_special_tokens([PAD, *SPECIAL.values()])
    backend.add_tokens([tokenizers.AddedToken(word, single_word=True) for word in words])
    return Tokenizer(backend, {"tokenizer.json": backend.to_str().encode()}, "tests")


def model(seed: int = 0, words: Sequence[str] = ()) -> LoadedModel:
    """A tiny model whose weights are numpy's, since sampling them by JAX compiles for long."""
    word_tokenizer = tokenizer(words)
    contents = (LLM | {"vocab_size": len(word_tokenizer)}, VIT, VAE, BAGEL)
    config = BagelConfig.from_dicts(*contents, tokens=word_tokenizer.special)
    module = Bagel(config)
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "bias":
            return jnp.zeros(leaf.shape)
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        spread = 0.5 if path[-1].key == "embedding" else np.prod(leaf.shape[-2:-1]) ** -0.5
        return jnp.asarray(rng.normal(size=leaf.shape) * spread, jnp.float32)

    base = jax.tree_util.tree_map_with_path(draw, base_shapes(module))
    files = {
        name: json.dumps(content).encode()
        for name, content in zip(CONFIG_FILES, contents, strict=True)
    }
    return LoadedModel(module, base, word_tokenizer, config, files, {})


def write_model(folder: pathlib.Path, words: Sequence[str] = ()) -> pathlib.Path:
    """Writes the tiny model in the official layout."""
    save_model(folder, model(words=words))
    return folder


def record(prompt: str, **extra: object) -> dict:
    """A record with two semantic questions and one quality question."""

    def question(kind: str, text: str, tag: str) -> dict:
        return {"question_type": kind, "question": text, "is_valid": True, "tag": tag}

    semantic = [f"Is there {prompt}?", f"Is only {prompt} to be seen?"]
    return {
        "prompt": prompt,
        "semantic_questions": [question("semantic", text, "Existence") for text in semantic],
        "quality_questions": [question("quality", "Is it flat?", "Texture")],
        **extra,
    }


def write_images(folder: pathlib.Path, count: int = 6) -> None:
    """`edits.jsonl`, with image files beside it, and `answers.jsonl`, with data: URLs."""
    rng = np.random.default_rng(0)
    edits, answers = [], []
    for i in range(count):
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(image).save(folder / f"edit_{i}.png")
        edits.append(record(f"{WORDS[i % len(WORDS)]} {i}", image=f"edit_{i}.png"))
        fields = {"image": images.data_url(image), "answer": ["a", "yes"]}
        answers.append({"prompt": f"Is it {WORDS[i % len(WORDS)]}?"} | fields)
    for name, rows in (("edits", edits), ("answers", answers)):
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))


def write_records(path: pathlib.Path, count: int = 6) -> pathlib.Path:
    """Writes `count` records."""
    rows = [record(f"{WORDS[i % len(WORDS)]} {i}") for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TIRES = ("--config.verifier.path=tiny_verifiers:Tires", "--config.verifier.max_attempts=1")
INTERRUPTS = ("--config.verifier.path=tiny_verifiers:Interrupts",)


def config(root: pathlib.Path) -> ml_collections.ConfigDict:
    """A configuration over the files that `write_all` makes in `root`."""
    config = grpo.get_config()
    config.model.path = str(root / "model")
    config.model.height = config.model.width = SIDE
    config.verifier.kind, config.verifier.path = "callable", "tiny_verifiers:Honest"
    config.data.train, config.data.heldout = str(root / "train.jsonl"), str(root / "heldout.jsonl")
    config.data.edit_train = config.data.edit_heldout = str(root / "edits.jsonl")
    config.data.answer_train = config.data.answer_heldout = str(root / "answers.jsonl")
    config.srr.queue_prompts, config.srr.initial_images = 6, 2
    config.srr.num_points, config.srr.text_tokens = 4, 5
    config.lora.rank, config.lora.alpha = 4, 8.0
    config.rollout.prompt_tokens, config.rollout.text_tokens = 24, 5
    config.rollout.num_points, config.rollout.window_range = 5, (0, 3)
    config.rollout.guidance.text_scale = 2.0
    config.rollout.micro_batch = 4
    config.train.steps, config.train.prompts_per_step, config.train.group_size = 4, 2, 4
    config.train.micro_batch = 4
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = config.optimizer.decay_steps = 0
    config.rollout.shared_noise = False
    config.verifier.workers = 1
    config.eval.every, config.eval.prompts, config.eval.micro_batch = 2, 3, 4
    config.eval.text_guidance = 2.0
    config.eval.num_points, config.eval.checker = 5, ""
    config.checkpoint.every = 2
    config.checkpoint.stop_seconds = 1e6  # a busy machine does not decide which steps are done
    config.log.tensorboard = config.log.progress = False
    config.log.samples = 2
    return config


def get_config() -> ml_collections.ConfigDict:
    """The configuration file of the e2e tests: run the command in the folder of the files."""
    return config(pathlib.Path())


def write_all(root: pathlib.Path) -> pathlib.Path:
    """Model, training and held-out records in a folder."""
    write_model(root / "model")
    write_records(root / "train.jsonl", 6)
    write_records(root / "heldout.jsonl", 3)
    write_images(root)
    return root
