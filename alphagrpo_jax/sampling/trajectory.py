"""Stage 2: runs a task's events over its contexts, writing texts and drawing images."""

import dataclasses
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
    """What a rollout compiles for; hashable, a static argument of jit."""

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
    """Draws `rows_per_prompt` trajectories for each of P prompts: `prefill`, then `generate`.

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
      The trajectories, and uint8[B, Hpx, Wpx, 3], what the last image step drew, if any.
    """
    params = sampling_params(params, merge_lora=spec.options.merge_lora)
    given = prefill(model, params, inputs, spec=spec)
    return generate(model, params, given, key, first, start, temperature, spec=spec)


def sampling_params(params: policy.PolicyParams, *, merge_lora: bool) -> policy.PolicyParams:
    """The weights that rollouts use: adapters folded into a copy of the base, or as they are."""
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
    """What is given, before anything is generated: B = P * rows_per_prompt rows without samples.

    What is the same for all prompts is computed once, what is a prompt's once per prompt; pieces
    of generated events are None.
    """
    plan, group = spec.plan, spec.rows_per_prompt
    pieces: list[Piece | None] = [None] * len(plan.nodes)
    for index, node in enumerate(plan.nodes):
        if node.level != "trajectory":
            block = _block(plan, node, inputs, (), spec.system_tokens)
            pieces[index] = _extend(model, params, pieces, node, block)
    repeated = (
        piece if piece is None or node.level == "shared" else repeat_rows(piece, group)
        for piece, node in zip(pieces, plan.nodes, strict=True)
    )
    per_row = tuple(repeat_rows(block, group) for block in inputs)
    return Rollout(inputs=per_row, pieces=tuple(repeated), texts=(), images=())


def generate(
    model: Bagel,
    params: policy.PolicyParams,
    given: Rollout,
    key: jax.Array,
    first: jax.Array,
    start: jax.Array,
    temperature: jax.Array,
    *,
    spec: RolloutSpec,
) -> tuple[Rollout, jax.Array | None]:
    """The task's steps over what `prefill` has made; see `sample_trajectories`."""
    plan, grid = spec.plan, spec.grid
    pieces = list(given.pieces)
    rows = first + jnp.arange(row_count(given.inputs), dtype=jnp.int32)
    texts: list[TextSample] = []
    images: list[ImageSample] = []
    drawn: dict[int, ImageBlock] = {}  # by event

    def fill(nodes: tuple[int, ...]) -> None:
        """Computes the pieces of what was given or generated after the first step."""
        for index in nodes:
            if pieces[index] is None:
                node = plan.nodes[index]
                block = drawn.get(node.event) or _block(
                    plan, node, given.inputs, tuple(texts), spec.system_tokens
                )
                pieces[index] = _extend(model, params, pieces, node, block)

    for step in plan.steps:
        fill((*step.gen, *step.cfg_text, *step.cfg_img))
        if step.kind == IMAGE:
            images.append(_sample_image(model, params, step, pieces, key, rows, start, spec))
            if step.node is not None:
                shown = pixels(model, params, images[-1].latents, grid)
                drawn[step.event] = image_block(model, shown)
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
    done = given.replace(pieces=tuple(pieces), texts=tuple(texts), images=tuple(images))
    shown = pixels(model, params, images[-1].latents, grid) if images else None
    return done, shown


