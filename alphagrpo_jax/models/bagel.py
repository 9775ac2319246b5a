"""BAGEL: one decoder that reads text and images, and generates text and image latents."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.kv_cache import Segment
from alphagrpo_jax.models.layers import MLP, Embedding, Linear
from alphagrpo_jax.models.mot import MoTDecoder, Tokens
from alphagrpo_jax.models.siglip import VisionTransformer
from alphagrpo_jax.models.vae import VAE
from alphagrpo_jax.ops.posembed import (
    grid_ids,
    interpolated_grid_ids,
    sincos_table,
    timestep_features,
)

EMBED_STDDEV = 0.5  # about the size of a latent token's embedding


class Bagel(nn.Module):
    """Declares all parameters; the functions of `policy.py` are its only callers.

    The two-dimensional position tables are constants, not parameters. Parameters are plain arrays,
    without Flax's partitioning boxes: where they lie is the affair of `runtime/sharding.py`, and
    adapters, checkpoints and the name table meet nothing but a dictionary of arrays.
    """

    config: BagelConfig
    dtype: Any = jnp.float32  # compute dtype
    remat: str = "none"  # key of layers.REMAT_POLICIES
    unroll: int = 1  # layers per iteration of the scan
    attention_kernel: str = "plain"  # kernel of `ops.attention`

    if TYPE_CHECKING:  # Flax makes modules hashable, its type information does not say so

        def __hash__(self) -> int: ...

    def setup(self) -> None:
        cfg, dtype = self.config, self.dtype
        width = cfg.llm.hidden_size
        self.embed_tokens = Embedding(cfg.llm.vocab_size, width, EMBED_STDDEV, dtype)
        stack = (self.remat, self.unroll, self.attention_kernel)
        self.language_model = MoTDecoder(cfg.llm, dtype, *stack)
        # Both heads give float32: a log-prob or a velocity rounded to bfloat16 would dwarf the
        # small differences between old and new policy that the ratio is made of.
        self.lm_head = Linear(
            cfg.llm.vocab_size, use_bias=False, dtype=dtype, out_dtype=jnp.float32
        )
        self.time_embedder = MLP(width, width, "silu", dtype, ("mlp_0", "mlp_2"))
        self.vae2llm = Linear(width, dtype=dtype)
        self.llm2vae = Linear(
            cfg.latent_width,
            dtype=dtype,
            kernel_init=nn.initializers.zeros,  # an untrained model predicts no motion
            out_dtype=jnp.float32,
        )
        self.vit_model = VisionTransformer(cfg.vit, dtype, *stack)
        self.connector = MLP(width, width, cfg.connector_act, dtype)
        self.vae = VAE(cfg.vae, dtype)

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """Embeds tokens int32[B, T] as float[B, T, D]."""
        return self.embed_tokens(tokens)

    def embed_latents(self, x: jax.Array, sigma: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Embeds latent tokens float[B, M, C] at noise level sigma float[B] as float[B, M, D]."""
        table = self._positions(grid, self.config.max_latent_size)
        return self.vae2llm(x) + self.embed_time(sigma)[:, None] + table

    def embed_time(self, sigma: jax.Array) -> jax.Array:
        """Embeds noise levels float[B] as float[B, D]."""
        return self.time_embedder(timestep_features(sigma))

    def vit_features(self, patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Computes the ViT's output float[B, M, ViT width], after its final norm."""
        return self.vit_model(patches, self._ids(grid, self.config.vit_max_num_patch_per_side))

    def connect(self, features: jax.Array) -> jax.Array:
        """Maps ViT features to the decoder's width."""
        return self.connector(features)

    def embed_patches(self, patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Embeds ViT patches float[B, M, patch width] as float[B, M, D]."""
        features = self.connect(self.vit_features(patches, grid))
        return features + self._positions(grid, self.config.vit_max_num_patch_per_side)

    def decode(
        self,
        tokens: Tokens,
        positions: jax.Array,
        past: tuple[Segment, ...],
        masks: tuple[jax.Array, ...],
        *,
        keep_cache: bool = True,
        final_norm: bool = True,
    ) -> tuple[Tokens, tuple[jax.Array, jax.Array] | None]:
        """Runs the decoder, see `mot.MoTDecoder`."""
        return self.language_model(
            tokens, positions, past, masks, keep_cache=keep_cache, final_norm=final_norm
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Computes logits float32[B, T, V] of hidden states float[B, T, D] (normed)."""
        return self.lm_head(hidden)

    def read_velocity(self, hidden: jax.Array) -> jax.Array:
        """Computes velocities float32[B, M, C] of hidden states float[B, M, D] (normed)."""
        return self.llm2vae(hidden)

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes images as mean and log-variance, see `vae.VAE.moments`."""
        return self.vae.moments(images)

    def encode_image(self, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Encodes images float[B, H, W, 3] as latents float32[B, h, w, z]."""
        return self.vae.encode(images, noise).astype(jnp.float32)

    def decode_image(self, latents: jax.Array) -> jax.Array:
        """Decodes latents float[B, h, w, z] as images float32[B, H, W, 3], not clipped."""
        return self.vae.decode(latents).astype(jnp.float32)

    def initialize(self, images: jax.Array) -> jax.Array:
        """Touches every parameter once, which makes Flax create it."""
        self.vae(images)
        tokens = jnp.zeros((1, 1), jnp.int32)
        latents = jnp.zeros((1, 1, self.config.latent_width))
        patches = jnp.zeros((1, 1, self.config.patch_width))
        und = jnp.concatenate([self.embed_text(tokens), self.embed_patches(patches, (1, 1))], 1)
        gen = self.embed_latents(latents, jnp.zeros((1,)), (1, 1))
        hidden, _ = self.decode(
            Tokens(und, gen), jnp.zeros((1, 3), jnp.int32), (), (jnp.ones((1, 3, 3), bool),)
        )
        assert hidden.gen is not None
        return self.logits(hidden.und).sum() + self.read_velocity(hidden.gen).sum()

    def _ids(self, grid: tuple[int, int], side: int) -> jax.Array:
        rule = interpolated_grid_ids if self.config.interpolate_pos else grid_ids
        return jnp.asarray(rule(grid, side))

    def _positions(self, grid: tuple[int, int], side: int) -> jax.Array:
        """Returns rows of the fixed table, float[1, M, D] in the compute dtype."""
        rule = interpolated_grid_ids if self.config.interpolate_pos else grid_ids
        table = sincos_table(self.config.llm.hidden_size, side)
        return jnp.asarray(table[rule(grid, side)][None], self.dtype)


def init_base(model: Bagel, key: jax.Array) -> dict:
    """Samples random weights for a model (what its pretraining starts from).

    Args:
      model: the model.
      key: typed PRNG key.
    Returns:
      The base tree, float32 leaves.
    """
    side = model.config.latent_stride
    images = jnp.zeros((1, side, side, model.config.vae.in_channels))
    return jax.jit(functools.partial(model.init, method="initialize"))(key, images)["params"]


@functools.cache
def base_shapes(model: Bagel) -> dict:
    """Returns the base tree with `jax.ShapeDtypeStruct` leaves, without computing anything."""
    return jax.eval_shape(lambda: init_base(model, jax.random.key(0)))
