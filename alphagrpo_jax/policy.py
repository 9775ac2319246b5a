"""The policy as pure functions of (model, params, arrays): the only caller of the model's `apply`.

In every function `model` is static (hashable) and `params` are the weights.
Shapes: B rows, T text tokens, M image tokens, C latent token width, D width, V vocabulary.
A text is `<|im_start|> ... <|im_end|>` and takes one RoPE id per token; an image block is
`<|vision_start|> tokens <|vision_end|>`, sees itself fully, and takes a single RoPE id. Every
token sees the whole context. Padding is masked, and a row never depends on its neighbours.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
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
from alphagrpo_jax.ops.log_probs import TextLogProbs, token_log_probs
from alphagrpo_jax.ops.masked import causal_mask
from alphagrpo_jax.ops.patchify import patchify, unpatchify


@struct.dataclass
class PolicyParams:
    """Weights of the policy; without `lora` it is the reference policy."""

    base: dict
    lora: dict | None = None
    lora_scale: float = struct.field(pytree_node=False, default=1.0)  # alpha / rank


def call(model: Bagel, params: PolicyParams, method: str, *args: Any, **kwargs: Any) -> Any:
    """Any method of `Bagel` with the policy's weights; the functions below are made of it."""
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
    return kv_cache.append(ctx, segment.replace(valid=mask), advance), hidden.und


def text_logits(model: Bagel, params: PolicyParams, hidden: jax.Array) -> jax.Array:
    """float[B, T, D] hidden states (normed) -> float32[B, T, V]."""
    return call(model, params, "logits", hidden)


def text_log_probs(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    temperature: float,
) -> TextLogProbs:
    """Log-probability and entropy of every token after the first.

    `log softmax(logits_t / temperature)[token_{t+1}]` of the full softmax, in float32
    (AlphaGRPO, sampling: top-p is not part of the scored distribution).

    Args:
      ctx: context before the text.
      tokens: int32[B, T], as for `extend_text`.
      mask: bool[B, T].
      temperature: divides the logits.
    """
    _, hidden = extend_text(model, params, ctx, tokens, mask)
    logits = text_logits(model, params, hidden[:, :-1])
    return token_log_probs(logits, tokens, mask, temperature=temperature)


def init_decode(model: Bagel, ctx: Context, max_tokens: int) -> DecodeCache:
    """An empty text of at most `max_tokens` tokens behind a context."""
    cfg, batch = model.config.llm, ctx.rope.shape[0]
    shape = (
        cfg.num_hidden_layers, batch, max_tokens, cfg.num_key_value_heads, cfg.head_dim
    )  # fmt: skip
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
    own = jnp.ones((1, 1, 1), bool)
    hidden, new = _decode(model, params, so_far, Tokens(und, None), cache.rope[:, None], own)
    at = cache.step

    def write(old: jax.Array, value: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, value.astype(old.dtype), at, axis)

    segment = Segment(
        write(past.k, new.k, 2), write(past.v, new.v, 2), write(past.valid, active[:, None], 1)
    )
    rope = cache.rope + active.astype(jnp.int32)
    logits = text_logits(model, params, hidden.und)[:, 0]
    return DecodeCache(segment, rope, at + 1), logits


def end_decode(ctx: Context, cache: DecodeCache) -> Context:
    """The context followed by the text that was written."""
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
    sigma = jnp.zeros(latents.shape[:1], jnp.float32)
    _, segment = _latent_block(model, params, ctx, latents, sigma, grid)
    return kv_cache.append(kv_cache.broadcast(ctx, latents.shape[0]), segment, 1)


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
    seen = embed_patches(model, params, patches, grid)
    und = jnp.concatenate([marks[:, :1], seen, marks[:, 1:]], axis=1)
    positions, own = _image_geometry(ctx, und.shape[1])
    _, segment = _decode(model, params, ctx, Tokens(und, None), positions, own)
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
    seen = images if vit_images is None else vit_images
    patches = patchify(seen, model.config.vit.patch_size)
    return extend_vit(model, params, ctx, patches, model.config.vit_grid(*seen.shape[1:3]))


