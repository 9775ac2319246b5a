"""Measures the policy's functions against what the device can do, with random weights.

    python -m benchmarks.policy_speed [--sizes=DIR] [--rows=8] [--side=512] [--out=FILE.json]

Without `--sizes` the model has the sizes of BAGEL-7B-MoT, 29 GB in bfloat16; with it, those of the
JSON files of a folder in the official layout. Weights are never read. Each function runs on one
device. FLOP/s are compared with those of a large matrix product, and bytes/s with those of a large
copy, both measured in the same process. Operations of the adapters are not counted. With a
vocabulary of hundreds, random texts may end early; their rates are then too high.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alphagrpo_jax import policy
from alphagrpo_jax.config import Guidance, ImageOptions
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.bagel_7b import TOKENIZER, bagel_7b_config
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.flops import decoder_flops, head_flops, layer_weights
from alphagrpo_jax.models.kv_cache import Context, GuidanceContexts
from alphagrpo_jax.models.layers import REMAT_POLICIES
from alphagrpo_jax.ops.fused_attention import KERNELS
from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.sampling import image, text
from alphagrpo_jax.sampling.text import text_log_probs
from alphagrpo_jax.types import ImageSample

GUIDANCE = Guidance(  # two branches at every step
    text_scale=4.0, image_scale=1.0, interval=(0.0, 1.0), renorm="global", renorm_min=0.0
)
RANK = 64  # of the adapters
MATMUL_SIDE = {"cpu": 1024}  # elsewhere 8192
COPY_BYTES = {"cpu": 2**26}  # elsewhere 2 GiB


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs."""

    rows: int = 8
    side: int = 512  # pixels
    prompt: int = 128  # tokens of the context
    text: int = 256  # sampled tokens, and scored tokens
    points: int = 9  # of the image schedule: one more than steps


@dataclasses.dataclass(frozen=True)
class Case:
    """A function without arguments, the amount of its output, and its minimum of work."""

    run: Callable[[], Any]
    count: float
    unit: str  # of `count`
    flops: float  # of products with weights and of attention; 0: not counted
    bytes: float = 0.0  # of weights and caches, read once per step; 0: arithmetic is the limit
    needs: Callable[[], Any] = tuple  # called once before, not measured


def random_params(model: Bagel, seed: int) -> policy.PolicyParams:
    """Samples random weights in the model's dtype, and adapters, on the device."""
    shapes = base_shapes(model)
    leaves, tree = jax.tree.flatten(shapes)
    # The default generator is slow for 14 billion numbers.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves) + 1)

    @functools.partial(jax.jit, static_argnums=1)
    def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        width = (3.0 / shape[-2]) ** 0.5 if len(shape) > 1 else 1.0
        return jax.random.uniform(key, shape, model.dtype, -width, width)

    base = [uniform(key, leaf.shape) for key, leaf in zip(keys[1:], leaves, strict=True)]
    return policy.PolicyParams(
        base=jax.tree.unflatten(tree, base),
        lora=lora.init(keys[0], shapes, lora.TARGETS, RANK),
    )


class Work(NamedTuple):
    """Minimum of FLOPs and of bytes read."""

    flops: float
    bytes: float


def text_work(model: Bagel, sizes: Sizes) -> Work:
    """Counts the work of sampling texts: a step reads weights, output head and cache once."""
    config, rows = model.config, sizes.rows
    head = config.llm.hidden_size * config.llm.vocab_size
    cached = rows * (sizes.prompt + sizes.text) * config.llm.num_key_value_heads
    cached *= 2 * config.llm.head_dim * config.llm.num_hidden_layers
    read = jnp.dtype(model.dtype).itemsize * float(layer_weights(config) + head + cached)
    flops = decoder_flops(config, rows, sizes.text, sizes.prompt)
    flops += head_flops(config, rows, sizes.text)
    return Work(flops, sizes.text * read)


