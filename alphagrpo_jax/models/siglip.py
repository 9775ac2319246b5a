"""The SigLIP vision encoder (NaViT form): linear patch embedding, full attention per image."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from alphagrpo_jax.models.bagel_config import ViTConfig
from alphagrpo_jax.models.layers import MLP, Embedding, LayerNorm, Linear, scan_layers
from alphagrpo_jax.ops.attention import attend
from alphagrpo_jax.runtime.sharding import HEADS_SPEC


class ViTAttention(nn.Module):
    """Multi-head self-attention over all patches of an image."""

    config: ViTConfig
    dtype: Any
    attention_kernel: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = self.config.num_attention_heads
        q, k, v = (
            Linear(x.shape[-1], dtype=self.dtype, name=name)(x).reshape(*x.shape[:2], heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        mask = jnp.ones((1, 1, x.shape[1]), bool)
        mixed = attend(q, (k,), (v,), (mask,), kernel=self.attention_kernel, spec=HEADS_SPEC)
        return Linear(x.shape[-1], dtype=self.dtype, name="out_proj")(mixed)


class ViTBlock(nn.Module):
    """One pre-norm encoder layer."""

    config: ViTConfig
    dtype: Any
    attention_kernel: str

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        cfg = self.config
        normed = LayerNorm(cfg.layer_norm_eps, name="layer_norm1")(x)
        x = x + ViTAttention(cfg, self.dtype, self.attention_kernel, name="self_attn")(normed)
        normed = LayerNorm(cfg.layer_norm_eps, name="layer_norm2")(x)
        mlp = MLP(cfg.intermediate_size, cfg.hidden_size, cfg.hidden_act, self.dtype, name="mlp")
        return x + mlp(normed), None


class VisionTransformer(nn.Module):
    """Maps patches to features, after the final norm."""

    config: ViTConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    attention_kernel: str = "plain"

    @nn.compact
    def __call__(self, patches: jax.Array, ids: jax.Array) -> jax.Array:
        """Encodes images of one size.

        Args:
          patches: float[B, M, patch * patch * 3], features in the order (row, column, channel).
          ids: int32[M], rows of the learned position table.
        Returns:
          float[B, M, hidden_size].
        """
        cfg = self.config
        rows = (cfg.image_size // cfg.patch_size) ** 2
        x = Linear(cfg.hidden_size, dtype=self.dtype, name="patch_embedding")(patches)
        x = x + Embedding(rows, cfg.hidden_size, 0.1, self.dtype, name="position_embedding")(
            ids[None]
        )
        x, _ = scan_layers(
            ViTBlock(cfg, self.dtype, self.attention_kernel, name="layers"),
            x,
            None,
            length=cfg.used_layers,
            remat=self.remat,
            unroll=self.unroll,
        )
        return LayerNorm(cfg.layer_norm_eps, name="post_layernorm")(x)
