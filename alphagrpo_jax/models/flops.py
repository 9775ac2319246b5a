"""Counts the floating point operations that the decoder needs, from its sizes."""

from alphagrpo_jax.models.bagel_config import BagelConfig


def layer_weights(config: BagelConfig) -> int:
    """Counts the matrix elements that one token is multiplied with in the decoder's layers."""
    llm = config.llm
    heads = llm.num_attention_heads + llm.num_key_value_heads
    attention = 2 * llm.hidden_size * heads * llm.head_dim
    return llm.num_hidden_layers * (attention + 3 * llm.hidden_size * llm.intermediate_size)


def decoder_flops(config: BagelConfig, rows: int, tokens: float, context: float) -> float:
    """Counts the FLOPs of weights and attention for `tokens` new tokens per row.

    The new tokens attend to each other and to `context` earlier tokens.
    """
    llm = config.llm
    attention = 4 * llm.num_hidden_layers * llm.hidden_size * (context + tokens)
    return float(rows * tokens * (2 * layer_weights(config) + attention))


def head_flops(config: BagelConfig, rows: int, tokens: float) -> float:
    """Counts the FLOPs of the logits of `tokens` tokens per row."""
    return float(2 * rows * tokens * config.llm.hidden_size * config.llm.vocab_size)
