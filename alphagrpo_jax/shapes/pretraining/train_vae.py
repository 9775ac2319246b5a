"""Trains the small autoencoder of the shapes world (PyTorch: its CPU convolutions train fastest).

    python -m alphagrpo_jax.shapes.pretraining.train_vae --out runs/vae
    python -m alphagrpo_jax.shapes.pretraining.train_vae --out runs/vae2 --start runs/vae \\
      --latent-noise 0.15

The first command trains encoder and decoder, the second the decoder alone on noised latents. Each
takes an estimated (not measured) 35 minutes at most on two idle cores.

Writes `ae.safetensors` and `vae_config.json` in BAGEL's layout, which the JAX autoencoder of
`models/vae.py` reads. Data, noise and learning rate depend on the seed and the step alone: after an
interruption (exit code 75) the same command continues, bit for bit with as many threads.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import tqdm
from safetensors.torch import load_file, save_file
from torch import nn

from alphagrpo_jax.models.vae import NORM_EPSILON, NORM_GROUPS, VAEConfig
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.files import replacing
from alphagrpo_jax.runtime.paths import existing_file
from alphagrpo_jax.runtime.stopping import StopFlag
from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.shapes.pretraining import resumable

CONFIG = VAEConfig(
    resolution=scenes.RESOLUTION,
    downsample=8,
    ch=32,
    ch_mult=(1, 1, 1, 1),
    num_res_blocks=0,
    z_channels=16,
    scale_factor=1.0,
    shift_factor=0.0,
)
EMA_DECAY = 0.998
CHECKPOINT_SECONDS = 60.0
MEASURED_BATCHES = 16  # of 32 scenes, for the latent's mean and deviation


# The attributes of the modules below are the names in BAGEL's checkpoint: keep them.


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPSILON)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class TorchAttentionBlock(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in "qkvo")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (m(h).flatten(2).transpose(1, 2)[:, None] for m in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Resample(nn.Module):
    """Doubles (`up`) or halves the resolution."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1 if up else 0, stride=1 if up else 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _middle(channels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "block_1": ResidualBlock(channels, channels),
            "attn_1": TorchAttentionBlock(channels),
            "block_2": ResidualBlock(channels, channels),
        }
    )


def _level(inputs: int, outputs: int, blocks: int, resample: str) -> nn.ModuleDict:
    layers = [ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)]
    level = nn.ModuleDict({"block": nn.ModuleList(layers)})
    if resample:
        level[resample] = Resample(outputs, up=resample == "upsample")
    return level