class CompiledPolicy:
    """The policy's functions for inputs of fixed sizes, each compiled once."""

    def __init__(self, model: Bagel, sizes: Sizes) -> None:
        self.model, self.sizes = model, sizes
        self.grid = model.config.latent_grid(sizes.side, sizes.side)
        self.options = ImageOptions(
            num_points=sizes.points,
            shift=3.0,
            window=1,
            window_range=(0, 1),
            noise_level=0.7,
            sampler="sde",
            guidance=GUIDANCE,
        )
        self.prefill = jax.jit(self._prefill)
        self.sample_text = jax.jit(self._sample_text)
        self.sample_image = jax.jit(self._sample_image)
        self.decode = jax.jit(self._decode)
        self.text_gradient = jax.jit(jax.grad(self._text_log_prob))
        self.image_gradient = jax.jit(jax.grad(self._image_log_prob))

    def _prefill(self, params: policy.PolicyParams, tokens: jax.Array) -> Context:
        empty, mask = kv_cache.empty(self.sizes.rows), jnp.ones(tokens.shape, bool)
        return policy.extend_text(self.model, params, empty, tokens, mask)[0]

    def _sample_text(self, params: policy.PolicyParams, ctx: Context, keys: jax.Array) -> Any:
        options = {"max_tokens": self.sizes.text, "temperature": jnp.float32(1.0), "top_p": 1.0}
        return text.sample_text(self.model, params, ctx, keys, **options)[0]

    def _sample_image(
        self, params: policy.PolicyParams, ctx: Context, noise: jax.Array, keys: jax.Array
    ) -> ImageSample:
        contexts, window_start = self._contexts(ctx), jnp.zeros((), jnp.int32)
        return image.sample_image(
            self.model,
            params,
            contexts,
            noise,
            keys,
            window_start,
            options=self.options,
            grid=self.grid,
        )

    def _decode(self, params: policy.PolicyParams, latents: jax.Array) -> jax.Array:
        return policy.decode_latents(self.model, params, latents, self.grid)

    def _text_log_prob(
        self, adapters: dict, params: policy.PolicyParams, ctx: Context, tokens: jax.Array
    ) -> jax.Array:
        params, mask = params.replace(lora=adapters), jnp.ones(tokens.shape, bool)
        scores = text_log_probs(self.model, params, ctx, tokens, mask, temperature=1.0)
        return scores.log_prob.sum()

    def _image_log_prob(
        self, adapters: dict, params: policy.PolicyParams, ctx: Context, sample: ImageSample
    ) -> jax.Array:
        params, contexts = params.replace(lora=adapters), self._contexts(ctx)
        log_probs, *_ = image.image_log_probs(
            self.model,
            params,
            contexts,
            sample,
            options=self.options,
            grid=self.grid,
            at_once=False,
        )
        return log_probs.sum()

    def _contexts(self, ctx: Context) -> GuidanceContexts:
        return GuidanceContexts(ctx, kv_cache.empty(self.sizes.rows), ctx)


def cases(model: Bagel, params: policy.PolicyParams, sizes: Sizes) -> dict[str, Case]:
    """Builds the functions to measure, by name."""
    config, rows, compiled = model.config, sizes.rows, CompiledPolicy(model, sizes)
    keys = jax.random.split(jax.random.key(1), rows)
    prompt = jax.random.randint(keys[0], (rows, sizes.prompt), 0, config.llm.vocab_size)
    scored = jax.random.randint(keys[0], (rows, sizes.text), 0, config.llm.vocab_size)
    latents = compiled.grid[0] * compiled.grid[1]
    noise = jax.random.normal(keys[0], (rows, latents, config.latent_width), jnp.float32)
    ctx = functools.cache(lambda: compiled.prefill(params, prompt))
    sample = functools.cache(lambda: compiled.sample_image(params, ctx(), noise, keys))
    text_minimum = text_work(model, sizes)
    # Guidance evaluates every image step in two branches: with and without the context.
    step = sum(decoder_flops(config, rows, latents, context) for context in (sizes.prompt, 0))
    tokens, steps = rows * sizes.text, sizes.points - 1
    return {
        "prefill": Case(
            lambda: compiled.prefill(params, prompt),
            rows * sizes.prompt,
            "tokens",
            decoder_flops(config, rows, sizes.prompt, 0),
        ),
        "write text": Case(
            lambda: compiled.sample_text(params, ctx(), keys),
            tokens,
            "tokens",
            *text_minimum,
            needs=ctx,
        ),
        "draw": Case(
            lambda: compiled.sample_image(params, ctx(), noise, keys),
            rows * steps,
            "image steps",
            steps * step,
            needs=ctx,
        ),
        "decode pixels": Case(
            lambda: compiled.decode(params, sample().latents), rows, "images", 0.0, needs=sample
        ),
        "gradient of a text's log-probs": Case(
            lambda: compiled.text_gradient(params.lora, params, ctx(), scored),
            tokens,
            "tokens",
            2 * text_minimum.flops,
            needs=ctx,
        ),
        "gradient of an image step's log-prob": Case(
            lambda: compiled.image_gradient(params.lora, params, ctx(), sample()),
            rows,
            "image steps",
            2 * step,
            needs=sample,
        ),
    }


