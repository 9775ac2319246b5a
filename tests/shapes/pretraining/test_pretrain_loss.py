"""The pretraining objective reads cached contexts; the official forward, one pass (case c14)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.bagel_weights import load_model
from alphagrpo_jax.models.mot import Tokens
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.parity.gradient_cases import sequence_mask, sequence_positions
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.shapes.pretraining import pretrain_loss
from alphagrpo_jax.shapes.pretraining.pretrain_loss import GRID, SIDE

KEY = jax.random.key(3)


def test_cached_contexts_give_the_losses_of_one_pass():
    """[system, VAE block, ViT block, text, noised VAE block]: cross-entropy and squared error."""
    loaded = load_model(resolve("package:umm"))
    model, params, tokenizer = loaded.model, PolicyParams(loaded.base), loaded.tokenizer
    rng = np.random.default_rng(0)
    images = np.stack([scenes.render(scenes.random_scene(rng)) for _ in range(2)])
    system, words = (np.array([tokenizer.wrap(t)]) for t in ("a plan", "a red circle on gray"))
    source, target = policy.encode_image(model, params, pretrain_loss.pixels(images))[:, None]
    scored = np.ones_like(words, bool)
    scored[:, 0] = False

    @jax.jit
    def cached(params):
        prompt = jnp.asarray(system), jnp.ones(system.shape, bool)
        systems, _ = policy.extend_text(model, params, kv_cache.empty(1), *prompt)
        batch = {
            "reflect": {"system": jnp.array([1])},
            "short": {"system": jnp.zeros(0, int)},
            "target": images[1:],
            "source": images[:1],
        }
        ctx = pretrain_loss.image_contexts(model, params, systems, batch, source)
        texts = {"tokens": jnp.asarray(words), "scored": scored}
        texts |= dict.fromkeys(("mask", "visible"), jnp.ones(words.shape, bool))
        ctx, text = pretrain_loss.text_nll(model, params, ctx, texts)
        return text, pretrain_loss.flow_error(model, params, ctx, target, KEY, 1)

    modes = ("causal", "full", "full", "causal", "noise")
    lengths = [system.size, 2 + 9, 2 + 9, words.size, 2 + 9]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first, clean, vit, text, noised = (np.arange(a, b) for a, b in itertools.pairwise(starts))
    und = (first, clean[[0, -1]], vit, text, noised[[0, -1]])
    order = np.concatenate([*und, clean[1:-1], noised[1:-1]])
    mask = sequence_mask(lengths, list(modes))[np.ix_(order, order)]
    positions = sequence_positions(lengths, list(modes))[order]

    @jax.jit
    def joint(params):
        noise_key, level_key = jax.random.split(KEY)
        noise = jax.random.normal(noise_key, (1, 1, *target.shape[1:]))[0]
        t = jax.nn.sigmoid(jax.random.normal(level_key, (1, 1)))[0]
        shift = model.config.timestep_shift
        sigma = shift * t / (1 + (shift - 1) * t)
        level = sigma[:, None, None]
        x = (1 - level) * target + level * noise
        gen = [
            policy.embed_latents(model, params, *latents_and_level, GRID)
            for latents_and_level in ((source, jnp.zeros(1)), (x, sigma))
        ]
        special = tokenizer.special
        marks, system_embedded, words_embedded = (
            policy.embed_text(model, params, jnp.asarray(ids))
            for ids in (np.array([[special.vision_start, special.vision_end]]), system, words)
        )
        patches = patchify(pretrain_loss.pixels(images[:1]), model.config.vit.patch_size)
        embedded = policy.embed_patches(model, params, patches, model.config.vit_grid(SIDE, SIDE))
        und_tokens = [
            system_embedded,
            marks,
            marks[:, :1],
            embedded,
            marks[:, 1:],
            words_embedded,
            marks,
        ]
        tokens = Tokens(jnp.concatenate(und_tokens, axis=1), jnp.concatenate(gen, axis=1))
        hidden = policy.joint_forward(model, params, tokens, positions[None], mask[None])
        begin = system.size + 2 + 11  # of the text, among the tokens of the first expert
        predicting = hidden.und[:, begin : begin + words.size - 1]
        log_p = jax.nn.log_softmax(policy.text_logits(model, params, predicting))
        ce = -jnp.take_along_axis(log_p, jnp.asarray(words[:, 1:, None]), axis=2)
        v = policy.read_velocity(model, params, hidden.gen[:, 9:])
        return jnp.mean(ce), jnp.mean(jnp.square(v - (noise - target)))

    with jax.default_matmul_precision("highest"):
        losses, expected = cached(params), joint(params)
    assert min(expected) > 1e-3  # of an untrained sentence and of noise
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
