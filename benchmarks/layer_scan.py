"""Measures tracing and compiling with `models.layers.scan_layers` against Linen's `nn.scan`.

    python -m benchmarks.layer_scan [--sizes tests package:umm] [--repeats 5]

Both ways are measured in turn in one process without a compilation cache, as CPU seconds of the
process, since compiling uses several threads. Only shapes are needed: no weights are read and
nothing is run. `tests/models/test_layers.py` shows that both give the same numbers.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen as nn

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache, layers, lora, mot, siglip
from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import SpecialTokens, Tokenizer
from alphagrpo_jax.sampling.text import text_log_probs

ROWS, LENGTH = 2, 16  # of the texts
RANK = 4  # of the adapters
GRID = (2, 2)  # latent tokens of the image
TINY = BagelConfig.from_dicts(
    {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 44,
    },
    {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "patch_size": 4, "image_size": 24,
    },
    {"ch": 32, "ch_mult": [1, 1], "downsample": 2, "num_res_blocks": 1, "z_channels": 4},
    {"latent_patch_size": 2, "max_latent_size": 8, "vit_max_num_patch_per_side": 6},
    tokens=SpecialTokens(im_start=40, im_end=41, vision_start=42, vision_end=43),
)  # fmt: skip


def linen_scan(
    block: nn.Module, carry: Any, per_layer: Any, *shared: Any, length: int, remat: str, unroll: int
) -> tuple[Any, Any]:
    """Does what `scan_layers` does, by `nn.scan` and `nn.remat`."""

    def step(layer: Any, carry: Any, inputs: Any) -> tuple[Any, Any]:
        return layer(carry, inputs, *shared)

    if remat != "none":
        step = nn.remat(step, prevent_cse=False, policy=layers.REMAT_POLICIES[remat])
    scan = nn.scan(
        step,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        length=length,
        unroll=unroll,
    )
    return scan(block, carry, per_layer)


@contextlib.contextmanager
def through_linen() -> Iterator[None]:
    """Makes the model use `nn.scan`, and `nn.Module.param` for every parameter."""
    with (
        mock.patch.object(mot, "scan_layers", linen_scan),
        mock.patch.object(siglip, "scan_layers", linen_scan),
        mock.patch.object(layers.ReadsParams, "param", nn.Module.param),
    ):
        yield


def text_gradient(model: Bagel, params: policy.PolicyParams, tokens: jax.Array) -> jax.Array:
    """Computes the gradient of a text's mean log-prob with respect to the adapters."""

    def loss(adapters: dict) -> jax.Array:
        mask = jnp.ones(tokens.shape, bool)
        adapted = dataclasses.replace(params, lora=adapters)
        ctx = kv_cache.empty(ROWS)
        return text_log_probs(model, adapted, ctx, tokens, mask, temperature=1.0).log_prob.mean()

    return jax.grad(loss)(params.lora)


def image_gradient(model: Bagel, params: policy.PolicyParams, x: jax.Array) -> jax.Array:
    """Computes the gradient of a mean velocity with respect to the adapters."""

    def loss(adapters: dict) -> jax.Array:
        adapted = dataclasses.replace(params, lora=adapters)
        sigma = jnp.full((ROWS,), 0.5)
        return policy.velocity(model, adapted, kv_cache.empty(ROWS), x, sigma, GRID).mean()

    return jax.grad(loss)(params.lora)


def vit_forward(model: Bagel, params: policy.PolicyParams, patches: jax.Array) -> jax.Array:
    """Encodes ViT patches."""
    return policy.embed_patches(model, params, patches, GRID)


def cases(model: Bagel) -> dict[str, tuple[Callable[..., Any], jax.ShapeDtypeStruct]]:
    """Returns the functions to compile, each with the shape of its last argument."""
    cfg = model.config
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    latents = jax.ShapeDtypeStruct((ROWS, GRID[0] * GRID[1], cfg.latent_width), jnp.float32)
    patches = jax.ShapeDtypeStruct((ROWS, GRID[0] * GRID[1], cfg.patch_width), jnp.float32)
    return {
        "text gradient": (text_gradient, tokens),
        "image gradient": (image_gradient, latents),
        "vit forward": (vit_forward, patches),
    }


def seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Measures the CPU seconds of tracing (with lowering) and of compiling."""
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.process_time()
    lowered.compile()
    return traced - start, time.process_time() - traced


def adapters_of(base: dict) -> dict:
    """Returns adapters for the default targets."""
    return lora.init(jax.random.key(0), base, lora.TARGETS, RANK)


def config_of(sizes: str) -> BagelConfig:
    """Returns the tiny configuration, or that of a folder in the official layout."""
    if sizes == "tests":
        return TINY
    folder = resolve(sizes)
    return BagelConfig.from_folder(folder, Tokenizer.from_folder(folder).special)


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m benchmarks.layer_scan")
    parser.add_argument("--sizes", nargs="*", default=["tests", "package:umm"])
    parser.add_argument("--repeats", type=cli.COUNT, default=5)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Times both ways for every model of `--sizes` and prints a table."""
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003
    print(f"{'sizes':<12} {'function':<15} {'':<8} {'scan_layers':>12} {'nn.scan':>9} {'ratio':>6}")
    for sizes in options.sizes:
        model = Bagel(config_of(sizes))
        base = base_shapes(model)
        adapters = jax.eval_shape(adapters_of, base)
        params = policy.PolicyParams(base, adapters)
        for name, (function, argument) in cases(model).items():
            ours, linen = [], []
            bound = functools.partial(function, model)
            for _ in range(options.repeats):
                ours.append(seconds(bound, params, argument))
                with through_linen():
                    linen.append(seconds(bound, params, argument))
            for index, phase in enumerate(("trace", "compile")):
                a, b = (statistics.median(times[index] for times in runs) for runs in (ours, linen))
                print(f"{sizes:<12} {name:<15} {phase:<8} {a:>11.3f}s {b:>8.3f}s {b / a:>6.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
