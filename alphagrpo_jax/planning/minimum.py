"""Counts the least work of a stage by the model's arithmetic: what its program is held against.

Counted is what the decoder does for texts and image steps: products with the layers' weights, with
adapters and with the output head, and attention. Inputs, autoencoder, ViT, what latents are read in
and out with, and norms are left out.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from alphagrpo_jax.flow.guidance import is_active
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.flops import attention_flops
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops.log_probs import LOGIT_POSITIONS
from alphagrpo_jax.planning.model import device_bytes
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.sampling.image import noise_levels
from alphagrpo_jax.sampling.trajectory import RolloutSpec, image_options
from alphagrpo_jax.tasks import PlannedStep
from alphagrpo_jax.training.update_loss import UpdateSpec
from alphagrpo_jax.types import Piece, Rollout

LAYERS, HEAD, GEN = "language_model/layers/", "lm_head/", "_moe_gen"
LAST = "/down_proj/"  # of a layer's products
# `model.remat` -> whether a gradient computes products with weights, and attention, once more.
COMPUTED_AGAIN = {"none": (0, 0), "dots": (0, 1), "full": (1, 1)}


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The least work of one call, per device; zeros where none is counted."""

    flops: float = 0.0  # what `model.remat` computes again included; 0: no ratio is shown
    model_flops: float = 0.0  # nothing computed again
    token_weights: float = 0.0  # bytes of what one token of a text is multiplied with
    token_caches: float = 0.0  # bytes of the keys and values that it looks at

    @property
    def token_bytes(self) -> float:
        """Bytes that must be read for a token of a text."""
        return self.token_weights + self.token_caches


UNCOUNTED = Minimum()


class Elements(NamedTuple):
    """Matrix elements that a token is multiplied with."""

    frozen: float = 0.0
    trained: float = 0.0
    adapters: float = 0.0
    last: float = 0.0  # of these, those of a layer's last product, which no derivative reads

    @property
    def forward(self) -> float:
        """Products of a forward pass."""
        return self.frozen + self.trained + self.adapters

    def gradient(self, again: int) -> float:
        """Products of a forward pass and its derivatives; `again` is 1 if layers are run again.

        All matrices take the derivative by their input; by themselves those that are trained.
        """
        repeated = again * (self.forward - self.last)
        return 2 * self.forward + repeated + self.trained + self.adapters


class Products(NamedTuple):
    """Matrix elements for tokens of both experts, and for those whose logits are needed."""

    und: Elements
    gen: Elements
    head: Elements


class Pass(NamedTuple):
    """Tokens that go through the decoder together."""

    times: float
    rows: int  # over all devices
    und: float  # tokens of a row
    gen: float
    context: float  # cached tokens that they look at
    among: float  # of the new tokens themselves, on average
    logits: float = 0.0  # tokens whose logits are computed


def products(base: dict, trainable: Any) -> Products:
    """Counts matrix elements by expert.

    Args:
      base: parameter tree.
      trainable: an adapter tree, the part of the base that is trained, or None.
    """
    counts = {name: [0.0] * 4 for name in Products._fields}
    changed: dict[str, Any] = traverse_util.flatten_dict(trainable or {}, sep="/")
    for path, leaf in traverse_util.flatten_dict(base, sep="/").items():
        if path.startswith((LAYERS, HEAD)) and path.endswith("/kernel"):
            expert = "head" if path.startswith(HEAD) else "gen" if GEN in path else "und"
            layer = path.removesuffix("kernel")
            sizes = [
                math.prod(changed[layer + x].shape) for x in ("a", "b") if layer + x in changed
            ]
            counts[expert][path in changed] += math.prod(leaf.shape)
            counts[expert][2] += sum(sizes)
            if layer.endswith(LAST):
                counts[expert][3] += math.prod(leaf.shape) + sum(sizes[1:])
    return Products(**{name: Elements(*numbers) for name, numbers in counts.items()})


def written_text(rows: int, tokens: int, pieces: Sequence[Piece | None], step: PlannedStep) -> Pass:
    """Returns the work of `tokens` tokens of a text, of all of which logits are computed."""
    context = _slots(pieces, step.gen)
    return Pass(1.0, rows, tokens, 0.0, context, (tokens + 1) / 2, tokens)


def image_steps(
    rows: int,
    spec: RolloutSpec,
    pieces: Sequence[Piece | None],
    step: PlannedStep,
    *,
    trained: bool,
    unguided: bool = False,
) -> Iterator[Pass]:
    """Lists the work of an image's steps: one pass for every branch of their guidance.

    Args:
      rows: over all devices.
      spec: of the trajectories.
      pieces: of contexts, by node.
      step: the image's.
      trained: True for the steps that are trained: their window may lie anywhere in its range, and
        the mean over that stands for them; False for all steps of the schedule.
      unguided: True where no guidance is computed, whatever the options.
    """
    options, latents = image_options(spec.options, step), math.prod(spec.grid)
    levels, times = noise_levels(options)[:-1], 1.0
    if trained:
        levels = levels[slice(*options.window_range)]
        times = options.window / len(levels)
    guidance = options.guidance
    guided = 0.0 if unguided else times * sum(is_active(guidance, level) for level in levels)
    for count, nodes in (
        (times * len(levels), step.gen),
        (guided, step.cfg_text),
        (guided if guidance.uses_image else 0.0, step.cfg_img),
    ):
        if count:  # two delimiters stand around the latents
            yield Pass(count, rows, 2, latents, _slots(pieces, nodes), latents + 2)


