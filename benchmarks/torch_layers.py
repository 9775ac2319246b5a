"""The layers of BAGEL's decoder in plain PyTorch; see `benchmarks.torch_bagel` for the shapes."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from flax import traverse_util
from torch import nn
from torch.nn import functional as F

from alphagrpo_jax.models.bagel_config import LLMConfig
from alphagrpo_jax.policy import PolicyParams

LAYERS = "language_model/layers/"


class Past(NamedTuple):
    """The context that new tokens attend to beside themselves."""

    keys: torch.Tensor  # float[L, B, K, S, H]
    values: torch.Tensor  # float[L, B, K, S, H]
    # Where new keys and values are written in place: the slots before it are read, and S is larger.
    # None: all slots are read, and nothing is written, as autograd needs it.
    slot: int | None


class AdaptedLinear(nn.Module):
    """Computes `x W^T + bias`, plus `scale (x a^T) b^T` if there is an adapter."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        adapter: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
    ) -> None:
        """Takes float[out, in], float[out], and the adapter's float32[r, in], float32[out, r]."""
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale
        self.a, self.b = (None, None) if adapter is None else map(nn.Parameter, adapter)
        self.merged: torch.Tensor | None = None
        self.is_merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps float[..., in] to float[..., out]."""
        if self.is_merged and self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        y = F.linear(x, self.weight, self.bias)
        if self.a is None or self.b is None:
            return y
        low = F.linear(x, self.a.to(x.dtype))
        b = self.b.to(x.dtype)
        # One pass over y, where `y + ...` takes two.
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.T, alpha=self.scale).view_as(y)

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the weight with the adapter merged in, which is used until `unmerge`."""
        if self.a is None or self.b is None:
            return
        if self.merged is None:
            self.merged = torch.empty_like(self.weight)
        self.merged.copy_(torch.addmm(self.weight.float(), self.b, self.a, alpha=self.scale))
        self.is_merged = True

    def unmerge(self) -> None:
        """Uses the weight and the adapter."""
        self.is_merged = False


