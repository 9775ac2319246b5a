"""The decoder of BAGEL's autoencoder in plain PyTorch, NCHW; see `benchmarks.torch_peer`.

Modules have the names of the parameter tree, by which `load` finds their weights.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from alphagrpo_jax.models.vae import NORM_EPSILON, NORM_GROUPS, VAEConfig

# (path in the parameter tree, "a/b/c") -> tensor
ReadLeaf = Callable[[str], torch.Tensor]


class TorchPixelDecoder(nn.Module):
    """Maps scaled latents to images."""

    def __init__(self, config: VAEConfig) -> None:
        """Makes the modules; `load` fills them."""
        super().__init__()
        self.config = config
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = _conv(config.z_channels, widths[-1])
        self.mid = _Middle(widths[-1])
        width = widths[-1]
        for level in reversed(range(len(widths))):
            blocks = config.num_res_blocks + 1
            self.add_module(f"up_{level}", _Level(width, widths[level], blocks, last=level == 0))
            width = widths[level]
        self.norm_out = _norm(width)
        self.conv_out = _conv(width, config.out_ch)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents float[B, z, h, w] as images float[B, 3, H, W], not clipped."""
        x = self.conv_in(latents / self.config.scale_factor + self.config.shift_factor)
        x = self.mid(x)
        for level in reversed(range(len(self.config.ch_mult))):
            x = getattr(self, f"up_{level}")(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def load(self, read: ReadLeaf) -> None:
        """Copies the weights of the parameter tree's decoder, and freezes them."""
        for name, parameter in self.named_parameters():
            *path, leaf = name.split(".")
            if leaf == "weight":
                leaf = "kernel" if parameter.ndim == 4 else "scale"
            values = read("/".join((*path, leaf)))
            if leaf == "kernel":
                values = values.permute(3, 2, 0, 1)  # HWIO to OIHW
            with torch.no_grad():
                parameter.copy_(values)
        self.requires_grad_(requires_grad=False)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv(outputs, outputs)
        self.nin_shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (
            project(h).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = _Residual(width, width), _Residual(width, width)
        self.attn_1 = _Attention(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, rows, columns = x.shape
        # On the CPU `F.interpolate` takes several times as long.
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return self.conv(x.reshape(batch, width, 2 * rows, 2 * columns))


class _Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int, *, last: bool) -> None:
        super().__init__()
        self.blocks = blocks
        for block in range(blocks):
            self.add_module(f"block_{block}", _Residual(outputs if block else inputs, outputs))
        self.upsample = None if last else _Upsample(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in range(self.blocks):
            x = getattr(self, f"block_{block}")(x)
        return x if self.upsample is None else self.upsample(x)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=NORM_EPSILON)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
