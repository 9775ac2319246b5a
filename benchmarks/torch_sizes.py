"""Compares single functions with plain PyTorch on one device, with random weights.

    python -m benchmarks.torch_peer --sizes=7b --device=cuda [--rows=4] [--side=512] [--text=256]

`--sizes` is "7b" (BAGEL-7B-MoT) or a folder with a model's JSON files and tokenizer. Both
implementations have the same weights in `--dtype`, which lie on the device twice (2 x 29 GB for
7b in bfloat16), adapters that are not merged, and a context of `--prompt` tokens. The parts:

    text token     one token of each row, sampled, of `--text` tokens
    drawing step   one velocity without guidance, and the step, of `--points` - 1 steps
    update         log-probs of a text of `--text` tokens and of one image step, and their gradient

PyTorch's text gets the lengths that ours has. Differences of log-probs, velocities and gradients
are printed; in float32 on the CPU one above 1e-4 ends the command, in bfloat16 the mean ones are
compared with a looser bound.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util

from alphagrpo_jax import policy
from alphagrpo_jax.config import Guidance
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.bagel_7b import TOKENIZER, bagel_7b_config
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.sampling.image import noise_levels
from alphagrpo_jax.sampling.text import text_log_probs
from alphagrpo_jax.types import ImageSample
from benchmarks import torch_policy
from benchmarks.policy_speed import CompiledPolicy, Sizes, random_params
from benchmarks.torch_bagel import TorchBagel, TorchContext
from benchmarks.torch_equality import tensor, text_lengths
from benchmarks.torch_policy import TorchImages, TorchTexts

PARTS = ("text token", "drawing step", "update")
NO_GUIDANCE = Guidance(
    text_scale=1.0, image_scale=1.0, interval=(0.0, 1.0), renorm="global", renorm_min=0.0
)
DEVICES = {"cpu": "cpu", "cuda": "gpu"}  # JAX's names of PyTorch's devices
# Largest mean absolute difference, as a share of the mean absolute value of ours.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}
ADAPTER_STDDEV = 0.01
say_now = functools.partial(print, flush=True)


def add_flags(parser: cli.Parser) -> None:
    """Declares the flags of this comparison."""
    parser.add_argument("--sizes", help="7b, or a folder with a model's JSON files: see above")
    parser.add_argument("--device", default="cpu", choices=sorted(DEVICES))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(BOUNDS))
    for name, default in (("side", 512), ("prompt", 128), ("text", 256), ("points", 9)):
        parser.add_argument(f"--{name}", type=cli.COUNT, default=default, help="with --sizes")


class JaxFunctions:
    """Our functions, the weights and the inputs."""

    def __init__(self, config: BagelConfig, sizes: Sizes, dtype: str) -> None:
        self.model = Bagel(config, dtype=jnp.dtype(dtype))
        self.sizes, rows = sizes, sizes.rows
        params = random_params(self.model, 0)
        self.params = dataclasses.replace(params, lora=_noisy(params.lora))
        self.compiled = CompiledPolicy(self.model, sizes)
        self.compiled.options = dataclasses.replace(self.compiled.options, guidance=NO_GUIDANCE)
        self.keys = jax.random.split(jax.random.key(1), rows)
        vocabulary = config.llm.vocab_size
        self.prompt = jax.random.randint(self.keys[0], (rows, sizes.prompt), 0, vocabulary)
        self.scored = jax.random.randint(self.keys[1 % rows], (rows, sizes.text), 0, vocabulary)
        latents = self.compiled.grid[0] * self.compiled.grid[1]
        self.noise = jax.random.normal(
            self.keys[0], (rows, latents, config.latent_width), jnp.float32
        )
        self.ctx = self.compiled.prefill(self.params, self.prompt)
        self.sample: ImageSample = self.draw()

    def write(self) -> Any:
        """Samples texts."""
        return self.compiled.sample_text(self.params, self.ctx, self.keys)

    def draw(self) -> Any:
        """Samples images."""
        return self.compiled.sample_image(self.params, self.ctx, self.noise, self.keys)

    def gradient(self) -> Any:
        """Computes the gradient of the summed log-probs."""
        lora, ctx = self.params.lora, self.ctx
        text = self.compiled.text_gradient(lora, self.params, ctx, self.scored)
        image = self.compiled.image_gradient(lora, self.params, ctx, self.sample)
        return jax.tree.map(jnp.add, text, image)


class TorchFunctions:
    """PyTorch's functions on the inputs of ours."""

    def __init__(self, ours: JaxFunctions, device: str, dtype: str, *, compiled: bool) -> None:
        self.ours, self.device = ours, device
        config = ours.model.config
        self.model = TorchBagel(config, ours.params, device=device, dtype=getattr(torch, dtype))
        self.compute = self.model.compiled() if compiled else self.model
        self.grid, self.options = ours.compiled.grid, ours.compiled.options
        prompt = tensor(ours.prompt).long().to(device)
        valid = torch.ones_like(prompt, dtype=torch.bool)
        with torch.no_grad():
            self.ctx = torch_policy.extend_text(
                self.model, self.model.empty(len(prompt)), prompt, valid
            )
        self.lengths = torch_policy.TextLengths(
            *(lengths.to(device) for lengths in text_lengths(ours.write()))
        )
        scored = tensor(ours.scored).long().to(device)
        mask = torch.ones_like(scored, dtype=torch.bool)
        no_log_probs = torch.zeros(scored[:, 1:].shape, device=device)
        self.texts = TorchTexts(scored, no_log_probs, mask, mask[:, 1:])
        sample = ours.sample
        arrays = (sample.before, sample.after, sample.log_prob, sample.latents)
        self.images = TorchImages(*(tensor(x).to(device) for x in arrays))
        self.noise = tensor(ours.noise).to(device)

    @torch.no_grad()
    def write(self) -> TorchTexts:
        """Samples texts."""
        return torch_policy.write_text(
            self.compute,
            self._with_room(int(self.lengths.tokens.max())),
            self.ctx.length,
            self.lengths,
            temperature=1.0,
        )

    @torch.no_grad()
    def draw(self) -> TorchImages:
        """Samples images."""
        ctx, options = self._with_room(self.noise.shape[1] + 2), self.options
        return torch_policy.sample_images(
            self.compute, ctx, self.ctx.length, self.noise, 0, options=options,
            grid=self.grid,
        )  # fmt: skip

    def gradient(self) -> None:
        """Computes the gradient of the summed log-probs."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self.text_log_probs().sum().backward()
        torch_policy.image_log_probs(
            self.compute, self.ctx, self.images, 0, options=self.options, grid=self.grid
        ).sum().backward()

    def text_log_probs(self) -> torch.Tensor:
        """Computes log-probs float32[B, T - 1]."""
        return torch_policy.text_log_probs(self.compute, self.ctx, self.texts, temperature=1.0)[0]

    @torch.no_grad()
    def velocities(self) -> torch.Tensor:
        """Computes velocities float32[B, 1, M, C]."""
        return torch_policy.image_velocities(
            self.compute, self.ctx, self.images.before, 0, options=self.options,
            grid=self.grid,
        )  # fmt: skip

    def _with_room(self, room: int) -> TorchContext:
        return self.ctx.repeated(1, room)


def measure(options: argparse.Namespace, say: Callable[[str], None] = say_now) -> dict[str, Any]:
    """Compares and times the functions; returns all figures by name.

    Raises:
      InputError: the device is not there, the image's side does not fit, or the two differ.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    _check_device(options.device)
    config = _bagel_config(options.sizes)
    if options.side % config.latent_stride:
        raise InputError(f"--side={options.side} must be a multiple of {config.latent_stride}")
    sizes = Sizes(options.rows or 4, options.side, options.prompt, options.text, options.points)
    ours = JaxFunctions(config, sizes, options.dtype)
    names = ("eager", "compiled") if options.compile else ("eager",)
    peers = {
        name: TorchFunctions(ours, options.device, options.dtype, compiled=name == "compiled")
        for name in names
    }
    figures: dict[str, Any] = dataclasses.asdict(sizes)
    for name, peer in peers.items():
        gaps = differences(ours, peer)
        say(f"mean differences, {name}: " + ", ".join(f"{k} {gap:.1e}" for k, gap in gaps.items()))
        bound = BOUNDS[options.dtype]
        if not max(gaps.values()) <= bound:
            raise InputError(f"{name}: the implementations differ by {gaps}, expected {bound:g}")
        figures |= {f"difference/{name}/{key}": gap for key, gap in gaps.items()}
    steps = (int(text_lengths(ours.write()).tokens.max()) - 1, sizes.points - 1, 1)
    for part, count in zip(PARTS, steps, strict=True):
        if part in options.parts:
            seconds = _by_turns({"ours": ours, **peers}, part, options.repeats)
            figures |= {f"seconds/{name}/{part}": x / count for name, x in seconds.items()}
            line = [f"{name} {x / count * 1e3:.2f} ms" for name, x in seconds.items()]
            line += [f"ours / {name} {seconds['ours'] / seconds[name]:.2f}" for name in peers]
            say(f"{part}: " + ", ".join(line))
    return figures


