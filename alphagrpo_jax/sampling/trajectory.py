"""Samples trajectories: a task's events over its contexts, texts and images in order."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.config import RolloutOptions
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.runtime.images import fitted_size
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
    map_rows,
    row_count,
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
    """Computes the contexts of the inputs: B = P * rows_per_prompt rows without samples.

    What all prompts share is computed once, what belongs to a prompt once per prompt; pieces of
    generated events are None.
    """
    plan, group = spec.plan, spec.rows_per_prompt
    pieces: list[Piece | None] = [None] * len(plan.nodes)
    for index, node in enumerate(plan.nodes):
        if node.level != "trajectory":
            block = _block(plan, node, inputs, (), spec.system_tokens)
            pieces[index] = _extend(model, params, pieces, node, block)
    per_row = (
        piece if piece is None or node.level == "shared" else repeat_rows(piece, group)
        for piece, node in zip(pieces, plan.nodes, strict=True)
    )
    row_inputs = tuple(repeat_rows(block, group) for block in inputs)
    return Rollout(inputs=row_inputs, pieces=tuple(per_row), texts=(), images=())


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
    """Runs the task's steps over the contexts of `prefill`; see `sample_trajectories`."""
    plan, grid = spec.plan, spec.grid
    pieces = list(prefix.pieces)
    rows = first + jnp.arange(row_count(prefix.inputs), dtype=jnp.int32)
    texts: list[TextSample] = []
    images: list[ImageSample] = []
    image_blocks: dict[int, ImageBlock] = {}  # by event

    def fill(nodes: tuple[int, ...]) -> None:
        """Computes the pieces of inputs and samples that come after the first step."""
        for index in nodes:
            if pieces[index] is None:
                node = plan.nodes[index]
                block = image_blocks.get(node.event) or _block(
                    plan, node, prefix.inputs, tuple(texts), spec.system_tokens
                )
                pieces[index] = _extend(model, params, pieces, node, block)

    for step in plan.steps:
        fill((*step.gen, *step.cfg_text, *step.cfg_img))
        if step.kind == IMAGE:
            images.append(_sample_image(model, params, step, pieces, key, rows, start, spec))
            if step.node is not None:
                image_pixels = pixels(model, params, images[-1].latents, grid)
                image_blocks[step.event] = image_block(model, image_pixels)
            continue
        ctx = context(pieces, step.gen, rows.shape[0])
        sample, after = text.sample_text(
            model,
            params,
            ctx,
            _row_keys(key, rows, step.event),
            max_tokens=spec.options.text_tokens,
            temperature=temperature,
            top_p=spec.options.top_p,
        )
        texts.append(sample)
        if step.node is not None:
            pieces[step.node] = Piece(after.segments[-1:], after.rope - ctx.rope)
    fill(tuple(range(len(plan.nodes))))
    rollout = dataclasses.replace(
        prefix, pieces=tuple(pieces), texts=tuple(texts), images=tuple(images)
    )
    last_images = pixels(model, params, images[-1].latents, grid) if images else None
    return rollout, last_images


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


def context(pieces: Sequence[Piece | None], nodes: tuple[int, ...], rows: int) -> Context:
    """Joins the pieces of some nodes into a context of `rows` rows.

    Raises:
      ValueError: a piece is still to be computed.
    """
    ctx = kv_cache.empty(rows)
    for index in nodes:
        piece = pieces[index]
        if piece is None:
            raise ValueError(f"got no piece of node {index} of a context; compute it first")
        added = kv_cache.broadcast(Context(piece.segments, piece.advance), rows)
        ctx = Context((*ctx.segments, *added.segments), ctx.rope + added.rope)
    return ctx


def guidance_contexts(
    pieces: Sequence[Piece | None], step: PlannedStep, rows: int
) -> GuidanceContexts:
    """Joins the three contexts of an image step, each merged into one segment."""
    return GuidanceContexts(
        *(
            kv_cache.merge(context(pieces, nodes, rows))
            for nodes in (step.gen, step.cfg_text, step.cfg_img)
        )
    )


def pixels(
    model: Bagel, params: policy.PolicyParams, latents: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Decodes latents float32[B, M, C] to uint8[B, Hpx, Wpx, 3], truncated as officially."""
    images = policy.decode_latents(model, params, latents, grid)
    return ((images * 0.5 + 0.5) * 255.0).astype(jnp.uint8)


def repeat_rows(tree: Any, count: int) -> Any:
    """Repeats every row `count` times, one after the other."""
    return map_rows(lambda axis, x: jnp.repeat(x, count, axis=axis), tree)


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
) -> Piece:
    """Computes the piece that a block adds to a node's context."""
    before = context(pieces, node.before, row_count((block,)))
    if isinstance(block, TextBlock):
        after, _ = policy.extend_text(model, params, before, block.tokens, block.mask)
    elif node.kind == SEEN_IMAGE:
        patches = patchify(_to_signed_unit(block.vit_pixels), model.config.vit.patch_size)
        grid = model.config.vit_grid(*block.vit_pixels.shape[1:3])
        after = policy.extend_vit(model, params, before, patches, grid)
    else:
        images = (_to_signed_unit(block.pixels), _to_signed_unit(block.vit_pixels))
        after = policy.extend_image(model, params, before, *images)
    return Piece(after.segments[len(before.segments) :], after.rope - before.rope)


def _to_signed_unit(images: jax.Array) -> jax.Array:
    """Scales uint8 pixels to float32 in [-1, 1]."""
    return (images.astype(jnp.float32) / 255.0 - 0.5) / 0.5


def _sample_image(
    model: Bagel,
    params: policy.PolicyParams,
    step: PlannedStep,
    pieces: Sequence[Piece | None],
    key: jax.Array,
    rows: jax.Array,
    start: jax.Array,
    spec: RolloutSpec,
) -> ImageSample:
    """Samples the images of one step, each from its trajectory's own keys."""
    chex.assert_rank([rows, start], [1, 0])
    (high, wide), width = spec.grid, model.config.latent_width
    # The number in the update, or that of the group, whose members then start from the same noise.
    owners = rows // spec.rows_per_prompt if spec.options.shared_noise else rows
    initial_keys, noise_keys = jax.random.split(jax.random.fold_in(key, step.event))
    initial_keys = jax.vmap(jax.random.fold_in, (None, 0))(initial_keys, owners)
    noise_keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_keys, rows)
    shape = (high * wide, width)
    sample_noise = functools.partial(jax.random.normal, shape=shape, dtype=jnp.float32)
    initial = jax.vmap(sample_noise)(initial_keys)
    contexts = guidance_contexts(pieces, step, rows.shape[0])
    return image.sample_image(
        model,
        params,
        contexts,
        initial,
        noise_keys,
        start,
        options=step_options(spec.options, step),
        grid=spec.grid,
        stochastic=spec.stochastic,
    )


def step_options(options: RolloutOptions, step: PlannedStep) -> RolloutOptions:
    """Returns the options of one image step: behind another image, guidance is that of edits."""
    return dataclasses.replace(options, guidance=options.edit_guidance) if step.edits else options


def _row_keys(key: jax.Array, rows: jax.Array, event: int) -> jax.Array:
    """Derives one key per trajectory for one event, typed key[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, event), rows)
