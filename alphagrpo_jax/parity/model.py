"""The policy functions as the cases call them: one row, named texts and images, jitted."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax import policy
from alphagrpo_jax.flow.guidance import Guidance, combine
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.models.mot import Tokens
from alphagrpo_jax.ops.patchify import patchify
from alphagrpo_jax.parity.fixture import Fixture
from alphagrpo_jax.policy import PolicyParams


class Port:
    """A loaded folder and its recorded outputs, with short calls for the cases."""

    def __init__(self, fixture: Fixture) -> None:
        """Loads the folder's weights in float32 and prepares the calls."""
        self.fixture = fixture
        self.loaded = policy.load_model(fixture.folder)
        self.model = self.loaded.model
        self.config = self.loaded.config
        self.tokenizer = self.loaded.tokenizer
        self.params = PolicyParams(self.loaded.base)

        # Fresh partials: nothing that an earlier run traced is reused.
        def bind(function: Callable[..., Any], *static: str) -> Callable[..., Any]:
            return jax.jit(functools.partial(function, self.model), static_argnames=static)

        self.extend_text = bind(policy.extend_text)
        self.extend_vae = bind(policy.extend_vae, "grid")
        self.extend_vit = bind(policy.extend_vit, "grid")
        self.velocity = bind(policy.velocity, "grid")
        self.guided = bind(policy.guided_velocity, "grid", "guidance", "active")
        self.logits = bind(policy.text_logits)
        self.decode_step = bind(policy.decode_step)
        self.call = bind(policy.call, "method", "grid", "keep_cache", "final_norm")
        llm = dataclasses.replace(self.config.llm, num_hidden_layers=1)
        self._layer = jax.jit(
            functools.partial(
                policy.call,
                self.model.clone(config=dataclasses.replace(self.config, llm=llm)),
                method="decode",
                keep_cache=False,
                final_norm=False,
            )
        )

    def array(self, name: str) -> np.ndarray:
        """Returns a recorded array."""
        return self.fixture.arrays[name]

    def latent_grid(self) -> tuple[int, int]:
        """Returns token rows and columns of every generated image and of the VAE's image."""
        height, width = self.array("c2.vae_image").shape[1:]
        return self.config.latent_grid(height, width)

    def ids(self, text: str) -> np.ndarray:
        """Tokenizes a text as int32[T], delimiters included."""
        return np.asarray(self.tokenizer.wrap(text), np.int32)

    def ids_of(self, name: str) -> np.ndarray:
        """Tokenizes a named text as int32[T]."""
        return self.ids(self.fixture.texts[name])

    def append_ids(
        self, ctx: Context, ids: np.ndarray, params: PolicyParams | None = None
    ) -> tuple[Context, jax.Array]:
        """Returns the context after a text, and float[T, D], its final hidden states."""
        tokens = jnp.asarray(ids, jnp.int32)[None]
        mask = jnp.ones(tokens.shape, bool)
        ctx, hidden = self.extend_text(params or self.params, ctx, tokens, mask)
        return ctx, hidden[0]

    def text(self, ctx: Context, *names: str, params: PolicyParams | None = None) -> Context:
        """Returns the context after named texts."""
        for name in names:
            ctx, _ = self.append_ids(ctx, self.ids_of(name), params)
        return ctx

    def vae_image(self) -> jax.Array:
        """Returns the VAE's image float32[1, H, W, 3]."""
        return jnp.asarray(self.array("c2.vae_image").transpose(1, 2, 0)[None])

    def vit_patches(self) -> tuple[jax.Array, tuple[int, int]]:
        """Returns the ViT's image as patches float32[1, M, patch width], and its grid."""
        image = jnp.asarray(self.array("c2.vit_image").transpose(1, 2, 0)[None])
        return patchify(image, self.config.vit.patch_size), self.config.vit_grid(*image.shape[1:3])

    @functools.cached_property
    def image_latent(self) -> jax.Array:
        """Encodes the VAE's image as float32[1, h, w, z]; a constant also inside a gradient."""
        with jax.ensure_compile_time_eval():
            return self.call(self.params, method="encode_image", images=self.vae_image())

    def vae_block(self, ctx: Context, params: PolicyParams | None = None) -> Context:
        """Returns the context after the VAE block of the image."""
        latents = patchify(self.image_latent, self.config.latent_patch_size)
        return self.extend_vae(params or self.params, ctx, latents=latents, grid=self.latent_grid())

    def vit_block(self, ctx: Context, params: PolicyParams | None = None) -> Context:
        """Returns the context after the ViT block of the image."""
        patches, grid = self.vit_patches()
        return self.extend_vit(params or self.params, ctx, patches=patches, grid=grid)

    def drawing(self, params: PolicyParams | None = None) -> GuidanceContexts:
        """Returns the contexts of c5: gen = [prompt], cfg_text = [], cfg_img = [prompt]."""
        gen = self.text(kv_cache.empty(1), "c5.prompt", params=params)
        return GuidanceContexts(gen, kv_cache.empty(1), gen)

    def thinking(self) -> GuidanceContexts:
        """Returns the contexts of an image after a think text (c6)."""
        system = self.text(kv_cache.empty(1), "c6.system")
        prompt = self.text(system, "c6.prompt")
        return GuidanceContexts(self.text(prompt, "c6.think"), system, prompt)

    def editing(self, params: PolicyParams | None = None) -> GuidanceContexts:
        """Returns the contexts of an edit (c7)."""
        system = self.text(kv_cache.empty(1), "c6.system", params=params)
        image = self.vit_block(self.vae_block(system, params), params)
        gen = self.text(image, "c7.instruction", params=params)
        return GuidanceContexts(gen, image, self.text(system, "c7.instruction", params=params))

    def layers(
        self, tokens: Tokens, positions: jax.Array, ctx: Context, self_mask: jax.Array
    ) -> list[Tokens]:
        """Returns every decoder layer's output, by running it as a model of one layer."""
        masks = (*(segment.valid[:, None] for segment in ctx.segments), self_mask)
        outputs = []
        for index in range(self.config.llm.num_hidden_layers):
            at = slice(index, index + 1)
            past = tuple(dataclasses.replace(s, k=s.k[at], v=s.v[at]) for s in ctx.segments)
            decoder = dict(self.params.base["language_model"])
            decoder["layers"] = jax.tree.map(operator.itemgetter(at), decoder["layers"])
            params = PolicyParams(self.params.base | {"language_model": decoder})
            tokens, _ = self._layer(
                params, tokens=tokens, positions=positions, past=past, masks=masks
            )
            outputs.append(tokens)
        return outputs

    def combined_velocity(
        self,
        contexts: GuidanceContexts,
        x: np.ndarray | jax.Array,
        sigma: float,
        guidance: Guidance,
    ) -> jax.Array:
        """Computes guided velocities float32[B, M, C] branch by branch.

        Many guidances of the same contexts share their compiled functions so.
        """
        x = jnp.asarray(x, jnp.float32)
        sigmas = jnp.full(x.shape[:1], sigma, jnp.float32)

        def branch(ctx: Context, *, used: bool) -> jax.Array | None:
            if not used:
                return None
            return self.velocity(self.params, ctx, x, sigmas, grid=self.latent_grid())

        plain = self.velocity(self.params, contexts.gen, x, sigmas, grid=self.latent_grid())
        return combine(
            plain,
            branch(contexts.cfg_text, used=guidance.uses_text),
            branch(contexts.cfg_img, used=guidance.uses_image),
            guidance,
        )

    def guided_velocity(
        self,
        contexts: GuidanceContexts,
        x: np.ndarray | jax.Array,
        sigma: float,
        guidance: Guidance,
        *,
        active: bool = True,
        params: PolicyParams | None = None,
    ) -> jax.Array:
        """Computes the guided velocity float32[M, C] of one sample's latents float32[M, C]."""
        return self.guided(
            params or self.params,
            contexts,
            jnp.asarray(x, jnp.float32)[None],
            jnp.full((1,), sigma, jnp.float32),
            grid=self.latent_grid(),
            guidance=guidance,
            active=active,
        )[0]


