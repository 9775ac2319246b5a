"""The pretraining objective of the small UMM: cross-entropy on texts, flow matching on images, and
a loss that ties what the vision encoder sees to words. One batch of `batches.make_batch` at a time.
"""

import dataclasses

import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.kv_cache import Context
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.shapes import scenes

SIDE = scenes.RESOLUTION
GRID = (3, 3)  # latent tokens of an image


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of the objective and the optimiser."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    text_weight: float = 0.25  # of the cross-entropy, beside the flow-matching error
    look_weight: float = 0.25  # of the loss that ties what the encoder sees to words
    draws: int = 4  # noise levels per drawn image of the thinking kind
    few_draws: int = 2  # of the other kinds


def pixels(images: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def _system(systems: Context, which: jax.Array) -> Context:
    """Each row's system prompt: row `which - 1` of `systems`, or nothing where `which` is 0."""
    ctx = kv_cache.take(systems, jnp.maximum(which - 1, 0))
    (segment,) = ctx.segments
    present = which > 0
    segment = segment.replace(valid=segment.valid & present[:, None])
    return Context((segment,), jnp.where(present, ctx.rope, 0))


def _rows(ctx: Context, begin: int, end: int) -> Context:
    return kv_cache.take(ctx, jnp.arange(begin, end))


def text_nll(
    model: Bagel, params: PolicyParams, ctx: Context, texts: dict
) -> tuple[Context, jax.Array]:
    """Reads a group's texts in their contexts.

    Returns:
      The context that a drawing sees (visible tokens only), and the mean negative
      log-likelihood of the scored tokens, nats.
    """
    before = ctx.rope
    ctx, hidden = policy.extend_text(model, params, ctx, texts["tokens"], texts["mask"])
    logits = policy.text_logits(model, params, hidden[:, :-1])
    scores = policy.token_log_probs(logits, texts["tokens"], texts["scored"], temperature=1.0)
    likelihood = -jnp.sum(scores.log_prob) / jnp.sum(scores.mask)
    *past, own = ctx.segments
    rope = before + jnp.sum(texts["visible"], axis=1, dtype=jnp.int32)
    return Context((*past, own.replace(valid=texts["visible"])), rope), likelihood


def flow_error(
    model: Bagel,
    params: PolicyParams,
    ctx: Context,
    latents: jax.Array,
    key: jax.Array,
    draws: int,
) -> jax.Array:
    """Mean squared velocity error over `draws` noise levels per row.

    The levels are a shifted logit-normal: `s t / (1 + (s - 1) t)` of `t = sigmoid(N(0, 1))`, with
    the model's `timestep_shift` s, as in BAGEL's training forward.
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
    """[system][image] of the rows with an image; those that only understand skip its VAE block."""
    which = jnp.concatenate([batch["reflect"]["system"], batch["short"]["system"]])
    ctx = _system(systems, which)
    draws = jnp.arange(which.shape[0]) < batch["target"].shape[0]
    start = ctx.rope
    ctx = policy.extend_vae(model, params, ctx, latents, GRID)
    *past, block = ctx.segments
    block = block.replace(valid=block.valid & draws[:, None])
    ctx = Context((*past, block), jnp.where(draws, ctx.rope, start))
    patches = patchify(pixels(batch["source"]), model.config.vit.patch_size)
    ctx = policy.extend_vit(model, params, ctx, patches, model.config.vit_grid(SIDE, SIDE))
    return kv_cache.merge(ctx)


def look_loss(model: Bagel, params: PolicyParams, batch: dict) -> jax.Array:
    """Negative log-likelihood, nats, of the words for what each patch shows.

    A patch's vector, as the decoder reads it, is to point at the embeddings of its two words:
    `-mean log softmax(15 cos(patch, embeddings))[word]`. With answers and captions alone the
    encoder stays blind for most of a pretraining of this length.
    """
    patches = patchify(pixels(batch["source"]), model.config.vit.patch_size)
    seen = policy.embed_patches(model, params, patches, model.config.vit_grid(SIDE, SIDE))
    every = jnp.arange(model.config.llm.vocab_size)
    table = jax.lax.stop_gradient(policy.embed_text(model, params, every))
    cosines = jnp.einsum("bmd,vd->bmv", _unit(seen), _unit(table))
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
    """The pretraining objective of one batch, and its parts."""
    params = PolicyParams({**trained, "vae": frozen})
    keys = jax.random.split(key, 3)
    systems, _ = policy.extend_text(model, params, kv_cache.empty(2), *prompts)
    images = jnp.concatenate([batch["draw_image"], batch["target"], batch["source"]])
    latents = jax.lax.stop_gradient(policy.encode_image(model, params, pixels(images)))
    drawn, targets = batch["draw_image"].shape[0], batch["target"].shape[0]
    wanted, sources = latents[drawn : drawn + targets], latents[drawn + targets :]

    ctx = _system(systems, batch["draw"]["system"])
    ctx, draw_text = text_nll(model, params, ctx, batch["draw"])
    draw_flow = flow_error(model, params, ctx, latents[:drawn], keys[0], recipe.draws)

    ctx = _system(systems, batch["plan"]["system"])
    _, plan_text = text_nll(model, params, ctx, batch["plan"])

    seen = image_contexts(model, params, systems, batch, sources)
    repairs, rows = batch["reflect"]["tokens"].shape[0], batch["source"].shape[0]
    ctx, reflect_text = text_nll(model, params, _rows(seen, 0, repairs), batch["reflect"])
    reflect_flow = flow_error(model, params, ctx, wanted[:repairs], keys[1], recipe.few_draws)
    ctx, short_text = text_nll(model, params, _rows(seen, repairs, rows), batch["short"])
    ctx = _rows(ctx, 0, targets - repairs)
    edit_flow = flow_error(model, params, ctx, wanted[repairs:], keys[2], recipe.few_draws)

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
