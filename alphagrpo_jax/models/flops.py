"""Counts the floating point operations that the decoder needs, from its sizes."""

from alphagrpo_jax.models.bagel_config import BagelConfig


def layer_weights(config: BagelConfig) -> int:
    """Counts the matrix elements that one token is multiplied with in the decoder's layers."""
    llm = config.llm
    heads = llm.num_attention_heads + llm.num_key_value_heads
    attention = 2 * llm.hidden_size * heads * llm.head_dim
    return llm.num_hidden_layers * (attention + 3 * llm.hidden_size * llm.intermediate_size)


def attention_flops(config: BagelConfig, rows: int, tokens: float, keys: float) -> float:
    """Counts the FLOPs of attention's two products, scores and sums of values, in all layers.

    Each of `tokens` tokens per row looks at `keys` keys.
    """
    return float(4 * config.llm.num_hidden_layers * config.llm.hidden_size * rows * tokens * keys)


def decoder_flops(config: BagelConfig, rows: int, tokens: float, context: float) -> float:
    """Counts the FLOPs of weights and attention for `tokens` new tokens per row.

    The new tokens attend to each other and to `context` earlier tokens.
    """
    attention = attention_flops(config, rows, tokens, context + tokens)
    return 2.0 * rows * tokens * layer_weights(config) + attention


def head_flops(config: BagelConfig, rows: int, tokens: float) -> float:
    """Counts the FLOPs of the logits of `tokens` tokens per row."""
    return float(2 * rows * tokens * config.llm.hidden_size * config.llm.vocab_size)
