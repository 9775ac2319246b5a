"""Log-probabilities and entropies of texts from logits."""

import chex
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class TextLogProbs:
    """Log-probs and entropies of a text's tokens; position t is about token t + 1."""

    log_prob: jax.Array  # float32[B, T - 1], nats, 0 where masked
    entropy: jax.Array  # float32[B, T - 1], nats, 0 where masked
    mask: jax.Array  # bool[B, T - 1]


def token_log_probs(
    logits: jax.Array, tokens: jax.Array, mask: jax.Array, *, temperature: float
) -> TextLogProbs:
    """Computes every token's log-prob and the entropy of the distribution it was sampled from.

    `log p_t = log softmax(logits_t / temperature)[token_{t+1}]`, entropy `-sum_v p log p`.

    Args:
      logits: float32[B, T - 1, V], position t predicts token t + 1.
      tokens: int32[B, T].
      mask: bool[B, T].
      temperature: divides the logits.
    """
    chex.assert_rank([logits, tokens, mask], [3, 2, 2])
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
    picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    valid = mask[:, 1:]
    return TextLogProbs(jnp.where(valid, picked, 0.0), jnp.where(valid, entropy, 0.0), valid)
