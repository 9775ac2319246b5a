"""Low-rank adapters as a separate tree with the paths of the kernels they adapt.

A kernel `[..., in, out]` at `path` gets `{"a": [..., in, r], "b": [..., r, out]}` at the path of
its layer: `W + scale * a @ b` (Hu et al. 2021). Layers stacked for scan keep their leading axis.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
from flax import traverse_util

from alphagrpo_jax.runtime.errors import UsageError

TARGETS = r"language_model/layers/(self_attn|mlp|mlp_moe_gen)/\w+_proj(_moe_gen)?"


def init(key: jax.Array, base: dict, targets: str, rank: int) -> dict:
    """Returns adapters that leave the base model unchanged: A ~ N(0, 1 / rank^2), B = 0, float32.

    float32 whatever the model's dtype: a learning rate of 1e-4 moves a bfloat16 weight only when
    it exceeds half of its last digit, so that most updates would be lost.

    Args:
      key: typed PRNG key.
      base: parameter tree (arrays or shapes).
      targets: regular expression that a layer's whole path ("a/b/c") must match.
      rank: width of the adapter.
    Returns:
      The adapter tree.
    Raises:
      ValueError: no layer matches.
    """
    flat = traverse_util.flatten_dict(base)
    paths = [
        path
        for path in sorted(flat)
        if path[-1] == "kernel" and re.fullmatch(targets, "/".join(path[:-1]))
    ]
    if not paths:
        kernels = sorted("/".join(p[:-1]) for p in flat if p[-1] == "kernel")
        raise UsageError(
            f"LoRA targets {targets!r} match none of the {len(kernels)} kernels, e.g. "
            f"{kernels[:3]}; correct the expression"
        )
    shapes = {path: (*flat[path].shape[:-1], rank) for path in paths}
    # One draw for all: each separate one would be compiled, which takes a while on a CPU.
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    samples = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32) / rank, ends[:-1])
    lora = {}
    for path, values in zip(paths, samples, strict=True):
        *lead, _, fan_out = flat[path].shape
        lora[(*path[:-1], "a")] = values.reshape(shapes[path])
        lora[(*path[:-1], "b")] = jnp.zeros((*lead, rank, fan_out), jnp.float32)
    return traverse_util.unflatten_dict(lora)


def merge(base: dict, lora: dict, scale: float) -> dict:
    """Returns the base with `scale * a @ b` added to its kernels, product in float32.

    Args:
      base: parameter tree.
      lora: adapter tree of `init`.
      scale: alpha / rank.
    Returns:
      A parameter tree of the shapes and dtypes of `base`.
    """
    flat, adapters = traverse_util.flatten_dict(base), traverse_util.flatten_dict(lora)
    for path in [p[:-1] for p in adapters if p[-1] == "a"]:
        kernel = flat[(*path, "kernel")]
        delta = jnp.matmul(adapters[(*path, "a")], adapters[(*path, "b")]) * scale
        flat[(*path, "kernel")] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def scaled(lora: dict, scale: float) -> dict:
    """Returns the adapter tree with `scale` multiplied into every B, as the model reads it."""
    flat = traverse_util.flatten_dict(lora)
    return traverse_util.unflatten_dict(
        {path: leaf * scale if path[-1] == "b" else leaf for path, leaf in flat.items()}
    )