def differences(ours: JaxFunctions, peer: TorchFunctions) -> dict[str, float]:
    """Computes mean absolute differences as shares of the mean absolute value of ours, by name."""
    compiled, rows = ours.compiled, ours.sizes.rows
    score = jax.jit(functools.partial(text_log_probs, ours.model, temperature=1.0))
    scores = score(ours.params, ours.ctx, ours.scored, jnp.ones(ours.scored.shape, bool))
    flow = jax.jit(functools.partial(policy.velocity, ours.model, grid=compiled.grid))
    sigma = jnp.full((rows,), noise_levels(compiled.options)[0])
    velocities = flow(ours.params, ours.ctx, ours.sample.before[:, 0], sigma)
    with torch.no_grad():
        log_probs = peer.text_log_probs()
    peer.gradient()
    ours_flat, peer_flat = [], []
    gradient = traverse_util.flatten_dict(ours.gradient(), sep="/")
    for path, layer, module in peer.model.adapted():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None  # every adapter takes part
            ours_flat.append(tensor(gradient[f"{path}/{name}"][layer]).flatten())
            peer_flat.append(parameter.grad.T.flatten().cpu())
    return {
        "text log-probs": _mean_gap(tensor(scores.log_prob), log_probs),
        "velocities": _mean_gap(tensor(velocities), peer.velocities()[:, 0]),
        "adapter gradients": _mean_gap(torch.cat(ours_flat), torch.cat(peer_flat)),
    }