def trained_passes(rows: int, spec: UpdateSpec, rollout: Rollout) -> list[Pass]:
    """Lists the forward passes of an update: texts and image steps that its loss reads."""
    pieces, passes = rollout.pieces, list[Pass]()
    if spec.loss.text != "none":
        for step in spec.plan.text_steps:
            tokens = rollout.texts[step.index].tokens.shape[1] - 1  # the last one predicts nothing
            passes.append(written_text(rows, tokens, pieces, step))
    if spec.loss.image != "none":
        for step in spec.plan.image_steps:
            options = {"trained": True, "unguided": spec.loss.matches}
            passes.extend(image_steps(rows, spec.rollout, pieces, step, **options))
    return passes


def _slots(pieces: Sequence[Piece | None], nodes: Sequence[int]) -> int:
    """Counts the cached tokens of a context, padding included."""
    used = [pieces[node] for node in nodes]
    return sum(segment.valid.shape[1] for piece in used if piece for segment in piece.segments)


def forward_flops(model: BagelConfig, elements: Products, passes: Iterable[Pass]) -> float:
    """Counts the FLOPs of forward passes, over all devices."""
    forward = [expert.forward for expert in elements]
    total = 0.0
    for tokens in passes:
        flops = 2.0 * tokens.rows * _by_token(tokens, forward)
        total += tokens.times * (flops + _attention(model, tokens, tokens.context + tokens.among))
    return total


def gradient_flops(
    model: BagelConfig, elements: Products, passes: Iterable[Pass], remat: str | None
) -> float:
    """Counts the FLOPs of forward passes and their derivatives, over all devices.

    Attention has two products forward. Backward it has four with keys and values of the new
    tokens, and two with those of the context, which is a constant.

    Args:
      model: sizes of the policy.
      elements: matrices, those that are trained among them.
      passes: forward.
      remat: as `model.remat`: what the backward pass computes again is counted. None: nothing is,
        not even logits, which the gradient of a long text always computes again.
    """
    weights, attention = COMPUTED_AGAIN[remat or "none"]
    total = 0.0
    for tokens in passes:
        logits = weights or int(remat is not None and tokens.logits > LOGIT_POSITIONS)
        again = (weights, weights, logits)
        counts = [expert.gradient(more) for expert, more in zip(elements, again, strict=True)]
        flops = 2.0 * tokens.rows * _by_token(tokens, counts)
        keys = (1 + attention) * (tokens.context + tokens.among)
        keys += tokens.context + 2 * tokens.among
        total += tokens.times * (flops + _attention(model, tokens, keys))
    return total


def _by_token(tokens: Pass, counts: Sequence[float]) -> float:
    """Adds up products per row: counts of both experts and of the head times their tokens."""
    pairs = zip(counts, (tokens.und, tokens.gen, tokens.logits), strict=True)
    return sum(count * number for count, number in pairs)


def _attention(model: BagelConfig, tokens: Pass, keys: float) -> float:
    return attention_flops(model, tokens.rows, tokens.und + tokens.gen, keys)


def token_weights(params: PolicyParams, dtype: Any) -> float:
    """Returns the bytes per device of all that a token of a text is multiplied with.

    These are its expert's layers, their adapters and the output head, in the dtype of the products:
    whatever they are stored in, they could be converted once for all tokens.
    """
    trees: dict[str, Any] = {"base": params.base, "lora": params.lora or {}}
    flat = traverse_util.flatten_dict(trees, sep="/")
    read = [
        jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        for path, leaf in flat.items()
        if path.partition("/")[2].startswith((LAYERS, HEAD)) and GEN not in path
    ]
    return device_bytes(read)


def token_caches(ctx: Context, text: Piece, steps: int) -> float:
    """Returns the bytes per device of keys and values that a text's token looks at, on average.

    Args:
      ctx: context of the texts, as it is laid out: what rows share is read once.
      text: the piece that the texts become.
      steps: tokens of a text; half of it is written, on average.
    """
    pairs = [
        [(segment.k, segment.v) for segment in segments]
        for segments in (ctx.segments, text.segments)
    ]
    contexts, texts = (device_bytes(arrays) for arrays in pairs)
    slots_of_text = sum(segment.valid.shape[1] for segment in text.segments)
    return contexts + texts * (steps + 1) / 2 / slots_of_text
