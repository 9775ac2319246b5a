"""The pytrees that pass between the stages, and the one legend of their dimensions.

B trajectories, P prompts, G group size (B = P G, the members of a group in a row), T text tokens,
S cached tokens, L layers, N query heads, K key/value heads, H head dimension, D width, M latent
tokens per image, C latent token width, J stochastic (trained) image steps, V vocabulary,
Q questions.

Conventions: sigma = 1 is noise, sigma = 0 the image; rewards lie in [0, 1]; an image step's
log-prob is a mean over the latent, a text log-prob is one token's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import struct

from alphagrpo_jax.models.kv_cache import SEGMENT_ROW_AXES, Segment
from alphagrpo_jax.runtime.records import Record
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.tasks import Task, think_texts


@struct.dataclass
class TextBlock:
    """Texts between `<|im_start|>` and `<|im_end|>`, right padded."""

    tokens: jax.Array  # int32[B, T]
    mask: jax.Array  # bool[B, T]

    @classmethod
    def from_host(cls, tokens: np.ndarray, mask: np.ndarray) -> "TextBlock":
        """Wraps host arrays as they are; jit moves them to the devices."""
        return cls(cast(jax.Array, tokens), cast(jax.Array, mask))


@struct.dataclass
class ImageBlock:
    """Input images, once for each encoder; see `runtime.images.both_sizes`."""

    pixels: jax.Array  # uint8[B, Hpx, Wpx, 3], for the VAE
    vit_pixels: jax.Array  # uint8[B, hpx, wpx, 3], for the ViT

    @classmethod
    def from_host(cls, pixels: np.ndarray, vit_pixels: np.ndarray) -> "ImageBlock":
        """Wraps host arrays as they are; jit moves them to the devices."""
        return cls(cast(jax.Array, pixels), cast(jax.Array, vit_pixels))


@struct.dataclass
class Piece:
    """The segments that one event adds to a context: one for a text, two for an image (VAE, ViT).

    A context is put together from the pieces of its nodes (`sampling.contexts.context`), so that
    contexts that share an event share its arrays.
    """

    segments: tuple[Segment, ...]
    advance: jax.Array  # int32[B], by how much the next RoPE id moved
    # B above is 1 for "shared", P for "prompt": rows of a group share one copy.
    level: str = struct.field(pytree_node=False, default="trajectory")


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
    """A generated image and its trained steps.

    These are the stochastic ones of the sampler or, with sampler "ode", the finished image noised
    again: `(1 - sigma) latents + sigma noise`.
    """

    before: jax.Array  # float32[B, J, M, C], latents entering each trained step
    after: jax.Array  # float32[B, J, M, C], latents sampled from it; "ode": the noise
    sigma: jax.Array  # float32[B, J], noise levels of `before`
    log_prob: jax.Array  # float32[B, J], the sampler's own; "ode": 0
    start: jax.Array  # int32[], the first stochastic step in the schedule
    latents: jax.Array  # float32[B, M, C], the finished image


@struct.dataclass
class Rollout:
    """B trajectories: inputs, generated texts and images, and the contexts on the way."""

    inputs: tuple[TextBlock | ImageBlock, ...]  # one per input of the task, in order
    owner: jax.Array  # int32[B], number of each row's prompt
    pieces: tuple[Piece | None, ...]  # one per node of the task's plan; None: not computed yet
    texts: tuple[TextSample, ...]  # one per text step
    images: tuple[ImageSample, ...]  # one per image step


@struct.dataclass
class LogProbs:
    """Log-probs of a rollout's own tokens and transitions under some policy."""

    # A kind of steps that is not trained has no entries; images have log-probs or velocities.
    text_log_prob: tuple[jax.Array, ...]  # float32[B, T - 1] per text step
    text_entropy: tuple[jax.Array, ...]  # float32[B, T - 1] per text step
    image_log_prob: tuple[jax.Array, ...]  # float32[B, J] per image step
    image_mean: tuple[jax.Array, ...]  # float32[B, J, M, C], means of the transitions
    image_velocity: tuple[jax.Array, ...]  # float32[B, J, M, C], not guided, at `before`


@struct.dataclass
class UpdateBatch:
    """All trajectories of an update with their advantages."""

    rollout: Rollout
    advantage: jax.Array  # float32[B], of the text steps
    image_advantage: jax.Array  # float32[B], of the image steps; mostly the same
    valid: jax.Array  # bool[B], trajectories that count


@struct.dataclass
class TrainState:
    """Values that training changes, and nothing else: never the base model."""

    trainable: Any  # the adapter tree, or the trained part of the base
    opt_state: Any
    key: jax.Array  # typed key[], the run's root key: every use folds the step into it


def row_count(inputs: tuple[TextBlock | ImageBlock, ...]) -> int:
    """Returns B of a rollout's inputs, or P where they are still one per prompt."""
    return jax.tree.leaves(inputs)[0].shape[0]


