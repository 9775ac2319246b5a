"""The policy as pure functions of (model, params, arrays): the only caller of the model's `apply`.

In every function `model` is static (hashable) and `params` are the weights.
Shapes: B rows, T text tokens, M image tokens, C latent token width, D width, V vocabulary.
A text is `<|im_start|> ... <|im_end|>` and takes one RoPE id per token; an image block is
`<|vision_start|> tokens <|vision_end|>`, attends to all of itself, and takes a single RoPE id.
Every token attends to the full context. Padding is masked; a row never depends on its neighbors.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from alphagrpo_jax.flow.guidance import Guidance, active_mask, combine
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel, base_shapes, init_base  # noqa: F401
from alphagrpo_jax.models.bagel_weights import (  # noqa: F401
    LoadedModel,
    load_model,
    new_model,
    save_model,
)
from alphagrpo_jax.models.kv_cache import Context, DecodeCache, GuidanceContexts, Segment
from alphagrpo_jax.models.mot import Tokens
from alphagrpo_jax.ops.masked import causal_mask
from alphagrpo_jax.ops.patchify import patchify, unpatchify


@struct.dataclass
class PolicyParams:
    """Weights of the policy; without `lora` it is the reference policy."""

    base: dict
    lora: dict | None = None
    lora_scale: float = struct.field(pytree_node=False, default=1.0)  # alpha / rank


def call(model: Bagel, params: PolicyParams, method: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of `Bagel` with the policy's weights; the functions below are made of it."""
    variables = {"params": params.base}
    if params.lora is not None:
        variables["lora"] = lora.scaled(params.lora, params.lora_scale)
    return model.apply(variables, *args, method=method, **kwargs)