def cache_arrays(ctx: Context, latent_blocks: tuple[int, ...] = ()) -> tuple[np.ndarray, ...]:
    """Returns keys and values [L, S, K, H] of a one-row context without padding, in reading order.

    Args:
      ctx: the context.
      latent_blocks: indexes of the VAE blocks, which the cache holds delimiters first.
    """
    segments: list[list[np.ndarray]] = []
    for index, segment in enumerate(ctx.segments):
        pair = [np.asarray(x[:, 0]).swapaxes(1, 2) for x in (segment.k, segment.v)]
        segments.append([reading_order(x, 1) for x in pair] if index in latent_blocks else pair)
    return tuple(np.concatenate(side, axis=1) for side in zip(*segments, strict=True))


def reading_order(x: np.ndarray, axis: int) -> np.ndarray:
    """Reorders [start, end, latents...] to [start, latents..., end] along an axis."""
    start, end, latents = np.split(np.asarray(x), [1, 2], axis=axis)
    return np.concatenate([start, latents, end], axis=axis)


def context_sizes(ctx: Context, prefix: str) -> dict[str, np.ndarray]:
    """Returns the number of cached tokens and the next RoPE id per row."""
    return {
        f"{prefix}.kv_lens": np.asarray(kv_cache.length(ctx)),
        f"{prefix}.ropes": np.asarray(ctx.rope),
    }
