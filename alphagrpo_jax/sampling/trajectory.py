"""Samples trajectories: a task's events over its contexts, texts and images in order.

Texts are written for all rows at once, images by micro-batches. What compiles longest, the two
loops, takes contexts and row numbers alone: so tasks, training and evaluation share it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.config import ImageOptions, RolloutOptions
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.images import fitted_size
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.sampling import image, text
from alphagrpo_jax.tasks import (
    ANSWER,
    BATCHED,
    IMAGE,
    SEEN_IMAGE,
    SYSTEM,
    THINK,
    Node,
    Plan,
    PlannedStep,
)  # fmt: skip
from alphagrpo_jax.types import (
    ImageBlock,
    ImageSample,
    Piece,
    Rollout,
    TextBlock,
    TextSample,
    join_micro_batches,
    map_rows,
    row_count,
    take_micro_batch,
)  # fmt: skip

Inputs = tuple[TextBlock | ImageBlock, ...]


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """Everything that a rollout is compiled for; hashable, a static argument of jit."""

    plan: Plan
    system_tokens: tuple[int, ...]  # ids of the system prompt with its delimiters; may be empty
    grid: tuple[int, int]  # latent token rows and columns of an image
    rows_per_prompt: int
    stochastic: bool  # whether image steps have a stochastic window, which training needs
    options: RolloutOptions
    shards: int = 1  # of the mesh, over which rows lie
    micro_batch: int = 1 << 20  # most images at once over all shards

    def layout(self, rows: int) -> RowLayout:
        """Returns how so many rows lie on the mesh."""
        return RowLayout.make(rows, shards=self.shards, micro_batch=self.micro_batch)


class Images(NamedTuple):
    """Images of one step, of a micro-batch or of all rows."""

    sample: ImageSample
    pixels: jax.Array  # uint8[B, Hpx, Wpx, 3]
    pieces: dict[int, Piece]  # by node: what their contexts needed, and their own


def sample_trajectories(
    model: Bagel,
    params: policy.PolicyParams,
    inputs: Inputs,
    key: jax.Array,
    first: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    *,
    spec: RolloutSpec,
) -> tuple[Rollout, jax.Array | None]:
    """Samples `rows_per_prompt` trajectories for each of P prompts: `prefill`, then `generate`.

    A trajectory depends on its own inputs, its number in the update and the key; not on how the
    update is cut into calls.

    Args:
      model: static.
      params: the policy.
      inputs: one block of P rows per input of the task, in order.
      key: typed key[] of the update.
      first: int32[], number of the first trajectory of this call in the update.
      start: int32[], first stochastic image step; beyond the schedule's end there is none.
      temperature: float32[], of texts; 0 is greedy.
      spec: static.
    Returns:
      The trajectories, and uint8[B, Hpx, Wpx, 3], the images of the last image step, if any.
    """
    params = sampling_params(params, merge_lora=spec.options.merge_lora)
    prefix = prefill(model, params, inputs, spec=spec)
    return generate(model, params, prefix, key, first, start, temperature, spec=spec)


def sampling_params(params: policy.PolicyParams, *, merge_lora: bool) -> policy.PolicyParams:
    """Returns the weights of rollouts: adapters folded into a copy of the base, or unchanged."""
    if not merge_lora or params.lora is None:
        return params
    return policy.PolicyParams(base=lora.merge(params.base, params.lora, params.lora_scale))


def prefill(
    model: Bagel,
    params: policy.PolicyParams,
    inputs: Inputs,
    *,
    spec: RolloutSpec,
) -> Rollout:
    """Computes the contexts of the inputs of P prompts; the rollout has no samples yet.

    What all prompts share is computed and kept once, what belongs to a prompt once per prompt;
    pieces of generated events are None.
    """
    plan, group, prompts = spec.plan, spec.rows_per_prompt, row_count(inputs)
    layout = spec.layout(prompts * group)
    blocks = inputs
    if group > 1 and spec.shards > 1:
        # Few prompts, many devices: each computes some, then all get all.
        spread = jnp.minimum(jnp.arange(-(-prompts // spec.shards) * spec.shards), prompts - 1)
        blocks = sharding.constrain_rows(_take_rows(inputs, spread))
    pieces: list[Piece | None] = [None] * len(plan.nodes)
    for index, node in enumerate(plan.nodes):
        if node.level != "trajectory":
            block = _block(plan, node, blocks, (), spec.system_tokens)
            pieces[index] = _extend(model, params, pieces, node, block)
    owner = jnp.minimum(jnp.arange(layout.rows, dtype=jnp.int32) // group, prompts - 1)
    for index, piece in enumerate(pieces):
        if piece is None or plan.nodes[index].level == "shared":
            continue
        if group == 1:
            pieces[index] = piece if layout.rows == prompts else _take_rows(piece, owner)
        else:
            pieces[index] = dataclasses.replace(_first_rows(piece, prompts), level="prompt")
    return Rollout(
        inputs=_take_rows(inputs, owner), owner=owner, pieces=tuple(pieces), texts=(), images=()
    )


def generate(
    model: Bagel,
    params: policy.PolicyParams,
    prefix: Rollout,
    key: jax.Array,
    first: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    *,
    spec: RolloutSpec,
) -> tuple[Rollout, jax.Array | None]:
    """Runs the task's steps over the contexts of `prefill`, all rows at once.

    See `sample_trajectories`. A run samples step by step, by `training.sampling.run_steps`, to the
    same numbers.
    """
    rollout, images = prefix, None
    count = prefix.owner.shape[0]
    spec = dataclasses.replace(spec, shards=1, micro_batch=count)
    rows = first + jnp.arange(count, dtype=jnp.int32)
    for step in spec.plan.steps:
        event = jnp.int32(step.event)
        if step.kind != IMAGE:
            ctx, pieces = text_context(model, params, rollout, step=step, spec=spec)
            limits = {"max_tokens": spec.options.text_tokens, "top_p": spec.options.top_p}
            written = write_text(model, params, ctx, key, event, rows, temperature, **limits)
            rollout = add_text(rollout, *written, pieces, step=step)
            continue
        contexts, pieces = image_contexts(
            model, params, rollout, jnp.int32(0), step=step, spec=spec
        )
        numbers = (rows, noise_owners(rows, spec), start)
        sample, images = draw_image(
            model, params, contexts, key, event, *numbers,
            options=image_options(spec.options, step), grid=spec.grid, stochastic=spec.stochastic,
        )  # fmt: skip
        if step.node is not None:
            pieces[step.node] = absorb_image(
                model, params, rollout, images, pieces, jnp.int32(0),
                step=step, spec=spec,
            )  # fmt: skip
        rollout = add_images(rollout, [Images(sample, images, pieces)], spec=spec)
    return rollout, images


def text_context(
    model: Bagel,
    params: policy.PolicyParams,
    rollout: Rollout,
    *,
    step: PlannedStep,
    spec: RolloutSpec,
) -> tuple[Context, dict[int, Piece]]:
    """Joins the context of a text step, merged, and computes what it lacks.

    Args:
      rollout: all rows.
      step, spec: static.
    Returns:
      The context of all rows, and new pieces by node.
    """
    pieces, new = _filled(model, params, rollout, step.gen, spec)
    return kv_cache.merge(context(pieces, step.gen, rollout.owner)), new


def write_text(
    model: Bagel,
    params: policy.PolicyParams,
    ctx: Context,
    key: jax.Array,
    event: jax.Array,
    rows: jax.Array,
    temperature: jax.Array,
    *,
    max_tokens: int,
    top_p: float,
) -> tuple[TextSample, Piece]:
    """Writes one text per row.

    Args:
      ctx: context of B rows, merged.
      key: typed key[] of the update.
      event: int32[], number of the step's event in its task.
      rows: int32[B], numbers of the rows in the update; a row's text depends on its own alone.
      temperature: float32[].
      max_tokens, top_p: static; see `text.sample_text`.
    Returns:
      The texts, and the piece that they add to their contexts.
    """
    sample, after = text.sample_text(
        model,
        params,
        ctx,
        _row_keys(jax.random.fold_in(key, event), rows),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    return sample, Piece(after.segments[-1:], after.rope - ctx.rope)


def add_text(
    rollout: Rollout,
    sample: TextSample,
    piece: Piece,
    pieces: Mapping[int, Piece],
    *,
    step: PlannedStep,
) -> Rollout:
    """Appends the texts of a step, and their piece if a later step reads it."""
    own = {} if step.node is None else {step.node: piece}
    return dataclasses.replace(
        rollout,
        pieces=_with_pieces(rollout.pieces, {**pieces, **own}),
        texts=(*rollout.texts, sample),
    )


def cut_text(rollout: Rollout, length: int, *, step: PlannedStep) -> Rollout:
    """Cuts the texts of the newest text step, and their piece, to `length` slots."""
    sample = rollout.texts[-1]
    longest = sample.tokens.shape[1]
    drop = longest - length
    texts = TextSample(
        tokens=sample.tokens[:, :length],
        mask=sample.mask[:, :length],
        scored=sample.scored[:, : longest - 1 - drop],
        log_prob=sample.log_prob[:, : longest - 1 - drop],
        truncated=sample.truncated,
    )
    pieces = list(rollout.pieces)
    piece = None if step.node is None else pieces[step.node]
    if step.node is not None and piece is not None:
        segment = piece.segments[0]
        short = kv_cache.Segment(
            segment.k[:, :, :length], segment.v[:, :, :length], segment.valid[:, :length]
        )
        pieces[step.node] = dataclasses.replace(piece, segments=(short,))
    return dataclasses.replace(rollout, pieces=tuple(pieces), texts=(*rollout.texts[:-1], texts))


def image_contexts(
    model: Bagel,
    params: policy.PolicyParams,
    rollout: Rollout,
    number: jax.Array,
    *,
    step: PlannedStep,
    spec: RolloutSpec,
) -> tuple[GuidanceContexts, dict[int, Piece]]:
    """Joins the contexts of a micro-batch of an image step, and computes what they lack.

    Args:
      rollout: all rows.
      number: int32[], of the micro-batch.
      step, spec: static.
    Returns:
      The contexts, merged, and new pieces by node, both of the micro-batch.
    """
    rows = take_micro_batch(spec.layout(rollout.owner.shape[0]), rollout, number)
    nodes = (*step.gen, *step.cfg_text, *step.cfg_img)
    pieces, new = _filled(model, params, rows, nodes, spec)
    return guidance_contexts(pieces, step, rows.owner), new


def draw_image(
    model: Bagel,
    params: policy.PolicyParams,
    contexts: GuidanceContexts,
    key: jax.Array,
    event: jax.Array,
    rows: jax.Array,
    owners: jax.Array,
    start: jax.Array,
    *,
    options: ImageOptions,
    grid: tuple[int, int],
    stochastic: bool,
) -> tuple[ImageSample, jax.Array]:
    """Samples one image per row, each from its trajectory's own keys.

    Args:
      contexts: of B rows, merged.
      key: typed key[] of the update.
      event: int32[], number of the step's event in its task.
      rows: int32[B], numbers of the rows in the update.
      owners: int32[B]; rows of one number start from the same noise.
      start: int32[], first stochastic step.
      options, grid, stochastic: static.
    Returns:
      The samples and their pixels, uint8[B, Hpx, Wpx, 3].
    """
    chex.assert_rank([rows, owners, start], [1, 1, 0])
    (high, wide), width = grid, model.config.latent_width
    initial_keys, noise_keys = jax.random.split(jax.random.fold_in(key, event))
    sample_noise = functools.partial(
        jax.random.normal, shape=(high * wide, width), dtype=jnp.float32
    )
    initial = jax.vmap(sample_noise)(_row_keys(initial_keys, owners))
    sample = image.sample_image(
        model,
        params,
        contexts,
        initial,
        _row_keys(noise_keys, rows),
        start,
        options=options,
        grid=grid,
        stochastic=stochastic,
    )
    return sample, pixels(model, params, sample.latents, grid)


def noise_owners(rows: Any, spec: RolloutSpec) -> Any:
    """Returns the numbers by which rows start from the same noise: their own or their group's."""
    return rows // spec.rows_per_prompt if spec.options.shared_noise else rows


