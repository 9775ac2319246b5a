"""Measures time and host memory of loading a model by several processes.

    python -m benchmarks.loading --dir=DIR [--processes=1,2,4] [--layers=6]

The first call writes a folder in the official layout into DIR: random bfloat16 weights, 1.7 GB with
6 layers, the language model in several files with an index. Every process has one CPU device.
Memory is anonymous memory (`RssAnon` of the kernel): pages of mapped weight files, which the kernel
takes back when it needs them, are not in it. A parent process samples it; what counts is what a
process has above its memory before the first tensor is read and above the arrays that it holds at
that moment, of which the leaf being read is one. The files are dropped from the page cache before
every load.
"""

import argparse
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.bagel_7b import TOKENIZER
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.bagel_weights import INDEX, load_model
from alphagrpo_jax.models.name_table import EMA, entries, position_tables
from alphagrpo_jax.runtime import cli, distributed, sharding
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
}
VIT_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 980,
}
FILE_BYTES = 400 * 10**6  # of one weight file, about
POLL_SECONDS = 0.002
FIELDS = ("leaf", "base", "arrays")  # of the memory that a process shares with its parent
LAYOUTS = ("sharded", "replicated")


@dataclasses.dataclass
class Load:
    """One load by several processes: of each figure the worst process's."""

    seconds: float
    arrays: int  # bytes that a process holds
    shard: int  # bytes of the largest part of a leaf
    above: int  # bytes above the arrays at the worst moment


class _Process(NamedTuple):
    """A loading process, and what it tells while it loads."""

    process: subprocess.Popen
    shared: np.ndarray  # int64, `FIELDS`


def write_folder(folder: Path, layers: int) -> int:
    """Writes a model with random weights; returns the bytes of its weights.

    Args:
      folder: made if needed; a file that marks it as complete is written last.
      layers: of the language model.
    """
    complete = folder / "complete"
    if not complete.exists():
        tokenizer = Tokenizer.from_folder(resolve(TOKENIZER))
        config = BagelConfig.from_dicts(
            SIZES | {"num_hidden_layers": layers},
            VIT_SIZES,
            None,
            None,
            tokens=tokenizer.special,
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name, fields in config.to_dicts().items():
            (folder / name).write_text(json.dumps(fields))
        tokenizer.save(folder)
        _write_weights(folder, config)
        complete.touch()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _write_weights(folder: Path, config: BagelConfig) -> None:
    block = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(jnp.bfloat16)
    files: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for entry in entries(base_shapes(Bagel(config, dtype=jnp.dtype(jnp.bfloat16)))):
        files.setdefault(entry.file, []).append((entry.name, entry.shape))
    for name, (width, side) in position_tables(config).items():
        files[EMA].append((name, (side**2, width)))
    for file, tensors in files.items():
        parts: list[dict[str, np.ndarray]] = [{}]
        sizes = 0
        for name, shape in tensors:
            if file == EMA and sizes > FILE_BYTES:
                parts.append({})
                sizes = 0
            parts[-1][name] = np.resize(block, shape)
            sizes += parts[-1][name].nbytes
        stem = file.removesuffix(".safetensors")
        names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        if len(parts) == 1:
            names = [file]
        for name, part in zip(names, parts, strict=True):
            safetensors.numpy.save_file(part, folder / name)
        if len(parts) > 1:
            places = {tensor: n for n, part in zip(names, parts, strict=True) for tensor in part}
            (folder / (file + INDEX)).write_text(json.dumps({"weight_map": places}))


def measure(folder: Path, layout: str, processes: int, scratch: Path) -> Load:
    """Loads a folder by several processes at a time.

    Args:
      folder: of `write_folder`.
      layout: of `LAYOUTS`.
      processes: their number.
      scratch: takes files through which the processes speak.
    Raises:
      InputError: a process has failed.
    """
    _drop_from_cache(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        _start(folder, layout, processes, number, port, scratch) for number in range(processes)
    ]
    above = 0
    while any(load.process.poll() is None for load in started):
        above = max([above, *map(_bytes_above, started)])
        time.sleep(POLL_SECONDS)
    outputs = [load.process.communicate()[0] for load in started]
    codes = [load.process.returncode for load in started]
    if any(codes):
        raise InputError(f"the processes ended with {codes}, expected 0; their errors stand above")
    loads = [json.loads(output.splitlines()[-1]) for output in outputs]
    worst: dict[str, Any] = {key: max(load[key] for load in loads) for key in loads[0]}
    return Load(**worst, above=above)


def _start(
    folder: Path, layout: str, processes: int, number: int, port: int, scratch: Path
) -> _Process:
    path = scratch / f"shared_{number}"
    shared = np.memmap(path, np.int64, "w+", shape=(len(FIELDS),))
    variables = {
        "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "NUM_PROCESSES": str(processes),
        "PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device
    }
    command = ["--dir", str(folder), "--layout", layout, "--shared", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.loading", *command],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    return _Process(process, shared)


def _drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _anonymous_bytes(pid: int | str) -> int:
    """Reads a process's anonymous memory; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _bytes_above(load: _Process) -> int:
    """Samples what a process has above its arrays; 0 while it does not load."""
    leaf, base, arrays = load.shared.tolist()
    anonymous = _anonymous_bytes(load.process.pid)
    is_same = leaf == load.shared[0]  # else the sample may be of the leaf before or behind
    return anonymous - base - arrays if leaf and is_same else 0


def load_and_tell(folder: Path, layout: str, shared_path: Path) -> dict[str, float]:
    """Loads a folder in a process of `measure`; returns its figures."""
    distributed.initialize()
    shared = np.memmap(shared_path, np.int64, "r+", shape=(len(FIELDS),))
    count = jax.device_count()
    mesh = sharding.make_mesh(*((1, count, 1) if layout == "sharded" else (count, 1, 1)))
    jax.block_until_ready(jnp.zeros(()))
    sizes: list[int] = []

    def sharding_of(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        leaf_sharding = sharding.param_sharding(path, shape, mesh)
        if not sizes:  # the tokenizer is read, the shapes are traced, the files are open
            shared[1] = _anonymous_bytes("self")
        sizes.append(math.prod(leaf_sharding.shard_shape(shape)) * 2)
        shared[:] = (len(sizes), shared[1], sum(sizes))
        return leaf_sharding

    start = time.monotonic()
    loaded = load_model(folder, jnp.bfloat16, sharding_of=sharding_of)
    jax.block_until_ready(loaded.base)
    seconds = time.monotonic() - start
    shared[0] = 0
    return {"seconds": seconds, "arrays": sum(sizes), "shard": max(sizes)}


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="takes the model's folder")
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes")
    parser.add_argument("--layers", type=cli.COUNT, default=6, help="of the language model")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Prints a line per load."""
    if options.shared:
        print(json.dumps(load_and_tell(options.dir, options.layout, options.shared)))
        return
    folder = options.dir / f"layers_{options.layers}"
    total = write_folder(folder, options.layers)
    print(f"{total / 1e9:.2f} GB of weights")
    for layout in LAYOUTS:
        for count in map(int, options.processes.split(",")):
            load = measure(folder, layout, count, options.dir)
            print(
                f"{layout}, {count} processes: {load.seconds:.1f} s, {load.arrays / 1e6:.0f} MB of "
                f"arrays, largest shard {load.shard / 1e6:.0f} MB, at most {load.above / 1e6:.0f} "
                "MB above the arrays",
                flush=True,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