class RootMeanSquare(nn.Module):
    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class TreeWeights:
    """Reads the leaves of the parameter trees as tensors."""

    def __init__(self, params: PolicyParams, device: str, dtype: torch.dtype) -> None:
        self.base: Mapping[str, Any] = traverse_util.flatten_dict(params.base, sep="/")
        self.lora: Mapping[str, Any] = traverse_util.flatten_dict(params.lora or {}, sep="/")
        self.scale, self.device, self.dtype = params.lora_scale, device, dtype

    def read(self, path: str, layer: int | None = None) -> torch.Tensor:
        """Returns a leaf of the base, or one layer of it."""
        return self._tensor(self.base[path], layer, self.dtype)

    def linear(self, path: str, layer: int | None = None) -> AdaptedLinear:
        """Returns a product with its adapter."""
        weight = self.read(f"{path}/kernel", layer).T.contiguous()
        bias = self.read(f"{path}/bias", layer) if f"{path}/bias" in self.base else None
        adapter = None
        if f"{path}/a" in self.lora:
            a, b = (
                self._tensor(self.lora[f"{path}/{name}"], layer, torch.float32) for name in "ab"
            )
            adapter = (a.T.contiguous(), b.T.contiguous())
        return AdaptedLinear(weight, bias, adapter, self.scale)

    def norm(self, path: str, epsilon: float, layer: int | None = None) -> RootMeanSquare:
        """Returns a root-mean-square norm."""
        return RootMeanSquare(self.read(f"{path}/scale", layer), epsilon)

    def _tensor(self, leaf: Any, layer: int | None, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.from_dlpack(leaf.addressable_data(0))  # whole on every device
        return (tensor if layer is None else tensor[layer]).to(self.device, dtype)


class _Expert(nn.Module):
    """One layer's weights for one kind of tokens."""

    def __init__(self, weights: TreeWeights, config: LLMConfig, suffix: str, layer: int) -> None:
        super().__init__()
        self.config = config

        def linear(name: str) -> AdaptedLinear:
            return weights.linear(f"{LAYERS}{name}", layer)

        def norm(name: str) -> RootMeanSquare:
            return weights.norm(f"{LAYERS}{name}{suffix}", config.rms_norm_eps, layer)

        self.q, self.k, self.v, self.o = (
            linear(f"self_attn/{name}_proj{suffix}") for name in "qkvo"
        )
        self.gate, self.up, self.down = (
            linear(f"mlp{suffix}/{name}_proj") for name in ("gate", "up", "down")
        )
        self.q_norm, self.k_norm = norm("self_attn/q_norm"), norm("self_attn/k_norm")
        self.input_norm = norm("input_layernorm")
        self.post_norm = norm("post_attention_layernorm")

    def compiled(self) -> "_Expert":
        """Returns a copy of the same weights whose two functions are compiled."""
        twin = copy.copy(self)
        twin.heads = torch.compile(self.heads)
        twin.finish = torch.compile(self.finish)
        return twin

    def heads(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns queries and keys float[B, T, N + K, H], rotated; values float[B, T, K, H]."""
        x = self.input_norm(x)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.config.head_dim))
            for project in (self.q, self.k, self.v)
        )
        return _rotate(torch.cat([self.q_norm(q), self.k_norm(k)], 2), cos, sin), v

    def finish(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Adds attention's output float[B, T, N * H], projected, and the MLP's."""
        x = x + self.o(mixed)
        normed = self.post_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class TorchLayer(nn.Module):
    """One layer: joint attention over cached and new tokens, and an MLP per expert."""

    def __init__(self, weights: TreeWeights, config: LLMConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.und = _Expert(weights, config, "", layer)
        self.gen = _Expert(weights, config, "_moe_gen", layer)

    def compiled(self) -> "TorchLayer":
        """Returns a copy of the same weights, all but its attention compiled.

        Attention is one call of PyTorch anyway. Compiled with it, a layer writes its cache by
        copying it, and has variants for every kind of context.
        """
        twin = copy.copy(self)
        twin._modules = {"und": self.und.compiled(), "gen": self.gen.compiled()}
        return twin

    def forward(
        self,
        und: torch.Tensor,
        gen: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past: Past,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]:
        """Returns the new hidden states, and the tokens' keys and values float[B, K, T, H]."""
        heads, v = self.und.heads(und, *rotary)
        if gen is not None:
            gen_heads, gen_v = self.gen.heads(gen, *rotary)
            heads, v = torch.cat([heads, gen_heads], 1), torch.cat([v, gen_v], 1)
        q, k = heads.split([self.config.num_attention_heads, self.config.num_key_value_heads], 2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past.slot is None:
            keys, values = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        else:
            end = past.slot + k.shape[2]
            past.keys[:, :, past.slot : end] = k
            past.values[:, :, past.slot : end] = v
            keys, values = past.keys[:, :, :end], past.values[:, :, :end]
        mixed, split = _attend(q, keys, values, mask), und.shape[1]
        if gen is None:
            return self.und.finish(und, mixed), None, (k, v)
        # Contiguous: of a slice, the product would be one per row.
        und = self.und.finish(und, mixed[:, :split].contiguous())
        gen = self.gen.finish(gen, mixed[:, split:].contiguous())
        return und, gen, (k, v)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + H / 2) of float[B, T, heads, H] by float[B, T or 1, 1, H / 2]."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Computes grouped-query attention: queries of one key head are queries of one longer text.

    Args:
      q: float[B, T, N, H].
      k, v: float[B, K, S, H].
      mask: see `TorchBagel.additive_mask`.
    Returns:
      float[B, T, N * H].
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[1]
    shape = (batch, length, kv_heads, heads // kv_heads, width)
    folded = q.view(shape).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)
    mixed = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    mixed = mixed.view(batch, kv_heads, -1, length, width).permute(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * width)