def absorb_image(
    model: Bagel,
    params: policy.PolicyParams,
    rollout: Rollout,
    images: jax.Array,
    pieces: Mapping[int, Piece],
    number: jax.Array,
    *,
    step: PlannedStep,
    spec: RolloutSpec,
) -> Piece:
    """Computes what a micro-batch of generated images adds to their contexts.

    Args:
      rollout: all rows.
      images: uint8[B, Hpx, Wpx, 3], of the micro-batch.
      pieces: of the micro-batch, from `image_contexts`.
      number: int32[], of the micro-batch.
      step, spec: static.
    """
    rows = take_micro_batch(spec.layout(rollout.owner.shape[0]), rollout, number)
    assert step.node is not None  # a later step reads the images
    node, complete = spec.plan.nodes[step.node], _with_pieces(rows.pieces, pieces)
    return _extend(model, params, complete, node, image_block(model, images), rows.owner)


def add_images(rollout: Rollout, micro_batches: Sequence[Images], *, spec: RolloutSpec) -> Rollout:
    """Appends the images of a step, and their pieces, from all its micro-batches."""
    layout = spec.layout(rollout.owner.shape[0])
    joined: Images = join_micro_batches(layout, micro_batches)
    return dataclasses.replace(
        rollout,
        pieces=_with_pieces(rollout.pieces, joined.pieces),
        images=(*rollout.images, joined.sample),
    )


