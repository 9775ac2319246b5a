"""BAGEL's policy in plain PyTorch, made from the arrays of ours; see `benchmarks.torch_peer`.

Shapes: B rows, T new tokens, S cached tokens, R noisy versions of a row's image, M latent tokens, C
their width, D width, L layers, N query heads, K key heads, H head dimension, V vocabulary.
"""

import copy
import dataclasses
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.ops.posembed import MAX_PERIOD, TIME_FEATURES, grid_ids, sincos_table
from alphagrpo_jax.policy import PolicyParams
from benchmarks.torch_layers import LAYERS, AdaptedLinear, Past, TorchLayer, TreeWeights
from benchmarks.torch_vae import TorchPixelDecoder

RECOMPILE_LIMIT = 64  # PyTorch's 8 would leave most variants of a layer uncompiled


@dataclasses.dataclass(frozen=True)
class TorchContext:
    """Cached tokens of B rows, right padded."""

    keys: torch.Tensor  # float[L, B, K, S, H], rotated
    values: torch.Tensor  # float[L, B, K, S, H]
    valid: torch.Tensor  # bool[B, S]
    rope: torch.Tensor  # int64[B], the next RoPE id

    @property
    def length(self) -> int:
        """Returns S."""
        return self.valid.shape[1]

    def rows(self, rows: slice) -> "TorchContext":
        """Returns a view of some rows."""
        return TorchContext(
            self.keys[:, rows], self.values[:, rows], self.valid[rows], self.rope[rows]
        )

    def repeated(self, times: int, room: int = 0) -> "TorchContext":
        """Copies every row `times` times, in a row, with `room` more slots that are not valid."""
        keys, values = (
            F.pad(x.repeat_interleave(times, 1), (0, 0, 0, room)) for x in (self.keys, self.values)
        )
        valid = F.pad(self.valid.repeat_interleave(times, 0), (0, room))
        return TorchContext(keys, values, valid, self.rope.repeat_interleave(times))


