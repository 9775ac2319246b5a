"""The pretraining objective of the small UMM, for a batch of `batches.make_batch`.

It sums the cross-entropy of texts, the flow-matching error of images, and a loss that ties the
vision encoder's features to words.
"""

import dataclasses

import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops.log_probs import token_log_probs
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.shapes import scenes

SIDE = scenes.RESOLUTION
GRID = (3, 3)  # latent tokens of an image


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Weights of the objective and settings of the optimizer."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    text_weight: float = 0.25  # of the cross-entropy, beside the flow-matching error
    look_weight: float = 0.25  # of `look_loss`
    draws: int = 4  # noise levels per drawn image of the thinking kind
    few_draws: int = 2  # of the other kinds


def pixels(images: jax.Array) -> jax.Array:
    """Maps uint8 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def _system_contexts(systems: Context, which: jax.Array) -> Context:
    """Selects each row's system prompt: row `which - 1` of `systems`, nothing if `which` is 0."""
    ctx = kv_cache.take(systems, jnp.maximum(which - 1, 0))
    (segment,) = ctx.segments
    present = which > 0
    segment = dataclasses.replace(segment, valid=segment.valid & present[:, None])
    return Context((segment,), jnp.where(present, ctx.rope, 0))


def _rows(ctx: Context, begin: int, end: int) -> Context:
    return kv_cache.take(ctx, jnp.arange(begin, end))


def text_nll(
    model: Bagel, params: PolicyParams, ctx: Context, texts: dict
) -> tuple[Context, jax.Array]:
    """Appends texts to their contexts and scores them.

    Args:
      ctx: contexts of B rows.
      texts: arrays as `batches.make_batch` returns them, B rows.
    Returns:
      The context that a drawing attends to (visible tokens only), and the mean negative
      log-likelihood of the scored tokens, nats.
    """
    before = ctx.rope
    ctx, hidden = policy.extend_text(model, params, ctx, texts["tokens"], texts["mask"])
    logits = policy.text_logits(model, params, hidden[:, :-1])
    log_probs = token_log_probs(logits, texts["tokens"], texts["scored"], temperature=1.0)
    nll = -jnp.sum(log_probs.log_prob) / jnp.sum(log_probs.mask)
    *past, text_segment = ctx.segments
    rope = before + jnp.sum(texts["visible"], axis=1, dtype=jnp.int32)
    return Context((*past, dataclasses.replace(text_segment, valid=texts["visible"])), rope), nll


def flow_error(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    latents: jax.Array,
    key: jax.Array,
    draws: int,
) -> jax.Array:
    """Computes the mean squared velocity error over `draws` noise levels per row.

    The levels are a shifted logit-normal: `s t / (1 + (s - 1) t)` of `t = sigmoid(N(0, 1))`, with
    the model's `timestep_shift` s, as in BAGEL's training forward.

    Args:
      ctx: contexts of B rows.
      latents: float32[B, N, D], the clean latents.
      key: of noise and levels.
      draws: noise levels per row.
    Returns:
      float32[].
    """
    x0 = jnp.repeat(latents[:, None], draws, axis=1)
    noise_key, level_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    t = jax.nn.sigmoid(jax.random.normal(level_key, x0.shape[:2]))
    shift = model.config.timestep_shift
    sigma = shift * t / (1 + (shift - 1) * t)
    level = sigma[:, :, None, None]
    x = (1 - level) * x0 + level * noise
    velocity = policy.packed_velocity(model, params, kv_cache.merge(ctx), x, sigma, GRID)
    return jnp.mean(jnp.square(velocity - (noise - x0)))


def image_contexts(
    model: Bagel, params: PolicyParams, systems: Context, batch: dict, latents: jax.Array
) -> Context:
    """Builds the contexts [system][image] of all rows with an input image.

    Rows that produce no image (captions and answers) skip its VAE block, as inference does.
    """
    which = jnp.concatenate([batch["reflect"]["system"], batch["short"]["system"]])
    ctx = _system_contexts(systems, which)
    has_target = jnp.arange(which.shape[0]) < batch["target"].shape[0]
    start = ctx.rope
    ctx = policy.extend_vae(model, params, ctx, latents, GRID)
    *past, block = ctx.segments
    block = dataclasses.replace(block, valid=block.valid & has_target[:, None])
    ctx = Context((*past, block), jnp.where(has_target, ctx.rope, start))
    patches = patchify(pixels(batch["source"]), model.config.vit.patch_size)
    ctx = policy.extend_vit(model, params, ctx, patches, model.config.vit_grid(SIDE, SIDE))
    return kv_cache.merge(ctx)