def measure(
    model: Bagel,
    sizes: Sizes,
    *,
    repeat: int,
    only: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Measures seconds, rates, FLOP/s, bytes/s and shares of the ceilings, by name.

    Args:
      model: configuration, dtype and remat policy.
      sizes: of the inputs.
      repeat: number of runs that a median is taken of, after one that compiles.
      only: measures the functions whose names contain this.
      say: called with a line for every function, as soon as it is measured.
    """
    ceilings = measure_ceilings(model.dtype, repeat)
    say(
        f"{jax.devices()[0].device_kind}: product {ceilings['flops'] / 1e12:.1f} TFLOP/s, "
        f"copy {ceilings['bytes'] / 1e9:.0f} GB/s ({jnp.dtype(model.dtype).name})"
    )
    figures = {f"ceiling/{name}_per_second": value for name, value in ceilings.items()}
    params = jax.block_until_ready(random_params(model, 0))
    for name, case in cases(model, params, sizes).items():
        if only not in name:
            continue
        jax.block_until_ready(case.needs())
        first, seconds = time_of(case.run, repeat)
        line = f"{name:<38}{seconds * 1e3:>10.2f} ms {case.count / seconds:>10.1f} {case.unit}/s"
        timing = {"seconds": seconds, "first_seconds": first, "per_second": case.count / seconds}
        for unit, work, scale in (("flops", case.flops, "TFLOP"), ("bytes", case.bytes, "TB")):
            if work:
                timing[f"{unit}_per_second"] = work / seconds
                timing[f"{unit}_share"] = work / seconds / ceilings[unit]
                line += f"  {work / seconds / 1e12:.2f} {scale}/s = {timing[f'{unit}_share']:.1%}"
        figures |= {f"{name}/{key}": value for key, value in timing.items()}
        say(line)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if used is not None:
        figures["peak_bytes"] = used
        say(f"peak memory {used / 1e9:.1f} GB")
    return figures


def measure_ceilings(dtype: Any, repeat: int) -> dict[str, float]:
    """Measures FLOP/s of a large matrix product, and bytes/s (read and written) of a large copy."""
    platform = jax.default_backend()
    side, size = MATMUL_SIDE.get(platform, 8192), COPY_BYTES.get(platform, 2**31)
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    b = jax.random.normal(jax.random.key(1), (size // 4,), jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    _, product_seconds = time_of(lambda: [product(a, a) for _ in range(10)], repeat)
    _, copy_seconds = time_of(lambda: [copy(b) for _ in range(10)], repeat)
    return {"flops": 2.0 * side**3 / product_seconds * 10, "bytes": 2.0 * size / copy_seconds * 10}


def time_of(run: Callable[[], Any], repeat: int) -> tuple[float, float]:
    """Times a first call, and the median of `repeat` later ones: seconds."""
    spent = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        spent.append(time.perf_counter() - start)
    return spent[0], statistics.median(spent[1:])


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(
        prog="python -m benchmarks.policy_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", help="a folder with a model's JSON files and tokenizer")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=cli.COUNT, default=field.default)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--remat", default="full", choices=sorted(REMAT_POLICIES))
    parser.add_argument(
        "--unroll", type=cli.COUNT, default=1, help="layers per iteration of their loop"
    )
    parser.add_argument("--attention", default="plain", choices=("plain", *KERNELS))
    parser.add_argument("--only", default="", help="functions whose names contain this")
    parser.add_argument("--repeat", type=cli.COUNT, default=5, help="medians of so many runs")
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    sizes = sizes_of(options)
    if sizes.points < 2:
        parser.error("--points must be at least 2")
    if options.sizes is None and jax.default_backend() == "cpu":
        parser.error("BAGEL-7B-MoT needs an accelerator; give --sizes on a CPU, e.g. package:umm")
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    """Returns the sizes that the flags give."""
    names = [field.name for field in dataclasses.fields(Sizes)]
    return Sizes(**{name: getattr(options, name) for name in names})


def run(options: argparse.Namespace) -> None:
    """Measures a model of the sizes that the flags give.

    Raises:
      InputError: the image's side does not fit the model, or the device's memory is too small.
    """
    try:
        folder = resolve(options.sizes or TOKENIZER)
        tokenizer = Tokenizer.from_folder(folder)
        config = (
            BagelConfig.from_folder(folder, tokenizer.special)
            if options.sizes
            else bagel_7b_config(tokenizer)
        )
        if options.side % config.latent_stride:
            raise InputError(
                f"--side={options.side} must be a multiple of {config.latent_stride} pixels, the "
                "side of a latent token"
            )
        dtype, unroll = jnp.dtype(options.dtype), options.unroll
        model = Bagel(config, dtype, options.remat, unroll, options.attention)
        figures = measure(model, sizes_of(options), repeat=options.repeat, only=options.only)
        if options.out:
            replace_text(options.out, json.dumps(figures, indent=2) + "\n")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"{error}; fewer --rows, a smaller --side?") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