def map_rows(function: Callable[..., Any], tree: Any, *trees: Any) -> Any:
    """Applies `function(row_axis, array, *arrays)` to the arrays of pytrees of one structure.

    | array                                            | axis of the rows             |
    |--------------------------------------------------|------------------------------|
    | of a `Segment`                                   | `kv_cache.SEGMENT_ROW_AXES`  |
    | of a rollout's piece of all or of single prompts | none: no row per trajectory  |
    | scalar                                           | none                         |
    | any other                                        | 0                            |

    Where there are no rows, the result is the first tree's array, unchanged.

    Args:
      function: maps the row axis and one array per tree to the array of the result.
      tree, trees: pytrees of this module, of one structure.
    """

    def map_segments(*segments: Segment) -> Segment:
        arrays = {
            name: function(axis, *(getattr(segment, name) for segment in segments))
            for name, axis in SEGMENT_ROW_AXES.items()
        }
        return dataclasses.replace(segments[0], **arrays)

    def map_rollouts(*rollouts: Rollout) -> Rollout:
        pieces = tuple(
            same_pieces[0]
            if same_pieces[0] is None or same_pieces[0].level != "trajectory"
            else map_rows(function, *same_pieces)
            for same_pieces in zip(*(rollout.pieces for rollout in rollouts), strict=True)
        )
        blocks = [
            (rollout.inputs, rollout.owner, rollout.texts, rollout.images) for rollout in rollouts
        ]
        inputs, owner, texts, images = map_rows(function, *blocks)
        return Rollout(inputs, owner, pieces, texts, images)

    def map_node(*nodes: Any) -> Any:
        first = nodes[0]
        if isinstance(first, Segment):
            return map_segments(*nodes)
        if isinstance(first, Rollout):
            return map_rollouts(*nodes)
        return function(0, *nodes) if first.ndim else first

    return jax.tree.map(
        map_node, tree, *trees, is_leaf=lambda node: isinstance(node, Segment | Rollout)
    )


def take_micro_batch(layout: RowLayout, tree: Any, number: jax.Array) -> Any:
    """Takes the rows of one micro-batch; see `RowLayout`.

    Args:
      layout: static.
      tree: pytree of this module with all rows.
      number: int32[], of the micro-batch.
    """
    return map_rows(lambda axis, x: layout.take(x, number, axis), tree)


def join_micro_batches(layout: RowLayout, micro_batches: Sequence[Any]) -> Any:
    """Joins pytrees of all micro-batches to one with all rows."""
    return map_rows(lambda axis, *arrays: layout.join(list(arrays), axis), *micro_batches)


@dataclasses.dataclass
class InitialImageQueue:
    """Initial images that wait for their refinement, oldest first; part of a checkpoint.

    Arrays have a fixed capacity; the first `count` entries wait.
    """

    count: np.ndarray  # int64[]
    row: np.ndarray  # int64[N], of the prompt in its file
    image: np.ndarray  # uint8[N, Hpx, Wpx, 3]
    reward: np.ndarray  # float64[N]

    @classmethod
    def empty(cls, capacity: int, height: int, width: int) -> "InitialImageQueue":
        """Returns a queue without entries."""
        return cls(
            count=np.zeros((), np.int64),
            row=np.zeros(capacity, np.int64),
            image=np.zeros((capacity, height, width, 3), np.uint8),
            reward=np.zeros(capacity),
        )

    def add(self, row: np.ndarray, image: np.ndarray, reward: np.ndarray) -> None:
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
        entries = {"row": row, "image": image, "reward": reward}
        for name, values in entries.items():
            vars(self)[name][begin:end] = values
        self.count = np.array(end, np.int64)

    def take(self, count: int) -> "InitialImageQueue":
        """Removes and returns the oldest `count` entries."""
        oldest = InitialImageQueue(
            np.array(count, np.int64),
            *(vars(self)[name][:count].copy() for name in ("row", "image", "reward")),
        )
        for name in ("row", "image", "reward"):
            array = vars(self)[name]
            array[:-count] = array[count:].copy()
            array[-count:] = 0
        self.count = self.count - count
        return oldest

    def progress(self) -> dict[str, list]:
        """Returns the numbers for a checkpoint's JSON part, which keeps every bit of them."""
        names = ("row", "reward")
        return {name: vars(self)[name][: int(self.count)].tolist() for name in names}

    @classmethod
    def restored(cls, image: np.ndarray, progress: Mapping[str, list]) -> "InitialImageQueue":
        """Rebuilds a queue from its images uint8[N, Hpx, Wpx, 3] and its `progress`."""
        queue = cls.empty(*image.shape[:3])
        count = len(progress["row"])
        row, reward = (np.asarray(progress[name]) for name in ("row", "reward"))
        queue.add(row, np.asarray(image)[:count], reward)
        return queue


@dataclasses.dataclass
class DataPosition:
    """Position of a run in its data; part of a checkpoint."""

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
    Initial rewards exist for refining tasks only and carry the same shaping as the totals; texts
    with a reward of their own have none.
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