class TorchBagel(nn.Module):
    """The decoder with its embeddings and heads, and the pixel decoder; base weights are frozen."""

    def __init__(
        self,
        config: BagelConfig,
        params: PolicyParams,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Converts weights and adapters (copies) to PyTorch's layouts."""
        super().__init__()
        weights = TreeWeights(params, device, dtype)
        llm = config.llm
        self.config, self.dtype = config, dtype
        self.score = score_tokens
        self.table = weights.read("embed_tokens/embedding")
        self.layers = nn.ModuleList(
            TorchLayer(weights, llm, layer) for layer in range(llm.num_hidden_layers)
        )
        self.norm = weights.norm("language_model/norm", llm.rms_norm_eps)
        self.gen_norm = weights.norm("language_model/norm_moe_gen", llm.rms_norm_eps)
        self.lm_head, self.vae2llm, self.llm2vae, self.time_in, self.time_out = map(
            weights.linear,
            ("lm_head", "vae2llm", "llm2vae", "time_embedder/mlp_0", "time_embedder/mlp_2"),
        )
        self.pixel_decoder = TorchPixelDecoder(config.vae).to(device, dtype)
        self.pixel_decoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.pixel_decoder.load(lambda path: weights.read(f"vae/decoder/{path}"))
        positions = sincos_table(llm.hidden_size, config.max_latent_size)
        self.positions = torch.from_numpy(positions.copy()).to(device, dtype)
        self.marks = torch.tensor([config.tokens.vision_start, config.tokens.vision_end])
        self.marks = self.marks.to(device)
        frequency = torch.arange(0, llm.head_dim, 2, dtype=torch.float32) / llm.head_dim
        self.rope_frequency = (1.0 / llm.rope_theta**frequency).to(device)
        half = TIME_FEATURES // 2
        time_frequency = torch.arange(half, dtype=torch.float32) / half
        self.time_frequency = (1.0 / MAX_PERIOD**time_frequency).to(device)

    def compiled(self) -> "TorchBagel":
        """Returns a model of the same weights whose functions are compiled, see `TorchLayer`.

        All layers share what is compiled: the whole decoder as one function takes many times as
        long.
        """
        # It counts all variants of a layer: texts, images, merged or not, with gradient or not.
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.layers = nn.ModuleList(
            layer.compiled() for layer in self.layers if isinstance(layer, TorchLayer)
        )
        twin.score = torch.compile(score_tokens)
        twin.pixel_decoder = cast(TorchPixelDecoder, torch.compile(self.pixel_decoder))
        return twin

    @property
    def device(self) -> torch.device:
        """Returns where the weights lie."""
        return self.table.device

    def adapted(self) -> Iterator[tuple[str, int, AdaptedLinear]]:
        """Yields path in the parameter tree, layer and module of every adapted product."""
        for name, module in self.named_modules():
            if isinstance(module, AdaptedLinear) and module.a is not None:
                _, layer, kind, product = name.split(".")
                suffix = "_moe_gen" if kind == "gen" else ""
                is_attention = product in "qkvo"
                folder = "self_attn" if is_attention else f"mlp{suffix}"
                leaf = f"{product}_proj{suffix if is_attention else ''}"
                yield f"{LAYERS}{folder}/{leaf}", int(layer), module

    def empty(self, rows: int) -> TorchContext:
        """Returns a context without tokens."""
        llm = self.config.llm
        shape = (llm.num_hidden_layers, rows, llm.num_key_value_heads, 0, llm.head_dim)
        cached = torch.empty(shape, device=self.device, dtype=self.dtype)
        valid = torch.empty((rows, 0), device=self.device, dtype=torch.bool)
        return TorchContext(
            cached, cached, valid, torch.zeros(rows, device=self.device, dtype=torch.int64)
        )

    def text_hidden(
        self,
        tokens: torch.Tensor,
        rope: torch.Tensor,
        past: Past,
        mask: torch.Tensor,
        *,
        keep_cache: bool = False,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Reads texts.

        Args:
          tokens: int64[B, T].
          rope: int64[B], RoPE id of the first token.
          past: the context.
          mask: float[B, 1, N / K * T, S + T], added to scores; see `additive_mask`.
          keep_cache: return keys and values.
        Returns:
          float[B, T, D] hidden states (normed); keys and values float[B, K, T, H] by layer.
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        und = F.embedding(tokens, self.table)
        und, _, cache = self._run(und, None, rope[:, None] + steps, past, mask, keep_cache)
        return self.norm(und), cache

    def next_logits(
        self, token: torch.Tensor, rope: torch.Tensor, past: Past, mask: torch.Tensor
    ) -> torch.Tensor:
        """Reads one token int64[B] per row; returns float32[B, V], logits of the next one."""
        hidden, _ = self.text_hidden(token[:, None], rope, past, mask)
        return self.lm_head(hidden[:, 0]).float()

    def token_scores(
        self,
        tokens: torch.Tensor,
        rope: torch.Tensor,
        past: Past,
        mask: torch.Tensor,
        index: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes log-probs and entropies float32[n] of n tokens.

        Args:
          tokens, rope, past, mask: as for `text_hidden`.
          index: int64[n], positions `row * T + t` whose next tokens are scored.
          targets: int64[n], those tokens.
          temperature: divides the logits.
        """
        hidden, _ = self.text_hidden(tokens, rope, past, mask)
        logits = self.lm_head(hidden.flatten(0, 1).index_select(0, index))
        return self.score(logits, targets, temperature)

    def velocity(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        rope: torch.Tensor,
        past: Past,
        mask: torch.Tensor,
        grid: tuple[int, int],
    ) -> torch.Tensor:
        """Computes velocities of R noisy versions of each row's image.

        Args:
          x: float32[B, R, M, C].
          sigma: float32[R], noise levels.
          rope: int64[B], RoPE id of the image.
          past: the context.
          mask: float[B, 1, N / K * T or 1, S + T], T = R (M + 2); see `additive_mask`.
          grid: token rows and columns.
        Returns:
          float32[B, R, M, C].
        """
        batch, versions = x.shape[:2]
        table = self.positions[torch.from_numpy(grid_ids(grid, self.config.max_latent_size))]
        angles = sigma[:, None] * self.time_frequency
        features = torch.cat([angles.cos(), angles.sin()], -1).to(self.dtype)
        times = self.time_out(F.silu(self.time_in(features)))
        gen = (self.vae2llm(x.to(self.dtype)) + (times[:, None] + table)).flatten(1, 2)
        und = F.embedding(self.marks.repeat(versions), self.table).repeat(batch, 1, 1)
        # All tokens of an image have one id.
        _, gen, _ = self._run(und, gen, rope[:, None], past, mask, keep_cache=False)
        assert gen is not None  # latents went in
        return self.llm2vae(self.gen_norm(gen)).float().view(x.shape)

    def decode_pixels(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Decodes latent tokens float32[B, M, C] as images float32[B, H, W, 3] in [-1, 1]."""
        patch, z = self.config.latent_patch_size, self.config.vae.z_channels
        x = latents.view(-1, *grid, patch, patch, z).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(-1, z, grid[0] * patch, grid[1] * patch).to(self.dtype)
        return self.pixel_decoder(x).permute(0, 2, 3, 1).float().clamp(-1.0, 1.0)

    def additive_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Makes the mask of scores from bool[B, T or 1, S], for queries folded by key head.

        Returns:
          float[B, 1, N / K * T or 1, S], 0 where visible, else minus infinity.
        """
        llm = self.config.llm
        mask = torch.zeros(visible.shape, device=visible.device, dtype=self.dtype)
        mask = mask.masked_fill_(~visible, -torch.inf)[:, None]
        folded = llm.num_attention_heads // llm.num_key_value_heads
        return mask if mask.shape[2] == 1 else mask.repeat(1, 1, folded, 1)

    def _run(
        self,
        und: torch.Tensor,
        gen: torch.Tensor | None,
        positions: torch.Tensor,
        past: Past,
        mask: torch.Tensor,
        keep_cache: bool,  # noqa: FBT001 (private)
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Runs the layers; `positions` is int64[B, T or 1]."""
        angles = positions[:, :, None, None].float() * self.rope_frequency
        rotary = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        cache = []
        for number, layer in enumerate(self.layers):
            layer_past = Past(past.keys[number], past.values[number], past.slot)
            und, gen, pair = layer(und, gen, rotary, layer_past, mask)
            if keep_cache:
                cache.append(pair)
        return und, gen, cache


def score_tokens(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes log-probs and entropies float32[n] of tokens int64[n] from logits float[n, V]."""
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy
