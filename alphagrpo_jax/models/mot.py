"""The Qwen2 mixture-of-transformers decoder of BAGEL.

Every layer has two sets of weights: the "und" expert for text, ViT tokens and image delimiters,
the "gen" expert (`*_moe_gen`) for latent tokens. Attention is joint. The two kinds of tokens stay
two arrays, [B, Tu, D] and [B, Tg, D], so that no token is computed twice or routed dynamically;
positions and mask are explicit, and index the tokens in the order und, gen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from alphagrpo_jax.models.bagel_config import LLMConfig
from alphagrpo_jax.models.kv_cache import Segment
from alphagrpo_jax.models.layers import GatedMLP, Linear, RMSNorm, scan_layers
from alphagrpo_jax.ops.attention import attend
from alphagrpo_jax.ops.rope import rotary, rotate
from alphagrpo_jax.runtime.sharding import HEADS_SPEC

GEN = "_moe_gen"


class Tokens(NamedTuple):
    """Hidden states of the two kinds of tokens."""

    und: jax.Array  # float[B, Tu, D]
    gen: jax.Array | None  # float[B, Tg, D]; None without latent tokens

    def by_expert(self) -> list[tuple[str, jax.Array]]:
        """Returns the name suffix and the tokens of every expert that has any."""
        pairs = [("", self.und)]
        return pairs if self.gen is None else [*pairs, (GEN, self.gen)]


def _tokens(hidden: list[jax.Array]) -> Tokens:
    """Puts the experts' hidden states, in the order of `Tokens.by_expert`, back together."""
    return Tokens(hidden[0], hidden[1] if len(hidden) > 1 else None)


class Geometry(NamedTuple):
    """Rotary angles and attention masks of the new tokens, the same in all layers."""

    cos: jax.Array  # float32[B, T, H / 2]
    sin: jax.Array  # float32[B, T, H / 2]
    # bool[B or R_i or 1, T or 1, S_i] per cached segment, then that of the new tokens
    masks: tuple[jax.Array, ...]


class MoTAttention(nn.Module):
    """Joint attention over [cached | und | gen], projections and head norms per expert."""

    config: LLMConfig
    dtype: Any
    attention_kernel: str

    @nn.compact
    def __call__(
        self, tokens: Tokens, past: tuple[tuple[jax.Array, jax.Array], ...], geometry: Geometry
    ) -> tuple[Tokens, tuple[jax.Array, jax.Array]]:
        heads = [self._heads(suffix, x) for suffix, x in tokens.by_expert()]
        q, k, v = (jnp.concatenate(arrays, axis=1) for arrays in zip(*heads, strict=True))
        q = rotate(q, geometry.cos, geometry.sin)
        k, v = (x.swapaxes(1, 2) for x in (rotate(k, geometry.cos, geometry.sin), v))
        keys = (*(pair[0] for pair in past), k)
        values = (*(pair[1] for pair in past), v)
        mixed = attend(
            q, keys, values, geometry.masks, kernel=self.attention_kernel, spec=HEADS_SPEC
        )
        split = tokens.und.shape[1]
        by_expert = [mixed] if tokens.gen is None else [mixed[:, :split], mixed[:, split:]]
        residual = nn.initializers.variance_scaling(
            0.5 / self.config.num_hidden_layers, "fan_in", "truncated_normal"
        )
        out = [
            Linear(
                self.config.hidden_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=residual,
                name="o_proj" + suffix,
            )(expert_mixed)
            for (suffix, _), expert_mixed in zip(tokens.by_expert(), by_expert, strict=True)
        ]
        return _tokens(out), (k, v)

    def _heads(self, suffix: str, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns query [B, T, N, H], key and value [B, T, K, H] of one expert's tokens."""
        cfg = self.config

        def project(name: str, count: int) -> jax.Array:
            y = Linear(count * cfg.head_dim, dtype=self.dtype, name=name + suffix)(x)
            return y.reshape(*x.shape[:2], count, cfg.head_dim)

        q = project("q_proj", cfg.num_attention_heads)
        k = project("k_proj", cfg.num_key_value_heads)
        v = project("v_proj", cfg.num_key_value_heads)
        q = RMSNorm(cfg.rms_norm_eps, name="q_norm" + suffix)(q)
        return q, RMSNorm(cfg.rms_norm_eps, name="k_norm" + suffix)(k), v


class MoTBlock(nn.Module):
    """One decoder layer: pre-norm attention and MLP, each with a residual."""

    config: LLMConfig
    dtype: Any
    attention_kernel: str
    keep_cache: bool  # False while denoising: keys of noisy latents are read by nobody later

    @nn.compact
    def __call__(
        self, tokens: Tokens, past: tuple[tuple[jax.Array, jax.Array], ...], geometry: Geometry
    ) -> tuple[Tokens, tuple[jax.Array, jax.Array] | None]:
        cfg = self.config
        normed = self._norm("input_layernorm", tokens)
        attention = MoTAttention(cfg, self.dtype, self.attention_kernel, name="self_attn")
        mixed, pair = attention(normed, past, geometry)
        tokens = jax.tree.map(jnp.add, tokens, mixed)
        # Two residual branches per layer: scaled so, their sum keeps its size whatever the depth.
        residual = nn.initializers.variance_scaling(
            0.5 / cfg.num_hidden_layers, "fan_in", "truncated_normal"
        )
        normed = self._norm("post_attention_layernorm", tokens)
        out = [
            GatedMLP(cfg.intermediate_size, self.dtype, residual, name="mlp" + suffix)(x)
            for suffix, x in normed.by_expert()
        ]
        tokens = jax.tree.map(jnp.add, tokens, _tokens(out))
        return tokens, (pair if self.keep_cache else None)

    def _norm(self, name: str, tokens: Tokens) -> Tokens:
        return _tokens(
            [RMSNorm(self.config.rms_norm_eps, name=name + s)(x) for s, x in tokens.by_expert()]
        )


class MoTDecoder(nn.Module):
    """All layers (stacked, scanned) and the final norms."""

    config: LLMConfig
    dtype: Any = jnp.float32
    remat: str = "none"  # key of layers.REMAT_POLICIES
    unroll: int = 1  # layers per iteration of the scan
    attention_kernel: str = "plain"  # kernel of `ops.attention`

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        positions: jax.Array,
        past: tuple[Segment, ...],
        masks: tuple[jax.Array, ...],
        *,
        keep_cache: bool = True,
        final_norm: bool = True,
    ) -> tuple[Tokens, tuple[jax.Array, jax.Array] | None]:
        """Runs new tokens over a cached context.

        Args:
          tokens: hidden states of the und and gen tokens.
          positions: int32[B, T] RoPE ids, T = Tu + Tg.
          past: cached segments.
          masks: bool[B or R_i or 1, T or 1, S_i] per cached segment, then bool[B or 1, T, T].
          keep_cache: return the new keys and values.
          final_norm: apply the final norms.
        Returns:
          Hidden states, and keys and values float[L, B, K, T, H] in the order und, gen.
        """
        cfg = self.config
        # Angles once for all layers, and in float32: see `ops.rope`.
        cos, sin = rotary(positions, cfg.head_dim, cfg.rope_theta)
        tokens = jax.tree.map(lambda x: x.astype(self.dtype), tokens)
        pairs = tuple((segment.k, segment.v) for segment in past)
        tokens, cache = scan_layers(
            MoTBlock(cfg, self.dtype, self.attention_kernel, keep_cache, name="layers"),
            tokens,
            pairs,
            Geometry(cos, sin, masks),
            length=cfg.num_hidden_layers,
            remat=self.remat,
            unroll=self.unroll,
        )
        if final_norm:
            tokens = _tokens(
                [RMSNorm(cfg.rms_norm_eps, name="norm" + s)(x) for s, x in tokens.by_expert()]
            )
        return tokens, cache
