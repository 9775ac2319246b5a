"""The pytrees that pass between the stages, and the one legend of their dimensions.

B trajectories, P prompts, G group size (B = P G, the members of a group in a row), T text tokens,
S cached tokens, L layers, N query heads, K key/value heads, H head dimension, D width, M latent
tokens per image, C latent token width, J stochastic (trained) image steps, V vocabulary,
Q questions.

Conventions: sigma = 1 is noise, sigma = 0 the image; rewards lie in [0, 1]; an image step's
log-prob is a mean over the latent, a text log-prob is one token's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from alphagrpo_jax.models.kv_cache import Segment
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.tasks import Task, think_texts


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
    pieces: tuple[Piece | None, ...]
    texts: tuple[TextSample, ...]  # one per text step
    images: tuple[ImageSample, ...]  # one per image step


@struct.dataclass
class LogProbs:
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


@dataclasses.dataclass
class InitialImageQueue:
    """Initial images that wait for their refinement, oldest first; part of a checkpoint.

    Arrays have a fixed capacity; the first `count` entries wait.
    """

    count: np.ndarray  # int64[]
    row: np.ndarray  # int64[N], of the prompt in its file
    image: np.ndarray  # uint8[N, Hpx, Wpx, 3]
    reward: np.ndarray  # float64[N]
    lowest: np.ndarray  # float64[N], the lowest reward of the prompt's initial images

    @classmethod
    def empty(cls, capacity: int, height: int, width: int) -> "InitialImageQueue":
        """A queue in which nothing waits."""
        return cls(
            count=np.zeros((), np.int64),
            row=np.zeros(capacity, np.int64),
            image=np.zeros((capacity, height, width, 3), np.uint8),
            reward=np.zeros(capacity),
            lowest=np.zeros(capacity),
        )

    def add(
        self, row: np.ndarray, image: np.ndarray, reward: np.ndarray, lowest: np.ndarray
    ) -> None:
        """Appends N entries.

        Raises:
          ValueError: the queue has no room for them.
        """
        begin = int(self.count)
        end = begin + len(row)
        if end > len(self.row):
            raise ValueError(
                f"got {len(row)} entries for a queue with {len(self.row) - begin} free"
            )
        for name, new in (("row", row), ("image", image), ("reward", reward), ("lowest", lowest)):
            vars(self)[name][begin:end] = new
        self.count = np.array(end, np.int64)

    def take(self, count: int) -> "InitialImageQueue":
        """Removes and returns the oldest `count` entries."""
        taken = InitialImageQueue(
            np.array(count, np.int64),
            *(vars(self)[name][:count].copy() for name in ("row", "image", "reward", "lowest")),
        )
        for name in ("row", "image", "reward", "lowest"):
            array = vars(self)[name]
            array[:-count] = array[count:].copy()
            array[-count:] = 0
        self.count = self.count - count
        return taken

    def progress(self) -> dict[str, list]:
        """Its numbers for a checkpoint's JSON part, which keeps every bit of them."""
        names = ("row", "reward", "lowest")
        return {name: vars(self)[name][: int(self.count)].tolist() for name in names}

    @classmethod
    def restored(cls, image: np.ndarray, progress: Mapping[str, list]) -> "InitialImageQueue":
        """The queue with these images uint8[N, Hpx, Wpx, 3], and what `progress` gave."""
        queue = cls.empty(*image.shape[:3])
        count = len(progress["row"])
        numbers = (np.asarray(progress[name]) for name in ("row", "reward", "lowest"))
        row, reward, lowest = numbers
        queue.add(row, np.asarray(image)[:count], reward, lowest)
        return queue


@dataclasses.dataclass
class DataPosition:
    """How far a run has come in its data; part of a checkpoint."""

    positions: dict[str, int]  # prompts taken so far, by task
    queue: InitialImageQueue | None  # initial images that task srr has yet to repair


class PromptBatch(NamedTuple):
    """P prompts of one task, and the images that come with them."""

    number: int  # of the batch in the update
    task: Task
    rows: np.ndarray  # int64[P], into the task's training prompts
    images: np.ndarray | None  # uint8[P, Hpx, Wpx, 3], input images of the task
    initial: InitialImageQueue | None  # the images to repair and their rewards


class RolloutBatch(NamedTuple):
    """The B trajectories of one prompt batch; the verifiers have their images already."""

    batch: PromptBatch
    trajectories: Rollout
    records: list[Record]  # one per trajectory
    sample_ids: list[tuple[int, int, int]]  # of the samples in the verifier pool
    texts: list[list[str]]  # [text steps][B]
    metrics: dict[str, float]

    @property
    def think_texts(self) -> list[list[str]]:
        """Texts of the think steps: [think steps][B]."""
        return think_texts(self.batch.task, self.texts)


class BatchRewards(NamedTuple):
    """Shaped rewards of one batch: what advantages are computed from.

    Text and image steps have totals of their own, since a format term may count for texts alone.
    Initial rewards exist for refining tasks only and carry the same shaping as the totals.
    """

    text: np.ndarray  # float64[P, G], NaN where invalid
    image: np.ndarray  # float64[P, G]
    valid: np.ndarray  # bool[P, G]
    text_initial: np.ndarray | None  # float64[P]
    image_initial: np.ndarray | None  # float64[P]
    improved: bool  # False: rectification found no improvement, the batch is left out
    metrics: dict[str, float]


class Advantages(NamedTuple):
    """Advantages of P groups of G trajectories."""

    advantage: np.ndarray  # float32[P, G], 0 where not used
    used: np.ndarray  # bool[P, G], valid samples of groups with at least two of them
    metrics: dict[str, float]

    @property
    def all_zero(self) -> bool:
        """True if no trajectory would be moved, so that the update is skipped."""
        return not self.advantage.any()


class BatchAdvantages(NamedTuple):
    """Advantages of the text and image steps of one batch."""

    text: Advantages
    image: np.ndarray  # float32[P, G]
    left_out: bool = False  # nothing improved: the batch is no part of the update
