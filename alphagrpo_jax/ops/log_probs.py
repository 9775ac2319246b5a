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
    """Computes log-prob and entropy of every token after the first; see `target_log_probs`.

    Args:
      logits: float32[B, T - 1, V], position t predicts token t + 1.
      tokens: int32[B, T].
      mask: bool[B, T].
      temperature: divides the logits.
    """
    chex.assert_rank([logits, tokens, mask], [3, 2, 2])
    log_prob, entropy = target_log_probs(logits, tokens[:, 1:], temperature=temperature)
    valid = mask[:, 1:]
    return TextLogProbs(jnp.where(valid, log_prob, 0.0), jnp.where(valid, entropy, 0.0), valid)


def target_log_probs(
    logits: jax.Array, targets: jax.Array, *, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Computes tokens' log-probs and the entropies of the distributions they were sampled from.

    `log p = log softmax(logits / temperature)[target]`, entropy `-sum_v p log p`.

    Args:
      logits: float32[B, T, V], of the positions before the tokens.
      targets: int32[B, T], the tokens.
      temperature: divides the logits.
    Returns:
      float32[B, T] log-probs and float32[B, T] entropies, nats.
    """
    log_p = jax.nn.log_softmax(logits / temperature, axis=-1)
    log_prob = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return log_prob, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