def rebuild(
    model: Bagel,
    params: policy.PolicyParams,
    trajectories: Rollout,
    *,
    plan: Plan,
    system_tokens: tuple[int, ...],
    grid: tuple[int, int],
) -> tuple[Piece, ...]:
    """The context pieces of given trajectories under other parameters, from their tokens.

    Used where the context takes part in the gradient, and for the reference policy. The pixels
    of generated images are constants.

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
    """Generated images uint8[B, Hpx, Wpx, 3] as a context takes them up.

    Where the ViT wants another size they are resized on the device: cubic and antialiased as a
    user's image is by Pillow, equal to it within a few levels of 255.
    """
    rows, height, width, _ = images.shape
    wide, high = fitted_size(width, height, model.config.vit_transform)
    seen = images
    if (high, wide) != (height, width):
        floats = jax.image.resize(
            images.astype(jnp.float32), (rows, high, wide, 3), "cubic", antialias=True
        )
        seen = jnp.clip(jnp.round(floats), 0, 255).astype(jnp.uint8)
    return ImageBlock(images, seen)


def context(pieces: list[Piece] | tuple[Piece, ...], nodes: tuple[int, ...], rows: int) -> Context:
    """The context made of the given nodes' pieces, for `rows` rows."""
    ctx = kv_cache.empty(rows)
    for index in nodes:
        piece = pieces[index]
        own = kv_cache.broadcast(Context(piece.segments, piece.advance), rows)
        ctx = Context((*ctx.segments, *own.segments), ctx.rope + own.rope)
    return ctx


def guidance_contexts(
    pieces: list[Piece] | tuple[Piece, ...], step: PlannedStep, rows: int
) -> GuidanceContexts:
    """The three contexts of an image step, each merged into one segment."""
    return GuidanceContexts(
        *(
            kv_cache.merge(context(pieces, nodes, rows))
            for nodes in (step.gen, step.cfg_text, step.cfg_img)
        )
    )


def pixels(
    model: Bagel, params: policy.PolicyParams, latents: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Latents float32[B, M, C] -> uint8[B, Hpx, Wpx, 3], truncated as the official decoder does."""
    images = policy.decode_latents(model, params, latents, grid)
    return ((images * 0.5 + 0.5) * 255.0).astype(jnp.uint8)


def repeat_rows(tree: Any, count: int) -> Any:
    """Every row `count` times in a row."""
    return map_rows(lambda axis, x: jnp.repeat(x, count, axis=axis), tree)


def _block(
    plan: Plan,
    node: Node,
    inputs: Inputs,
    texts: tuple[TextSample, ...],
    system_tokens: tuple[int, ...],
) -> TextBlock | ImageBlock:
    """What an event adds to a context: an input, or a text that was generated."""
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
    pieces: list[Piece | None],
    node: Node,
    block: TextBlock | ImageBlock,
) -> Piece:
    before = context(pieces, node.before, row_count((block,)))
    if isinstance(block, TextBlock):
        after, _ = policy.extend_text(model, params, before, block.tokens, block.mask)
    elif node.kind == SEEN_IMAGE:
        patches = patchify(_floats(block.seen), model.config.vit.patch_size)
        grid = model.config.vit_grid(*block.seen.shape[1:3])
        after = policy.extend_vit(model, params, before, patches, grid)
    else:
        images = (_floats(block.pixels), _floats(block.seen))
        after = policy.extend_image(model, params, before, *images)
    return Piece(after.segments[len(before.segments) :], after.rope - before.rope)


def _floats(images: jax.Array) -> jax.Array:
    return (images.astype(jnp.float32) / 255.0 - 0.5) / 0.5


def _sample_image(
    model: Bagel,
    params: policy.PolicyParams,
    step: PlannedStep,
    pieces: list[Piece],
    key: jax.Array,
    rows: jax.Array,
    start: jax.Array,
    spec: RolloutSpec,
) -> ImageSample:
    chex.assert_rank([rows, start], [1, 0])
    (high, wide), width = spec.grid, model.config.latent_width
    owners = rows // spec.rows_per_prompt if spec.options.shared_noise else rows
    initial_keys, noise_keys = jax.random.split(jax.random.fold_in(key, step.event))
    initial_keys = jax.vmap(jax.random.fold_in, (None, 0))(initial_keys, owners)
    noise_keys = jax.vmap(jax.random.fold_in, (None, 0))(noise_keys, rows)
    shape = (high * wide, width)
    initial = jax.vmap(lambda each: jax.random.normal(each, shape, jnp.float32))(initial_keys)
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
    """The options of one image step: behind another image, guidance is that of edits."""
    return dataclasses.replace(options, guidance=options.edit_guidance) if step.edits else options


def _row_keys(key: jax.Array, rows: jax.Array, event: int) -> jax.Array:
    """One key per trajectory for one event, typed key[B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, event), rows)
