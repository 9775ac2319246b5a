"""Log-probabilities and entropies of texts from logits."""

from collections.abc import Callable
from typing import cast

import chex
import jax
import jax.numpy as jnp
from flax import struct

_Pair = tuple[jax.Array, jax.Array]

LOGIT_POSITIONS = 128  # of a text, whose logits exist at the same time


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


def by_blocks(
    function: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    hidden: jax.Array,
    targets: jax.Array,
    *,
    positions: int = LOGIT_POSITIONS,
) -> tuple[jax.Array, jax.Array]:
    """Applies a function of positions to a text, block by block if it is longer than a block.

    Logits of a whole text would be the largest array of an update: 623 MB per row for BAGEL's
    vocabulary and 1025 positions, three times. The backward pass computes a block's logits again.

    Args:
      function: maps float[B, S, D] and int32[B, S] to two arrays float32[B, S].
      hidden: float[B, T, D].
      targets: int32[B, T].
      positions: S of a block.
    Returns:
      Two arrays float32[B, T].
    """
    length = targets.shape[1]
    if length <= positions:
        return function(hidden, targets)
    count = -(-length // positions)

    def blocks(x: jax.Array) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, count * positions - length)
        shape = (x.shape[0], count, positions, *x.shape[2:])
        padded = jnp.pad(x, padding)  # pyright: ignore[reportUnknownMemberType]
        return jnp.moveaxis(padded.reshape(shape), 1, 0)

    remade = cast(
        Callable[[jax.Array, jax.Array], _Pair],
        jax.checkpoint(function),  # pyright: ignore[reportUnknownMemberType]
    )

    def step(carry: None, block: _Pair) -> tuple[None, _Pair]:
        return carry, remade(*block)

    _, (first, second) = jax.lax.scan(step, None, (blocks(hidden), blocks(targets)))

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]

    return joined(first), joined(second)