def rebuild(
    model: Bagel,
    params: policy.PolicyParams,
    trajectories: Rollout,
    *,
    plan: Plan,
    system_tokens: tuple[int, ...],
    grid: tuple[int, int],
) -> tuple[Piece, ...]:
    """Computes the context pieces of trajectories again from their tokens, under other parameters.

    Used where the context takes part in the gradient, and for the reference policy. The pixels of
    generated images are constants.

    Args:
      grid: rows and columns of an image's latent tokens.
    """
    pieces: list[Piece] = []
    by_event = {step.event: step for step in plan.steps}
    for node in plan.nodes:
        if node.kind == IMAGE:
            latents = trajectories.images[by_event[node.event].index].latents
            block = image_block(model, pixels(model, params, latents, grid))
        else:
            block = _block(plan, node, trajectories.inputs, trajectories.texts, system_tokens)
        pieces.append(_extend(model, params, pieces, node, block))
    return tuple(pieces)


def image_block(model: Bagel, images: jax.Array) -> ImageBlock:
    """Prepares generated images uint8[B, Hpx, Wpx, 3] for a context.

    For the ViT they are resized on the device where its size differs: cubic and antialiased as
    Pillow resizes a user's image, equal to it within a few levels of 255.
    """
    rows, height, width, _ = images.shape
    wide, high = fitted_size(width, height, model.config.vit_transform)
    vit_images = images
    if (high, wide) != (height, width):
        floats = jax.image.resize(
            images.astype(jnp.float32), (rows, high, wide, 3), "cubic", antialias=True
        )
        vit_images = jnp.clip(jnp.round(floats), 0, 255).astype(jnp.uint8)
    return ImageBlock(images, vit_images)


