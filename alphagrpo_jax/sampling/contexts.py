"""Contexts of trajectories, put together from the pieces that their events add."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.runtime.images import fitted_size
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
    Piece,
    Rollout,
    TextBlock,
    TextSample,
    map_rows,
    row_count,
)  # fmt: skip

Inputs = tuple[TextBlock | ImageBlock, ...]


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
            block = event_block(plan, node, trajectories.inputs, trajectories.texts, system_tokens)
        pieces.append(extend(model, params, pieces, node, block))
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


def context(
    pieces: Sequence[Piece | None], nodes: tuple[int, ...], owner: jax.Array, *, sharing: int = 1
) -> Context:
    """Joins the pieces of some nodes into a context of B rows.

    Args:
      pieces: by node.
      nodes: numbers of the context's nodes, in order.
      owner: int32[B], number of each row's prompt, by which pieces of prompts are taken.
      sharing: static; so many neighboring rows, B a multiple, have one owner, and share what is
        their prompt's.
    Raises:
      ValueError: a piece is still to be computed.
    """
    ctx = kv_cache.empty(owner.shape[0])
    for index in nodes:
        piece = pieces[index]
        if piece is None:
            raise ValueError(f"got no piece of node {index} of a context; compute it first")
        if piece.level == "prompt":
            piece = take_rows(piece, owner[::sharing])
        advance = jnp.repeat(piece.advance, owner.shape[0] // piece.advance.shape[0])
        shared = piece.level == "shared" or (piece.level == "prompt" and sharing > 1)
        segments = [dataclasses.replace(segment, shared=shared) for segment in piece.segments]
        ctx = Context((*ctx.segments, *segments), ctx.rope + advance)
    return ctx


def guidance_contexts(
    pieces: Sequence[Piece | None], step: PlannedStep, owner: jax.Array, *, sharing: int = 1
) -> GuidanceContexts:
    """Joins the three contexts of an image step, each merged; see `context`."""
    return GuidanceContexts(
        *(
            kv_cache.merge(context(pieces, nodes, owner, sharing=sharing))
            for nodes in (step.gen, step.cfg_text, step.cfg_img)
        )
    )


def pixels(
    model: Bagel, params: policy.PolicyParams, latents: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Decodes latents float32[B, M, C] to uint8[B, Hpx, Wpx, 3], truncated as officially."""
    images = policy.decode_latents(model, params, latents, grid)
    return ((images * 0.5 + 0.5) * 255.0).astype(jnp.uint8)


def take_rows(tree: Any, rows: jax.Array) -> Any:
    """Takes the rows `rows` (int32[B]) of pytrees of `types`."""
    return map_rows(lambda axis, x: jnp.take(x, rows, axis=axis), tree)


def first_rows(tree: Any, count: int) -> Any:
    """Takes the first `count` rows of pytrees of `types`."""
    return map_rows(lambda axis, x: jax.lax.slice_in_dim(x, 0, count, axis=axis), tree)


def with_pieces(
    pieces: Sequence[Piece | None], new: Mapping[int, Piece]
) -> tuple[Piece | None, ...]:
    """Puts new pieces, by node, among the others."""
    return tuple(new.get(index, piece) for index, piece in enumerate(pieces))


def fill_pieces(
    model: Bagel,
    params: policy.PolicyParams,
    rows: Rollout,
    nodes: Sequence[int],
    *,
    plan: Plan,
    system_tokens: tuple[int, ...],
    sharing: int,
) -> tuple[tuple[Piece | None, ...], dict[int, Piece]]:
    """Computes the pieces of inputs and texts that these nodes lack; returns all, and the new."""
    pieces = list(rows.pieces)
    new: dict[int, Piece] = {}
    for index in nodes:
        if pieces[index] is None:
            node = plan.nodes[index]
            block = event_block(plan, node, rows.inputs, rows.texts, system_tokens)
            pieces[index] = new[index] = extend(
                model, params, pieces, node, block, rows.owner, sharing=sharing
            )
    return tuple(pieces), new


def event_block(
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


def extend(
    model: Bagel,
    params: policy.PolicyParams,
    pieces: Sequence[Piece | None],
    node: Node,
    block: TextBlock | ImageBlock,
    owner: jax.Array | None = None,
    *,
    sharing: int = 1,
) -> Piece:
    """Computes the piece that a block adds to a node's context.

    `owner` int32[B] is needed where the context has pieces of prompts and the block has one row
    for each trajectory; for `sharing` see `context`.
    """
    owner = jnp.arange(row_count((block,))) if owner is None else owner
    before = context(pieces, node.before, owner, sharing=sharing)
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