def _mean_gap(ours: torch.Tensor, peer: torch.Tensor) -> float:
    gap = (ours.float() - peer.float().cpu()).abs().mean()
    return float(gap / ours.float().abs().mean())


def _by_turns(contestants: dict[str, Any], part: str, repeats: int) -> dict[str, float]:
    """Times one part by each implementation in turn; returns the medians, seconds."""
    method = ("write", "draw", "gradient")[PARTS.index(part)]
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(1 + repeats):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(getattr(contestant, method)())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}


def _check_device(device: str) -> None:
    """Refuses a device that one of the two libraries does not see.

    Raises:
      InputError: it is not there.
    """
    seen = jax.default_backend()
    if seen != DEVICES[device] or (device == "cuda" and not torch.cuda.is_available()):
        cuda = "with" if torch.cuda.is_available() else "without"
        raise InputError(
            f"--device={device}: JAX uses {seen} and PyTorch is one {cuda} a GPU; install both for "
            "the device, or choose another"
        )


def _bagel_config(name: str) -> BagelConfig:
    if name == "7b":
        return bagel_7b_config(Tokenizer.from_folder(resolve(TOKENIZER)))
    folder = resolve(name)
    return BagelConfig.from_folder(folder, Tokenizer.from_folder(folder).special)


def _noisy(lora: Any) -> Any:
    """Replaces the zeros of the adapters' second matrices."""
    flat = traverse_util.flatten_dict(lora)
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        if path[-1] == "b":
            flat[path] = jnp.asarray(ADAPTER_STDDEV * rng.standard_normal(leaf.shape, np.float32))
    return traverse_util.unflatten_dict(flat)