def look_loss(model: Bagel, params: PolicyParams, batch: dict) -> jax.Array:
    """Computes the negative log-likelihood, nats, of the words for each patch's content.

    A patch's vector, as the decoder reads it, should point at the embeddings of its two words:
    `-mean log softmax(15 cos(patch, embeddings))[word]`.
    """
    # Answers and captions alone leave the encoder blind for most of a pretraining of this length.
    patches = patchify(pixels(batch["source"]), model.config.vit.patch_size)
    features = policy.embed_patches(model, params, patches, model.config.vit_grid(SIDE, SIDE))
    vocabulary = jnp.arange(model.config.llm.vocab_size)
    table = jax.lax.stop_gradient(policy.embed_text(model, params, vocabulary))
    cosines = jnp.einsum("bmd,vd->bmv", _unit(features), _unit(table))
    log_probs = jax.nn.log_softmax(15.0 * cosines)
    return -jnp.mean(jnp.take_along_axis(log_probs, batch["words"], axis=-1))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def pretraining_loss(
    trained: dict,
    frozen: dict,
    model: Bagel,
    batch: dict,
    prompts: tuple[jax.Array, jax.Array],
    key: jax.Array,
    recipe: Recipe,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the pretraining objective of one batch.

    Args:
      trained: parameters without the autoencoder.
      frozen: the autoencoder's parameters.
      model: the model.
      batch: from `batches.make_batch`.
      prompts: tokens int32[2, T] and mask bool[2, T] of the two system prompts.
      key: of the noise.
      recipe: weights of the terms.
    Returns:
      The loss, and its terms by name.
    """
    params = PolicyParams({**trained, "vae": frozen})
    keys = jax.random.split(key, 3)
    systems, _ = policy.extend_text(model, params, kv_cache.empty(2), *prompts)
    images = jnp.concatenate([batch["draw_image"], batch["target"], batch["source"]])
    latents = jax.lax.stop_gradient(policy.encode_image(model, params, pixels(images)))
    num_draw, num_target = batch["draw_image"].shape[0], batch["target"].shape[0]
    targets, sources = latents[num_draw : num_draw + num_target], latents[num_draw + num_target :]

    ctx = _system_contexts(systems, batch["draw"]["system"])
    ctx, draw_text = text_nll(model, params, ctx, batch["draw"])
    draw_flow = flow_error(model, params, ctx, latents[:num_draw], keys[0], recipe.draws)

    ctx = _system_contexts(systems, batch["plan"]["system"])
    _, plan_text = text_nll(model, params, ctx, batch["plan"])

    image_ctx = image_contexts(model, params, systems, batch, sources)
    num_reflect, num_rows = batch["reflect"]["tokens"].shape[0], batch["source"].shape[0]
    ctx = _rows(image_ctx, 0, num_reflect)
    ctx, reflect_text = text_nll(model, params, ctx, batch["reflect"])
    reflect_flow = flow_error(model, params, ctx, targets[:num_reflect], keys[1], recipe.few_draws)
    ctx = _rows(image_ctx, num_reflect, num_rows)
    ctx, short_text = text_nll(model, params, ctx, batch["short"])
    ctx = _rows(ctx, 0, num_target - num_reflect)
    edit_flow = flow_error(model, params, ctx, targets[num_reflect:], keys[2], recipe.few_draws)

    look = look_loss(model, params, batch)

    metrics = {
        "look": look,
        "text/draw": draw_text,
        "text/plan": plan_text,
        "text/reflect": reflect_text,
        "text/short": short_text,
        "flow/draw": draw_flow,
        "flow/reflect": reflect_flow,
        "flow/edit": edit_flow,
    }
    flow = 0.7 * draw_flow + 0.15 * reflect_flow + 0.15 * edit_flow
    text = 0.5 * draw_text + 0.5 * plan_text + 0.25 * reflect_text + 0.5 * short_text
    return flow + recipe.text_weight * text + recipe.look_weight * look, metrics