def velocity(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    x: jax.Array,
    sigma: jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """Velocity (noise minus data) of noisy latents in a context; nothing is cached.

    Args:
      ctx: context of B rows (or one); merge it once before many calls.
      x: float32[B, M, C].
      sigma: float32[B] in [0, 1], 1 is noise.
      grid: token rows and columns.
    Returns:
      float32[B, M, C].
    """
    hidden, _ = _latent_block(model, params, ctx, x, sigma, grid, keep_cache=False)
    return call(model, params, "read_velocity", hidden.gen)


def packed_velocity(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    x: jax.Array,
    sigma: jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """Velocities of several noisy versions of each row's image, all in the row's one context.

    The same numbers as `velocity` on every version alone; the context is read once per row.

    Args:
      ctx: context of B rows.
      x: float32[B, R, M, C], R versions.
      sigma: float32[B, R].
      grid: token rows and columns.
    Returns:
      float32[B, R, M, C].
    """
    chex.assert_rank([x, sigma], [4, 2])
    batch, draws, latents, _ = x.shape
    flat_x, flat_sigma = x.reshape(batch * draws, *x.shape[2:]), sigma.reshape(batch * draws)
    gen = embed_latents(model, params, flat_x, flat_sigma, grid)
    marks = jnp.tile(_delimiters(model, params, batch), (1, draws, 1))
    tokens = Tokens(marks, gen.reshape(batch, draws * latents, -1))
    version = np.concatenate([np.repeat(np.arange(draws), 2), np.repeat(np.arange(draws), latents)])
    own = jnp.asarray(version[None, :, None] == version[None, None, :])
    positions, _ = _image_geometry(ctx, len(version))
    hidden, _ = _decode(model, params, ctx, tokens, positions, own, keep_cache=False)
    return call(model, params, "read_velocity", hidden.gen).reshape(x.shape)


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
    """Velocity with classifier-free guidance; branches with a scale <= 1 are not evaluated.

    Args:
      contexts: the three contexts.
      x: float32[B, M, C].
      sigma: float32[B].
      grid: token rows and columns.
      guidance: scales, interval, renormalisation.
      active: whether sigma lies in the guidance interval, if it is known statically; None:
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
    """One pass over a whole sequence with explicit positions and mask (no cache).

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
    """int32[B, T] -> float[B, T, D]."""
    return call(model, params, "embed_text", tokens)


def embed_latents(
    model: Bagel, params: PolicyParams, x: jax.Array, sigma: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """float[B, M, C] at noise level float[B] -> float[B, M, D]."""
    return call(model, params, "embed_latents", x, sigma, grid=grid)


def embed_patches(
    model: Bagel, params: PolicyParams, patches: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """float[B, Mv, patch width] -> float[B, Mv, D]."""
    return call(model, params, "embed_patches", patches, grid=grid)


def read_velocity(model: Bagel, params: PolicyParams, hidden: jax.Array) -> jax.Array:
    """float[B, M, D] hidden states of latent tokens (normed) -> float32[B, M, C]."""
    return call(model, params, "read_velocity", hidden)


def encode_image(
    model: Bagel, params: PolicyParams, images: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
    """Latent tokens of images.

    Args:
      images: float32[B, Hpx, Wpx, 3] in [-1, 1].
      noise: float32[B, h, w, z] to draw from the posterior; None: its mean.
    Returns:
      float32[B, M, C].
    """
    chex.assert_rank(images, 4)
    latent = call(model, params, "encode_image", images, noise)
    return patchify(latent, model.config.latent_patch_size)


def decode_latents(
    model: Bagel, params: PolicyParams, latents: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Images of latent tokens.

    Args:
      latents: float[B, M, C].
      grid: token rows and columns.
    Returns:
      float32[B, Hpx, Wpx, 3], clipped to [-1, 1].
    """
    latent = unpatchify(latents, model.config.latent_patch_size, grid)
    return jnp.clip(call(model, params, "decode_image", latent), -1.0, 1.0)


def _decode(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    tokens: Tokens,
    positions: jax.Array,
    own: jax.Array,
    **flags: bool,
) -> tuple[Tokens, Segment | None]:
    """New tokens over a context, all of them valid; `own` is their mask among themselves, `flags`
    are those of `Bagel.decode`."""
    masks = (*(segment.valid[:, None] for segment in ctx.segments), own)
    hidden, pair = call(model, params, "decode", tokens, positions, ctx.segments, masks, **flags)
    return hidden, pair and Segment(*pair, jnp.ones(positions.shape, bool))


def _image_geometry(ctx: Context, length: int) -> tuple[jax.Array, jax.Array]:
    """An image block's RoPE ids int32[B, T], all the same, and its own mask, full."""
    positions = jnp.broadcast_to(ctx.rope[:, None], (ctx.rope.shape[0], length))
    return positions, jnp.ones((1, 1, length), bool)


def _delimiters(model: Bagel, params: PolicyParams, batch: int) -> jax.Array:
    """Embedded `<|vision_start|>`, `<|vision_end|>`, float[B, 2, D]."""
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
    **flags: bool,
) -> tuple[Tokens, Segment | None]:
    """A block of latent tokens between its delimiters; cached in the order und, gen."""
    chex.assert_shape(x, (None, grid[0] * grid[1], model.config.latent_width))
    chex.assert_shape(sigma, x.shape[:1])
    ctx = kv_cache.broadcast(ctx, x.shape[0])
    gen = call(model, params, "embed_latents", x, sigma, grid=grid)
    tokens = Tokens(_delimiters(model, params, x.shape[0]), gen)
    positions, own = _image_geometry(ctx, gen.shape[1] + 2)
    return _decode(model, params, ctx, tokens, positions, own, **flags)