def extend_text(
    model: Bagel, params: PolicyParams, ctx: Context, tokens: jax.Array, mask: jax.Array
) -> tuple[Context, jax.Array]:
    """Appends one text per row.

    Args:
      ctx: context of B rows (or one row, for all).
      tokens: int32[B, T], `<|im_start|>` to `<|im_end|>`, padded on the right.
      mask: bool[B, T], False at padding.
    Returns:
      The longer context, and float[B, T, D], the final hidden states (normed).
    """
    chex.assert_rank([tokens, mask], 2)
    ctx = kv_cache.broadcast(ctx, tokens.shape[0])
    und = Tokens(call(model, params, "embed_text", tokens), None)
    positions = ctx.rope[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden, segment = _decode(model, params, ctx, und, positions, causal_mask(mask))
    advance = jnp.sum(mask, axis=1, dtype=jnp.int32)
    segment = dataclasses.replace(segment, valid=mask)
    return kv_cache.append(ctx, segment, advance), hidden.und


def text_logits(model: Bagel, params: PolicyParams, hidden: jax.Array) -> jax.Array:
    """Computes logits float32[B, T, V] of hidden states float[B, T, D] (normed)."""
    return call(model, params, "logits", hidden)


def init_decode(model: Bagel, ctx: Context, max_tokens: int) -> DecodeCache:
    """Allocates an empty text of at most `max_tokens` tokens behind a context."""
    cfg, batch = model.config.llm, ctx.rope.shape[0]
    shape = (cfg.num_hidden_layers, batch, cfg.num_key_value_heads, max_tokens, cfg.head_dim)
    zeros = jnp.zeros(shape, model.dtype)
    segment = Segment(zeros, zeros, jnp.zeros((batch, max_tokens), bool))
    return DecodeCache(segment, ctx.rope, jnp.zeros((), jnp.int32))


def decode_step(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    cache: DecodeCache,
    token: jax.Array,
    active: jax.Array | None = None,
) -> tuple[DecodeCache, jax.Array]:
    """Reads one token per row and predicts the next one; usable in `jax.lax.while_loop`.

    Args:
      ctx: context before the text (merge it once beforehand).
      cache: the text so far.
      token: int32[B].
      active: bool[B]; a row that is not active writes nothing. None: all are.
    Returns:
      The cache with the token, and float32[B, V], the logits of the next token.
    """
    chex.assert_rank(token, 1)
    active = jnp.ones(token.shape, bool) if active is None else active
    und = call(model, params, "embed_text", token[:, None])
    past = cache.segment
    so_far = Context((*ctx.segments, past), cache.rope)
    self_mask = jnp.ones((1, 1, 1), bool)
    positions = cache.rope[:, None]
    hidden, token_segment = _decode(model, params, so_far, Tokens(und, None), positions, self_mask)

    def write(buffer: jax.Array, value: jax.Array, axis: int) -> jax.Array:
        value = value.astype(buffer.dtype)
        return jax.lax.dynamic_update_slice_in_dim(buffer, value, cache.step, axis)

    segment = Segment(
        k=write(past.k, token_segment.k, 3),
        v=write(past.v, token_segment.v, 3),
        valid=write(past.valid, active[:, None], 1),
    )
    rope = cache.rope + active.astype(jnp.int32)
    logits = text_logits(model, params, hidden.und)[:, 0]
    return DecodeCache(segment, rope, cache.step + 1), logits


def end_decode(ctx: Context, cache: DecodeCache) -> Context:
    """Returns the context followed by the text that was written."""
    return Context((*ctx.segments, cache.segment), cache.rope)


def extend_vae(
    model: Bagel, params: PolicyParams, ctx: Context, latents: jax.Array, grid: tuple[int, int]
) -> Context:
    """Appends a clean image as latent tokens (noise level 0).

    Args:
      ctx: context of B rows.
      latents: float[B, M, C].
      grid: token rows and columns.
    """
    block = _latent_block(model, params, ctx, latents, jnp.zeros(latents.shape[:1]), grid)
    _, segment = _decode(model, params, *block)
    return kv_cache.append(block.ctx, segment, 1)


def extend_vit(
    model: Bagel, params: PolicyParams, ctx: Context, patches: jax.Array, grid: tuple[int, int]
) -> Context:
    """Appends an image as ViT tokens (to be understood only).

    Args:
      ctx: context of B rows.
      patches: float[B, Mv, patch * patch * 3], see `ops.patchify`.
      grid: patch rows and columns.
    """
    ctx = kv_cache.broadcast(ctx, patches.shape[0])
    marks = _delimiters(model, params, patches.shape[0])
    vit_tokens = embed_patches(model, params, patches, grid)
    und = jnp.concatenate([marks[:, :1], vit_tokens, marks[:, 1:]], axis=1)
    positions, self_mask = _image_geometry(ctx, und.shape[1])
    _, segment = _decode(model, params, ctx, Tokens(und, None), positions, self_mask)
    return kv_cache.append(ctx, segment, 1)


def extend_image(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    images: jax.Array,
    vit_images: jax.Array | None = None,
) -> Context:
    """Appends an image as a user's image is: the VAE block, then the ViT block.

    Args:
      ctx: context of B rows.
      images: float32[B, Hpx, Wpx, 3] in [-1, 1], of the VAE transform's size.
      vit_images: the same images at the ViT transform's size; None: the same arrays.
    """
    latents = encode_image(model, params, images)
    ctx = extend_vae(model, params, ctx, latents, model.config.latent_grid(*images.shape[1:3]))
    vit_images = images if vit_images is None else vit_images
    patches = patchify(vit_images, model.config.vit.patch_size)
    return extend_vit(model, params, ctx, patches, model.config.vit_grid(*vit_images.shape[1:3]))


def velocity(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    x: jax.Array,
    sigma: jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """Computes the velocity (noise minus data) of noisy latents in a context; caches nothing.

    Args:
      ctx: context of B rows (or one); merge it once before many calls.
      x: float32[B, M, C].
      sigma: float32[B] in [0, 1], 1 is noise.
      grid: token rows and columns.
    Returns:
      float32[B, M, C].
    """
    hidden = _decode_uncached(model, params, _latent_block(model, params, ctx, x, sigma, grid))
    return call(model, params, "read_velocity", hidden.gen)


def packed_velocity(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    x: jax.Array,
    sigma: jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """Computes the velocities of R noisy versions of each row's image in the row's one context.

    As `velocity` on every version alone, but the row's context is stored and read once.

    Args:
      ctx: context of B rows.
      x: float32[B, R, M, C], R versions.
      sigma: float32[B, R].
      grid: token rows and columns.
    Returns:
      float32[B, R, M, C].
    """
    chex.assert_rank([x, sigma], [4, 2])
    rows = kv_cache.repeat(kv_cache.broadcast(ctx, x.shape[0]), x.shape[1])
    flat = x.reshape(-1, *x.shape[2:])
    return velocity(model, params, rows, flat, sigma.reshape(-1), grid).reshape(x.shape)


def guided_velocity(
    model: Bagel,
    params: PolicyParams,
    contexts: GuidanceContexts,
    x: jax.Array,
    sigma: jax.Array,
    grid: tuple[int, int],
    guidance: Guidance,
    *,
    active: bool | None = None,
) -> jax.Array:
    """Computes the guided velocity; branches with a scale <= 1 are not evaluated.

    Args:
      contexts: the three contexts.
      x: float32[B, M, C].
      sigma: float32[B].
      grid: token rows and columns.
      guidance: scales, interval, renormalization.
      active: True if sigma lies in the guidance interval, where that is known statically; None:
        decided per row on the device, at the price of evaluating all branches.
    Returns:
      float32[B, M, C].
    """
    flow = functools.partial(velocity, model, params, x=x, sigma=sigma, grid=grid)
    plain = flow(ctx=contexts.gen)
    if active is False or not guidance.uses_text:
        return plain
    dropped_text = flow(ctx=contexts.cfg_text)
    dropped_image = flow(ctx=contexts.cfg_img) if guidance.uses_image else None
    guided = combine(plain, dropped_text, dropped_image, guidance)
    if active:
        return guided
    return jnp.where(active_mask(guidance, sigma)[:, None, None], guided, plain)


def joint_forward(
    model: Bagel,
    params: PolicyParams,
    tokens: Tokens,
    positions: jax.Array,
    mask: jax.Array,
) -> Tokens:
    """Runs the decoder once over a full sequence with explicit positions and mask (no cache).

    Args:
      tokens: embedded und and gen tokens (`embed_text`, `embed_latents`, `embed_patches`).
      positions: int32[B, Tu + Tg], RoPE ids in the order und, gen.
      mask: bool[B or 1, Tu + Tg, Tu + Tg], query axis first, same order.
    Returns:
      Final hidden states (normed); see `text_logits` and `read_velocity`.
    """
    hidden, _ = call(model, params, "decode", tokens, positions, (), (mask,), keep_cache=False)
    return hidden


def embed_text(model: Bagel, params: PolicyParams, tokens: jax.Array) -> jax.Array:
    """Embeds tokens int32[B, T] as float[B, T, D]."""
    return call(model, params, "embed_text", tokens)


def embed_latents(
    model: Bagel, params: PolicyParams, x: jax.Array, sigma: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Embeds latents float[B, M, C] at noise level float[B] as float[B, M, D]."""
    return call(model, params, "embed_latents", x, sigma, grid=grid)


def embed_patches(
    model: Bagel, params: PolicyParams, patches: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Embeds ViT patches float[B, Mv, patch width] as float[B, Mv, D]."""
    return call(model, params, "embed_patches", patches, grid=grid)


def read_velocity(model: Bagel, params: PolicyParams, hidden: jax.Array) -> jax.Array:
    """Computes velocities float32[B, M, C] of latent tokens' hidden states float[B, M, D]."""
    return call(model, params, "read_velocity", hidden)


def encode_image(
    model: Bagel, params: PolicyParams, images: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
    """Encodes images as latent tokens.

    Args:
      images: float32[B, Hpx, Wpx, 3] in [-1, 1].
      noise: float32[B, h, w, z] to sample the posterior; None: its mean.
    Returns:
      float32[B, M, C].
    """
    chex.assert_rank(images, 4)
    latent = call(model, params, "encode_image", images, noise)
    return patchify(latent, model.config.latent_patch_size)


def decode_latents(
    model: Bagel, params: PolicyParams, latents: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Decodes latent tokens as images.

    Args:
      latents: float[B, M, C].
      grid: token rows and columns.
    Returns:
      float32[B, Hpx, Wpx, 3], clipped to [-1, 1].
    """
    latent = unpatchify(latents, model.config.latent_patch_size, grid)
    return jnp.clip(call(model, params, "decode_image", latent), -1.0, 1.0)


class _Block(NamedTuple):
    """New tokens, all of them valid, and where they stand: the last arguments of `_decode`."""

    ctx: Context
    tokens: Tokens
    positions: jax.Array  # int32[B, T], RoPE ids in the order und, gen
    self_mask: jax.Array  # bool[B or 1, T or 1, T], among the new tokens


def _decode(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    tokens: Tokens,
    positions: jax.Array,
    self_mask: jax.Array,
) -> tuple[Tokens, Segment]:
    """Runs new tokens over a context; returns their hidden states and the segment to append."""
    masks = (*(segment.valid[:, None] for segment in ctx.segments), self_mask)
    hidden, (k, v) = call(model, params, "decode", tokens, positions, ctx.segments, masks)
    return hidden, Segment(k, v, jnp.ones(positions.shape, bool))


def _decode_uncached(model: Bagel, params: PolicyParams, block: _Block) -> Tokens:
    """Runs new tokens over a context without keeping their keys and values."""
    ctx, tokens, positions, self_mask = block
    masks = (*(segment.valid[:, None] for segment in ctx.segments), self_mask)
    arguments = (tokens, positions, ctx.segments, masks)
    return call(model, params, "decode", *arguments, keep_cache=False)[0]


def _image_geometry(ctx: Context, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns an image block's RoPE ids int32[B, T], all the same, and its full self-mask."""
    positions = jnp.broadcast_to(ctx.rope[:, None], (ctx.rope.shape[0], length))
    return positions, jnp.ones((1, 1, length), bool)


def _delimiters(model: Bagel, params: PolicyParams, batch: int) -> jax.Array:
    """Embeds `<|vision_start|>` and `<|vision_end|>` as float[B, 2, D]."""
    ids = model.config.tokens
    marks = jnp.array([[ids.vision_start, ids.vision_end]], jnp.int32)
    embedded = call(model, params, "embed_text", marks)
    return jnp.broadcast_to(embedded, (batch, *embedded.shape[1:]))


def _latent_block(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    x: jax.Array,
    sigma: jax.Array,
    grid: tuple[int, int],
) -> _Block:
    """Embeds latent tokens between their delimiters; the decoder's order is delimiters first."""
    chex.assert_shape(x, (None, grid[0] * grid[1], model.config.latent_width))
    chex.assert_shape(sigma, x.shape[:1])
    ctx = kv_cache.broadcast(ctx, x.shape[0])
    gen = call(model, params, "embed_latents", x, sigma, grid=grid)
    tokens = Tokens(_delimiters(model, params, x.shape[0]), gen)
    positions, self_mask = _image_geometry(ctx, gen.shape[1] + 2)
    return _Block(ctx, tokens, positions, self_mask)