def context(pieces: Sequence[Piece | None], nodes: tuple[int, ...], owner: jax.Array) -> Context:
    """Joins the pieces of some nodes into a context of B rows.

    Args:
      pieces: by node.
      nodes: numbers of the context's nodes, in order.
      owner: int32[B], number of each row's prompt, by which pieces of prompts are taken.
    Raises:
      ValueError: a piece is still to be computed.
    """
    ctx = kv_cache.empty(owner.shape[0])
    for index in nodes:
        piece = pieces[index]
        if piece is None:
            raise ValueError(f"got no piece of node {index} of a context; compute it first")
        if piece.level == "prompt":
            piece = _take_rows(piece, owner)
        added = kv_cache.broadcast(Context(piece.segments, piece.advance), owner.shape[0])
        ctx = Context((*ctx.segments, *added.segments), ctx.rope + added.rope)
    return ctx


def guidance_contexts(
    pieces: Sequence[Piece | None], step: PlannedStep, owner: jax.Array
) -> GuidanceContexts:
    """Joins the three contexts of an image step, each merged into one segment."""
    return GuidanceContexts(
        *(
            kv_cache.merge(context(pieces, nodes, owner))
            for nodes in (step.gen, step.cfg_text, step.cfg_img)
        )
    )


def pixels(
    model: Bagel, params: policy.PolicyParams, latents: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Decodes latents float32[B, M, C] to uint8[B, Hpx, Wpx, 3], truncated as officially."""
    images = policy.decode_latents(model, params, latents, grid)
    return ((images * 0.5 + 0.5) * 255.0).astype(jnp.uint8)


def _take_rows(tree: Any, rows: jax.Array) -> Any:
    """Takes the rows `rows` (int32[B]) of pytrees of `types`."""
    return map_rows(lambda axis, x: jnp.take(x, rows, axis=axis), tree)


def _first_rows(tree: Any, count: int) -> Any:
    """Takes the first `count` rows of pytrees of `types`."""
    return map_rows(lambda axis, x: jax.lax.slice_in_dim(x, 0, count, axis=axis), tree)


def _with_pieces(
    pieces: Sequence[Piece | None], new: Mapping[int, Piece]
) -> tuple[Piece | None, ...]:
    """Puts new pieces, by node, among the others."""
    return tuple(new.get(index, piece) for index, piece in enumerate(pieces))


def _filled(
    model: Bagel,
    params: policy.PolicyParams,
    rows: Rollout,
    nodes: Sequence[int],
    spec: RolloutSpec,
) -> tuple[tuple[Piece | None, ...], dict[int, Piece]]:
    """Computes the pieces of inputs and texts that these nodes lack; returns all, and the new."""
    plan, pieces = spec.plan, list(rows.pieces)
    new: dict[int, Piece] = {}
    for index in nodes:
        if pieces[index] is None:
            node = plan.nodes[index]
            block = _block(plan, node, rows.inputs, rows.texts, spec.system_tokens)
            pieces[index] = new[index] = _extend(model, params, pieces, node, block, rows.owner)
    return tuple(pieces), new


def _block(
    plan: Plan,
    node: Node,
    inputs: Inputs,
    texts: tuple[TextSample, ...],
    system_tokens: tuple[int, ...],
) -> TextBlock | ImageBlock:
    """Returns what an event adds to a context: an input, or a sampled text."""
    if node.kind == SYSTEM:
        tokens = jnp.asarray(system_tokens, jnp.int32)[None]
        return TextBlock(tokens, jnp.ones(tokens.shape, bool))
    before = plan.events[: node.event]
    if node.kind in BATCHED:
        return inputs[sum(event in BATCHED for event in before)]
    sample = texts[sum(event in (THINK, ANSWER) for event in before)]
    return TextBlock(sample.tokens, sample.mask)


def _extend(
    model: Bagel,
    params: policy.PolicyParams,
    pieces: Sequence[Piece | None],
    node: Node,
    block: TextBlock | ImageBlock,
    owner: jax.Array | None = None,
) -> Piece:
    """Computes the piece that a block adds to a node's context.

    `owner` int32[B] is needed where the context has pieces of prompts and the block has one row
    for each trajectory.
    """
    count = row_count((block,))
    before = context(pieces, node.before, jnp.arange(count) if owner is None else owner)
    if isinstance(block, TextBlock):
        after, _ = policy.extend_text(model, params, before, block.tokens, block.mask)
    elif node.kind == SEEN_IMAGE:
        patches = patchify(_to_signed_unit(block.vit_pixels), model.config.vit.patch_size)
        grid = model.config.vit_grid(*block.vit_pixels.shape[1:3])
        after = policy.extend_vit(model, params, before, patches, grid)
    else:
        images = (_to_signed_unit(block.pixels), _to_signed_unit(block.vit_pixels))
        after = policy.extend_image(model, params, before, *images)
    level = "shared" if node.level == "shared" else "trajectory"
    return Piece(after.segments[len(before.segments) :], after.rope - before.rope, level)


def _to_signed_unit(images: jax.Array) -> jax.Array:
    """Scales uint8 pixels to float32 in [-1, 1]."""
    return (images.astype(jnp.float32) / 255.0 - 0.5) / 0.5


def image_options(options: RolloutOptions, step: PlannedStep) -> ImageOptions:
    """Returns the options of one image step: behind another image, guidance is that of edits."""
    names = [field.name for field in dataclasses.fields(ImageOptions)]
    chosen = ImageOptions(**{name: getattr(options, name) for name in names})
    return dataclasses.replace(chosen, guidance=options.edit_guidance) if step.edits else chosen


def _row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Derives one key per row number, typed key[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