def _run_level(level: nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert isinstance(level, nn.ModuleDict)  # from `_level`
    blocks = level["block"]
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        x = block(x)
    for name in ("downsample", "upsample"):
        if name in level:
            x = level[name](x)
    return x


class Coder(nn.Module):
    """The encoder (`up=False`) or the decoder (`up=True`)."""

    def __init__(self, cfg: VAEConfig, *, up: bool) -> None:
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        top = widths[-1]
        self.is_decoder = up
        self.mid = _middle(top)
        if up:
            self.conv_in = nn.Conv2d(cfg.z_channels, top, 3, padding=1)
            inputs = [*widths[1:], top]
            self.up = nn.ModuleList(
                _level(i, o, cfg.num_res_blocks + 1, "upsample" if k else "")
                for k, (i, o) in enumerate(zip(inputs, widths, strict=True))
            )
            self.norm_out = _norm(widths[0])
            self.conv_out = nn.Conv2d(widths[0], cfg.out_ch, 3, padding=1)
        else:
            self.conv_in = nn.Conv2d(cfg.in_channels, cfg.ch, 3, padding=1)
            inputs = [cfg.ch, *widths[:-1]]
            last = len(widths) - 1
            self.down = nn.ModuleList(
                _level(i, o, cfg.num_res_blocks, "downsample" if k < last else "")
                for k, (i, o) in enumerate(zip(inputs, widths, strict=True))
            )
            self.norm_out = _norm(top)
            self.conv_out = nn.Conv2d(top, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        if not self.is_decoder:
            for level in self.down:
                x = _run_level(level, x)
        x = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](x)))
        if self.is_decoder:
            for level in reversed(self.up):
                x = _run_level(level, x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Encoder and decoder of one configuration."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        self.encoder = Coder(cfg, up=False)
        self.decoder = Coder(cfg, up=True)


def sample_batch(
    rng: np.random.Generator, size: int, crowded: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples scenes, float32[B, 3, H, W] in [-1, 1], and per-pixel weights [B, 1, H, W].

    Args:
      rng: source of randomness.
      size: number of scenes B.
      crowded: share of scenes with four to nine objects, which teach edges faster.
    """
    batch = [
        scenes.random_scene(rng, int(rng.integers(4, 10)) if rng.random() < crowded else None)
        for _ in range(size)
    ]
    images = np.stack([scenes.render(scene, supersample=3) for scene in batch])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    colors = [scenes.BACKGROUNDS[scene.background] for scene in batch]
    background = torch.tensor(colors) / 127.5 - 1
    foreground = (x - background[:, :, None, None]).abs().amax(1, keepdim=True) > 0.05
    return x.contiguous(memory_format=torch.channels_last), 1.0 + 3.0 * foreground


def vae_loss(
    model: AutoEncoder,
    x: torch.Tensor,
    weight: torch.Tensor,
    kl_weight: float,
    latent_noise: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes weighted L1 + L2 reconstruction plus `kl_weight` times the mean KL to N(0, 1).

    Args:
      model: the autoencoder.
      x: float32[B, 3, H, W] in [-1, 1].
      weight: float32[B, 1, H, W], per pixel.
      kl_weight: factor of the KL term.
      latent_noise: None trains encoder and decoder. Otherwise the encoder is frozen and the decoder
        learns to undo latent noise of random deviation up to `latent_noise`, because the latents
        that the UMM generates are never exact.
    Returns:
      The loss; and its reconstruction and KL terms, detached.
    """
    with torch.set_grad_enabled(latent_noise is None):
        mean, log_variance = model.encoder(x).chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    if latent_noise is None:
        deviation = torch.exp(0.5 * log_variance)
    else:
        deviation = latent_noise * torch.rand(len(x), 1, 1, 1)
    z = mean + deviation * torch.randn_like(mean)
    error = model.decoder(z) - x
    reconstruction = (weight * (error.abs() + error.square())).sum() / (3 * weight.sum())
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction + kl_weight * kl, reconstruction.detach(), kl.detach()


def export(model: AutoEncoder, out: pathlib.Path) -> None:
    """Measures the latent's mean and deviation and writes the folder's two files."""
    rng = np.random.default_rng(10_000)
    with torch.no_grad():
        batches = [sample_batch(rng, 32)[0] for _ in range(MEASURED_BATCHES)]
        latents = torch.cat([model.encoder(x).chunk(2, dim=1)[0] for x in batches])
    fields = {
        **{k: getattr(CONFIG, k) for k in CONFIG.__dataclass_fields__},
        "ch_mult": list(CONFIG.ch_mult),
        "scale_factor": round(1.0 / float(latents.std()), 4),
        "shift_factor": round(float(latents.mean()), 4),
    }
    (out / "vae_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "ae.safetensors")


def schedule(step: int, steps: int) -> float:
    """Computes the factor of the learning rate: warm-up over 100 steps, parabola down to 2 %."""
    return min(1.0, (step + 1) / 100) * max(0.02, 1 - (step / steps) ** 2)


def optimizer_step(
    model: AutoEncoder, optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float
) -> None:
    """Takes one optimizer step with clipped gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def update_average(average: AutoEncoder, model: AutoEncoder, step: int) -> None:
    """Updates the running average of the weights; its decay grows over the first steps."""
    decay = min(EMA_DECAY, step / (step + 9))
    for averaged, new in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(new, 1 - decay)


def seed_noise(seed: int, step: int) -> None:
    """Seeds PyTorch so that the random numbers of a step depend on (seed, step) alone."""
    words = np.random.SeedSequence((seed, step, 1)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def train(
    out: pathlib.Path,
    *,
    steps: int,
    batch: int,
    lr: float,
    kl_weight: float,
    seed: int,
    start: pathlib.Path | None,
    latent_noise: float | None,
    crowded: float,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Trains from the latest checkpoint of the run in `out`; returns the exit code.

    Args:
      out: folder of the run and of its result; a checkpoint is written every minute.
      steps: updates in all; the learning rate's schedule spans them.
      batch: scenes per update.
      lr: peak learning rate.
      kl_weight, latent_noise: see `vae_loss`.
      seed: of weights, data and noise.
      start: folder of the weights to start from.
      crowded: see `sample_batch`.
      stopped: called after every update; when it returns True, the run saves and ends.
    Raises:
      InputError: the run in `out` has other options.
    """
    options = {"steps": steps, "batch": batch, "lr": lr, "kl_weight": kl_weight, "seed": seed}
    options |= {"start": str(start), "latent_noise": latent_noise, "crowded": crowded}
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    # torch declares no `to` with a memory format alone.
    model = AutoEncoder(CONFIG).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = AutoEncoder(CONFIG).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    trained = (model if latent_noise is None else model.decoder).parameters()
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    stateful = {"model": model, "average": average, "optimizer": optimizer}
    step, spent, file = 0, 0.0, out / "state.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        resumable.check_options(saved.get("options", {}), options, out)
        for name, holder in stateful.items():
            holder.load_state_dict(saved[name])
        step, spent = saved["step"], saved["spent"]
    else:
        if start is not None:
            weights = existing_file(start / "ae.safetensors", "--start names an earlier --out")
            model.load_state_dict(load_file(weights))
        average.load_state_dict(model.state_dict())

    def save() -> None:
        state = {name: holder.state_dict() for name, holder in stateful.items()}
        with replacing(file) as new:
            torch.save(state | {"step": step, "spent": spent, "options": options}, new)
        export(average, out)

    start_time, last_save = time.monotonic() - spent, spent
    with tqdm.tqdm(total=steps, initial=step, unit="step") as bar:
        while step < steps:
            x, weight = sample_batch(np.random.default_rng((seed, step)), batch, crowded)
            seed_noise(seed, step)
            loss, reconstruction, kl = vae_loss(model, x, weight, kl_weight, latent_noise)
            optimizer_step(model, optimizer, loss, lr * schedule(step, steps))
            step += 1
            update_average(average, model, step)
            spent = time.monotonic() - start_time
            bar.set_postfix(reconstruction=f"{reconstruction:.4f}", kl=f"{kl:.2f}", refresh=False)
            bar.update()
            if stopped():
                break
            if spent - last_save > CHECKPOINT_SECONDS:
                last_save = spent
                save()
    save()
    return cli.DONE if step == steps else cli.STOPPED


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=cli.COUNT, default=20_000)
    parser.add_argument("--batch", type=cli.COUNT, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=3e-4)
    parser.add_argument("--seed", type=cli.SEED, default=0)
    parser.add_argument("--start", type=pathlib.Path, help="folder whose weights to begin with")
    parser.add_argument("--latent-noise", type=float, help="train the decoder alone, see vae_loss")
    parser.add_argument("--crowded", type=float, default=0.5, help="share of crowded scenes")
    parser.add_argument(
        "--threads", type=cli.COUNT, default=2, help="no more than there are idle cores"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Trains as the flags say; returns the exit code."""
    stop = StopFlag()
    torch.set_num_threads(options.threads)
    arguments = {name: value for name, value in vars(options).items() if name != "threads"}
    code = train(**arguments, stopped=lambda: stop.requested)
    if code == cli.STOPPED:
        tqdm.tqdm.write("stopped; the same command continues", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
