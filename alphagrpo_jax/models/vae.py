"""The FLUX autoencoder (BAGEL's VAE) as Linen modules, NHWC.

Parameter paths mirror the checkpoint's: `decoder.up.1.block.0.conv1.weight` is
`decoder/up_1/block_0/conv1/kernel`. Kernels are HWIO. Levels are indexed from full resolution (0).
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from alphagrpo_jax.models.layers import ReadsParams
from alphagrpo_jax.runtime.errors import InputError

NORM_GROUPS = 32
NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are FLUX's.

    `scale_factor` and `shift_factor` map the encoder's mean to the latent that the model sees:
    `latent = scale_factor * (mean - shift_factor)`.
    """

    resolution: int = 256
    in_channels: int = 3
    downsample: int = 8
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        if self.downsample != 2 ** (len(self.ch_mult) - 1):
            raise InputError(
                f"vae_config.json: downsample is {self.downsample} but ch_mult has "
                f"{len(self.ch_mult)} levels, which divide by {2 ** (len(self.ch_mult) - 1)}; "
                "correct one of the two"
            )
        odd = [m for m in self.ch_mult if (self.ch * m) % NORM_GROUPS]
        if odd:
            raise InputError(
                f"vae_config.json: ch * ch_mult = {[self.ch * m for m in odd]} must be multiples "
                f"of {NORM_GROUPS} (group normalization)"
            )


class Conv(ReadsParams, nn.Conv):
    """Convolution, NHWC."""


class GroupNorm(ReadsParams, nn.GroupNorm):
    """Group normalization over the last axis."""


def _norm(name: str, dtype: Any) -> GroupNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    return GroupNorm(
        NORM_GROUPS, epsilon=NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name
    )


def _conv(features: int, size: int, name: str, dtype: Any) -> Conv:
    return Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """Two times norm, swish and convolution, plus the (projected) input."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = _conv(self.features, 3, "conv1", self.dtype)(nn.swish(_norm("norm1", self.dtype)(x)))
        h = _conv(self.features, 3, "conv2", self.dtype)(nn.swish(_norm("norm2", self.dtype)(h)))
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, "nin_shortcut", self.dtype)(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head attention over all positions of one image, plus the input."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = _norm("norm", self.dtype)(x)
        q, k, v = (
            _conv(channels, 1, name, self.dtype)(h).reshape(batch, height * width, channels)
            for name in ("q", "k", "v")
        )
        # float32 island, as in the decoder: softmax over up to thousands of positions.
        scores = jnp.einsum("bqc,bkc->bqk", q, k).astype(jnp.float32) * channels**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return x + _conv(channels, 1, "proj_out", self.dtype)(h)


class Middle(nn.Module):
    """The two residual blocks and the attention at the lowest resolution."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResBlock(self.features, self.dtype, name="block_1")(x)
        x = AttentionBlock(self.dtype, name="attn_1")(x)
        return ResBlock(self.features, self.dtype, name="block_2")(x)


class Downsample(nn.Module):
    """Stride-2 convolution after padding one row below and one column to the right."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(
            x.shape[-1], (3, 3), (2, 2), padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv"
        )(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return _conv(x.shape[-1], 3, "conv", self.dtype)(x)


class Level(nn.Module):
    """The residual blocks of one resolution and the change to the next one."""

    features: int
    num_blocks: int
    resample: str  # "downsample", "upsample" or "" at the last level
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for block in range(self.num_blocks):
            x = ResBlock(self.features, self.dtype, name=f"block_{block}")(x)
        if self.resample == "downsample":
            x = Downsample(self.dtype, name="downsample")(x)
        elif self.resample == "upsample":
            x = Upsample(self.dtype, name="upsample")(x)
        return x


class VAEEncoder(nn.Module):
    """Maps an image to mean and log-variance of its latent, concatenated over channels."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        last = len(cfg.ch_mult) - 1
        x = _conv(cfg.ch, 3, "conv_in", self.dtype)(x)
        for level, mult in enumerate(cfg.ch_mult):
            resample = "downsample" if level < last else ""
            x = Level(
                cfg.ch * mult, cfg.num_res_blocks, resample, self.dtype, name=f"down_{level}"
            )(x)
        x = Middle(cfg.ch * cfg.ch_mult[-1], self.dtype, name="mid")(x)
        x = nn.swish(_norm("norm_out", self.dtype)(x))
        return _conv(2 * cfg.z_channels, 3, "conv_out", self.dtype)(x)


class VAEDecoder(nn.Module):
    """Maps an unscaled latent to an image."""

    config: VAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        cfg = self.config
        x = _conv(cfg.ch * cfg.ch_mult[-1], 3, "conv_in", self.dtype)(z)
        x = Middle(cfg.ch * cfg.ch_mult[-1], self.dtype, name="mid")(x)
        for level, mult in reversed(tuple(enumerate(cfg.ch_mult))):
            resample = "upsample" if level > 0 else ""
            x = Level(
                cfg.ch * mult, cfg.num_res_blocks + 1, resample, self.dtype, name=f"up_{level}"
            )(x)
        x = nn.swish(_norm("norm_out", self.dtype)(x))
        return _conv(cfg.out_ch, 3, "conv_out", self.dtype)(x)


class VAE(nn.Module):
    """Encoder and decoder with the latent's scale and shift."""

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.encoder = VAEEncoder(self.config, self.dtype)
        self.decoder = VAEDecoder(self.config, self.dtype)

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes mean and log-variance of the latent before scaling.

        Args:
          images: float[B, H, W, 3] in [-1, 1]; H and W multiples of `downsample`.
        Returns:
          Two float[B, H / downsample, W / downsample, z_channels].
        """
        chex.assert_rank(images, 4)
        mean, log_variance = jnp.split(self.encoder(images), 2, axis=-1)
        return mean, log_variance

    def encode(self, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Encodes an image as a scaled latent: the mean, or a sample if `noise` is passed.

        Args:
          images: float[B, H, W, 3] in [-1, 1].
          noise: float[B, h, w, z_channels] of N(0, 1), or None.
        Returns:
          float[B, h, w, z_channels].
        """
        mean, log_variance = self.moments(images)
        if noise is not None:
            mean = mean + jnp.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (mean - self.config.shift_factor)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes a scaled latent.

        Args:
          latents: float[B, h, w, z_channels].
        Returns:
          float[B, H, W, 3], nominally in [-1, 1], not clipped.
        """
        chex.assert_rank(latents, 4)
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs an image (touches every parameter, used for initialization)."""
        return self.decode(self.encode(images))
