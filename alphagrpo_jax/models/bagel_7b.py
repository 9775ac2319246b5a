"""Sizes of BAGEL-7B-MoT, for measuring and planning where its folder is not at hand."""

from typing import Any

from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.runtime.tokenizer import Tokenizer

TOKENIZER = "package:umm"  # whose special tokens stand in for the model's
# The contents of the JSON files; the autoencoder has FLUX's sizes, which are the defaults.
BAGEL_7B: dict[str, Any] = {
    "llm": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
    },
    "vit": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 980,
    },
    "vae": None,
    "bagel": None,
}


def bagel_7b_config(tokenizer: Tokenizer) -> BagelConfig:
    """Returns the model's configuration with the special tokens of a tokenizer."""
    return BagelConfig.from_dicts(**BAGEL_7B, tokens=tokenizer.special)
