"""The pytrees that pass between the stages, and the one legend of their dimensions.

B trajectories, P prompts, G group size (B = P G, the members of a group in a row), T text tokens,
S cached tokens, L layers, N query heads, K key/value heads, H head dimension, D width, M latent
tokens per image, C latent token width, J stochastic (trained) image steps, V vocabulary,
Q questions.

Conventions: sigma = 1 is noise, sigma = 0 the image; rewards lie in [0, 1]; an image step's
log-prob is a mean over the latent, a text log-prob is one token's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from alphagrpo_jax.models.kv_cache import Segment


@struct.dataclass
class TextBlock:
    """Texts between `<|im_start|>` and `<|im_end|>`, right padded."""

    tokens: jax.Array  # int32[B, T]
    mask: jax.Array  # bool[B, T]


@struct.dataclass
class ImageBlock:
    """Given images, once for each encoder; see `runtime.images.both_sizes`."""

    pixels: jax.Array  # uint8[B, Hpx, Wpx, 3], for the VAE
    seen: jax.Array  # uint8[B, hpx, wpx, 3], for the ViT


@struct.dataclass
class Piece:
    """What one event added to a context: a text one segment, an image two (VAE, ViT)."""

    segments: tuple[Segment, ...]
    advance: jax.Array  # int32[B], by how much the next RoPE id moved


@struct.dataclass
class TextSample:
    """A generated text. `log_prob[:, t]` is that of `tokens[:, t + 1]`."""

    tokens: jax.Array  # int32[B, T], from <|im_start|> to <|im_end|>, then padding
    mask: jax.Array  # bool[B, T], no padding
    scored: jax.Array  # bool[B, T - 1], sampled tokens (not an appended <|im_end|>)
    log_prob: jax.Array  # float32[B, T - 1], the sampler's own, 0 where not scored
    truncated: jax.Array  # bool[B], cut at the length limit


@struct.dataclass
class ImageSample:
    """A generated image and its stochastic steps."""

    before: jax.Array  # float32[B, J, M, C], latents entering each stochastic step
    after: jax.Array  # float32[B, J, M, C], latents that were drawn
    log_prob: jax.Array  # float32[B, J], the sampler's own
    start: jax.Array  # int32[], the first stochastic step in the schedule
    latents: jax.Array  # float32[B, M, C], the finished image


@struct.dataclass
class Rollout:
    """B trajectories: what was given, what was generated, and the contexts on the way.

    `pieces` has one entry per node of the task's plan; those of shared nodes have one row.
    """

    inputs: tuple[TextBlock | ImageBlock, ...]  # one per input of the task, in order
    pieces: tuple[Piece, ...]
    texts: tuple[TextSample, ...]  # one per text step
    images: tuple[ImageSample, ...]  # one per image step


@struct.dataclass
class StepScores:
    """Log-probs of a rollout's own tokens and transitions under some policy."""

    text_log_prob: tuple[jax.Array, ...]  # float32[B, T - 1] per text step
    text_entropy: tuple[jax.Array, ...]  # float32[B, T - 1] per text step
    image_log_prob: tuple[jax.Array, ...]  # float32[B, J] per image step
    image_mean: tuple[jax.Array, ...]  # float32[B, J, M, C], means of the transitions


@struct.dataclass
class UpdateBatch:
    """Everything the update needs of all of its trajectories."""

    rollout: Rollout
    advantage: jax.Array  # float32[B], of the text steps
    image_advantage: jax.Array  # float32[B], of the image steps; mostly the same
    valid: jax.Array  # bool[B], trajectories that count


@struct.dataclass
class TrainState:
    """What training changes, and nothing else: never the base model."""

    trainable: Any  # the adapter tree, or the trained part of the base
    opt_state: Any
    key: jax.Array  # typed key[], the run's root key: every draw folds the step into it


def row_count(inputs: tuple[TextBlock | ImageBlock, ...]) -> int:
    """B of a rollout's inputs, or P where they are still one per prompt."""
    return jax.tree.leaves(inputs)[0].shape[0]


def map_rows(
    function: Callable[..., jax.Array], tree: Any, *rest: Any, shared: tuple[int, ...] = ()
) -> Any:
    """Applies `function(axis of the rows, array, *arrays)` to the arrays of these pytrees.

    Cached keys and values carry their rows on axis 1, everything else on axis 0; scalars and the
    pieces of a rollout named in `shared` (one row for all) are left as in the first tree.

    Args:
      function: gets the axis, then the array of each tree.
      tree, rest: pytrees of this module, of one structure.
      shared: indices of pieces.
    """

    def one(node: Any, *others: Any) -> Any:
        nodes = (node, *others)
        if isinstance(node, Segment):
            fields = (("k", 1), ("v", 1), ("valid", 0))
            return Segment(
                *(function(axis, *(getattr(each, name) for each in nodes)) for name, axis in fields)
            )
        if isinstance(node, Rollout):
            pieces = tuple(
                each[0] if index in shared else map_rows(function, *each)
                for index, each in enumerate(zip(*(n.pieces for n in nodes), strict=True))
            )
            parts = [(each.inputs, each.texts, each.images) for each in nodes]
            inputs, texts, images = map_rows(function, *parts)
            return Rollout(inputs, pieces, texts, images)
        return function(0, *nodes) if node.ndim else node

    def is_whole(node: Any) -> bool:
        return isinstance(node, Segment | Rollout)

    return jax.tree.map(one, tree, *rest, is_leaf=is_whole)


def join_rows(parts: list[Rollout], *, shared: tuple[int, ...]) -> Rollout:
    """Rollouts of one update, one after the other."""
    return map_rows(lambda axis, *arrays: jnp.concatenate(arrays, axis=axis), *parts, shared=shared)
