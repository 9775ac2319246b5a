"""BAGEL folders: reading one into a model, and writing it back byte-compatibly."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from alphagrpo_jax.models.bagel import Bagel, base_shapes, init_base
from alphagrpo_jax.models.bagel_config import (
    BAGEL_FILE,
    LLM_FILE,
    VAE_FILE,
    VIT_FILE,
    BagelConfig,
)
from alphagrpo_jax.models.name_table import AE, EMA, Entry, entries, position_tables
from alphagrpo_jax.ops.posembed import sincos_table
from alphagrpo_jax.runtime.errors import MissingFileError, UserError
from alphagrpo_jax.runtime.files import replacing
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CONFIG_FILES = (LLM_FILE, VIT_FILE, VAE_FILE, BAGEL_FILE)

# (path "a/b/c", shape of the leaf) -> where it lies
ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
INDEX = ".index.json"  # beside several files that stand for one
BLOCK_BYTES = 2**22  # of a tensor that are in memory beside the part that they belong to
ALIGNMENT = 64  # bytes; a CPU device takes memory that is aligned so as it is
FIRST_VALUES, SHOWN_PROBLEMS = 64, 12  # of a tensor in a digest; tensors in an error message


class WeightsError(UserError, ValueError):
    """A weight file that cannot be read or does not fit the configuration."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A BAGEL folder in memory."""

    model: Bagel
    base: dict
    tokenizer: Tokenizer
    config: BagelConfig
    json_files: Mapping[str, bytes]  # the configuration files as they were
    dtypes: Mapping[str, str]  # dtype of every tensor in the files, by name
    weights: str = ""  # `weights_digest` of the files; "" for a model that comes from none


def load_model(
    folder: str | Path,
    dtype: Any = jnp.float32,
    *,
    remat: str = "none",
    unroll: int = 1,
    attention_kernel: str = "plain",
    sharding_of: ShardingOf | None = None,
) -> LoadedModel:
    """Reads a folder in the official layout.

    Args:
      folder: path or `package:NAME`.
      dtype: of the weights in memory and of the computation; the files may hold another one.
      remat: see `models.layers.REMAT_POLICIES`.
      unroll: layers per iteration of the scan over layers.
      attention_kernel: see `ops.attention.attend`.
      sharding_of: says where each leaf lies, by its path "a/b/c" and shape. A process reads only
        the parts that its devices hold, one at a time. None: the default device.
    Raises:
      FileNotFoundError: a missing file.
      TokenizerError, ModelConfigError, WeightsError: files that do not fit.
    """
    folder = resolve(folder)
    tokenizer = Tokenizer.from_folder(folder)
    config = BagelConfig.from_folder(folder, tokenizer.special)
    _check_vocabulary(folder, config, tokenizer)
    model = Bagel(config, jnp.dtype(dtype), remat, unroll, attention_kernel)
    base, dtypes = read_weights(folder, model, sharding_of)
    files = {name: folder / name for name in CONFIG_FILES}
    json_files = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    digest = weights_digest(folder)
    return LoadedModel(model, base, tokenizer, config, json_files, dtypes, digest)


def new_model(
    key: jax.Array,
    tokenizer: Tokenizer,
    *,
    llm: Mapping[str, Any],
    vit: Mapping[str, Any],
    vae: Mapping[str, Any],
    bagel: Mapping[str, Any],
) -> LoadedModel:
    """Creates a model with random float32 weights, ready for pretraining and `save_model`.

    Args:
      key: typed PRNG key.
      tokenizer: its special tokens become the model's.
      llm, vit, vae, bagel: contents of the four JSON files.
    """
    config = BagelConfig.from_dicts(llm, vit, vae, bagel, tokens=tokenizer.special)
    model = Bagel(config)
    contents = zip(CONFIG_FILES, (llm, vit, vae, bagel), strict=True)
    files = {name: json.dumps(dict(fields), indent=2).encode() for name, fields in contents}
    return LoadedModel(model, init_base(model, key), tokenizer, config, files, {})


def save_model(
    folder: str | Path, loaded: LoadedModel, *, base: dict | None = None, dtype: str | None = None
) -> None:
    """Writes a folder in the official layout: JSON files, tokenizer, both weight files.

    Args:
      folder: created if needed.
      loaded: model, tokenizer and configuration files.
      base: other weights than the loaded ones (e.g. with an adapter merged in).
      dtype: of all tensors in the files; None: each tensor's dtype in the folder it came from,
        float32 if it came from none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generated = loaded.config.to_dicts()
    for name in CONFIG_FILES:
        contents = loaded.json_files.get(name, json.dumps(generated[name], indent=2).encode())
        (folder / name).write_bytes(contents)
    loaded.tokenizer.save(folder)
    dtypes = loaded.dtypes if dtype is None else {}
    write_weights(
        folder, loaded.model, loaded.base if base is None else base, dtypes, dtype or "float32"
    )


def memory_dtypes(base: dict, model: Bagel) -> dict[str, str]:
    """Returns every tensor's dtype in memory, by its name in the files.

    That of the position tables, which are computed anew, is the model's.
    """
    flat = traverse_util.flatten_dict(base)
    tables = dict.fromkeys(position_tables(model.config), jnp.dtype(model.dtype).name)
    return {entry.name: flat[entry.path].dtype.name for entry in entries(base)} | tables


def read_weights(
    folder: Path, model: Bagel, sharding_of: ShardingOf | None = None
) -> tuple[dict, dict[str, str]]:
    """Reads a folder's weights: the base tree, and every tensor's dtype in the files.

    Each of the two files may be several with an index beside them ("ema.safetensors.index.json").

    Raises:
      FileNotFoundError: a missing file.
      WeightsError: an unreadable file; tensors missing, unexpected or of another shape, all of
        them in one message; or one that holds NaN or infinite values.
    """
    shapes = base_shapes(model)
    table = entries(shapes)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_open(folder, name)) for name in (EMA, AE)}
        dtypes = _check(folder, files, table, position_tables(model.config))
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for entry in table:
            groups.setdefault(entry.path, []).append(entry)
        leaves = {}
        flat = traverse_util.flatten_dict(shapes)
        for path, group in groups.items():
            shape = flat[path].shape
            sharding = sharding_of("/".join(path), shape) if sharding_of else default
            leaves[path] = _read_leaf(files, group, shape, model.dtype, sharding)
    return traverse_util.unflatten_dict(leaves), dtypes


def weights_digest(folder: Path) -> str:
    """Computes a SHA-256 digest of every tensor's name, dtype, shape and `FIRST_VALUES`.

    Raises:
      MissingFileError, WeightsError: a missing or unreadable file.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        for file in (EMA, AE):
            weight_files = stack.enter_context(_open(folder, file))
            for name, handle in sorted(weight_files.handles.items()):
                tensor = handle.get_slice(name)
                shape, dtype = tensor.get_shape(), tensor.get_dtype()
                digest.update(json.dumps([file, name, dtype, shape]).encode())
                if dtype in DTYPES and shape:
                    first = [slice(1)] * (len(shape) - 1) + [slice(min(FIRST_VALUES, shape[-1]))]
                    digest.update(np.ascontiguousarray(tensor[tuple(first)]).tobytes())
    return digest.hexdigest()


def _read_leaf(
    files: Mapping[str, "_WeightFiles"],
    group: Sequence[Entry],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """Reads the parts of a leaf that this process's devices hold, one part at a time.

    `device_put` of a host array to devices of several processes would compare it among them, part
    by part: minutes, and a copy of the weights for every process.
    """
    devices: dict[tuple, list[jax.Device]] = {}
    places = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)
        )
        devices.setdefault(bounds, []).append(device)
    for bounds, holders in devices.items():
        part = _read_part(files, group, bounds, dtype)
        copies = [jax.device_put(part, device) for device in holders]
        del part  # where it was copied it goes, before the next one is read
        jax.block_until_ready(copies)
        places |= dict(zip(holders, copies, strict=True))
    arrays = [places[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_part(
    files: Mapping[str, "_WeightFiles"],
    group: Sequence[Entry],
    bounds: tuple[tuple[int, int], ...],
    dtype: Any,
) -> np.ndarray:
    """Reads the part of a leaf between `bounds`, (begin, end) per dimension."""
    part = _aligned_empty([end - begin for begin, end in bounds], jnp.dtype(dtype))
    for entry in group:
        file, target, inner = files[entry.file], part, bounds
        if entry.layer is not None:
            (begin, end), *inner = bounds
            if not begin <= entry.layer < end:
                continue
            target = part[entry.layer - begin]
        slices = entry.file_index(tuple(slice(*pair) for pair in inner))
        _read_tensor(file, entry, slices, entry.to_file(target))  # of a view: it writes into `part`
    return part


def _read_tensor(
    file: "_WeightFiles", entry: Entry, slices: tuple[slice, ...], target: np.ndarray
) -> None:
    """Reads a part of a tensor into an array of the file's layout, block by block."""
    first, *others = slices
    row_bytes = max(1, target[:1].size) * np.dtype(np.float32).itemsize
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(first.start, first.stop, rows):
        stop = min(start + rows, first.stop)
        block = file.read(entry.name, (slice(start, stop), *others))
        if not is_finite(block):
            raise WeightsError(
                f"{file.folder / entry.file}: tensor {entry.name} holds NaN or infinite values, "
                "expected numbers: whatever it computes would be NaN; fetch or make the weights "
                "again"
            )
        target[start - first.start : stop - first.start] = block


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def is_finite(tensor: np.ndarray) -> bool:
    """Tells whether all values are numbers: neither NaN nor infinite."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(tensor.dtype.name)
    if exponent is None:
        return bool(np.isfinite(tensor).all())
    # All bits of the exponent are set in NaN and in the infinities; as integers it is fast.
    return not bool(((tensor.view(np.uint16) & np.uint16(exponent)) == exponent).any())


def write_weights(
    folder: Path, model: Bagel, base: dict, dtypes: Mapping[str, str], default: str
) -> None:
    """Writes both weight files, one tensor in memory at a time.

    Args:
      folder: existing.
      model: its configuration gives the position tables.
      base: parameter tree.
      dtypes: dtype by tensor name.
      default: dtype of the others.
    """
    flat = traverse_util.flatten_dict(base)
    writers: dict[str, dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]] = {
        EMA: {},
        AE: {},
    }

    def reader(entry: Entry) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            leaf = flat[entry.path]
            return entry.to_file(np.asarray(leaf if entry.layer is None else leaf[entry.layer]))

        return read

    for entry in entries(base):
        writers[entry.file][entry.name] = (entry.shape, reader(entry))
    for name, (width, side) in position_tables(model.config).items():
        table = sincos_table(width, side)
        writers[EMA][name] = (table.shape, lambda table=table: table)
    for file, tensors in writers.items():
        tensor_dtypes = {name: jnp.dtype(dtypes.get(name, default)) for name in tensors}
        _write(folder / file, tensors, tensor_dtypes)


def _write(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    dtypes: Mapping[str, np.dtype],
) -> None:
    """Writes the safetensors format: header length, JSON header, tensor bytes in its order.

    By hand, since the library's writer wants all tensors in memory at once.
    """
    header: dict[str, dict[str, Any]] = {}
    start = 0
    names = sorted(tensors)
    for name in names:
        shape, dtype = tensors[name][0], dtypes[name]
        stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        offsets = {"data_offsets": [start, stop]}
        header[name] = {"dtype": CODES[dtype.name], "shape": list(shape)} | offsets
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name][1](), dtypes[name]).tobytes())


class _WeightFiles:
    """One weight file, or several that an index puts together."""

    def __init__(self, folder: Path, handles: Mapping[str, Any]) -> None:
        """Takes an open file per tensor name, and the folder for messages."""
        self.folder, self.handles = folder, handles

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor."""
        return self.handles[name].get_slice(name)[index]


@contextlib.contextmanager
def _open(folder: Path, name: str) -> Iterator[_WeightFiles]:
    path, index = folder / name, folder / (name + INDEX)
    names = [name]
    if not path.exists() and index.exists():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{index} is no index of weight files ({type(error).__name__}: {error}), expected "
                'JSON with {"weight_map": {TENSOR: FILE}}; download it again'
            ) from error
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open_file(folder / file, name)) for file in names]
        # Not from the index: what a file holds is checked against the model, whoever named it.
        yield _WeightFiles(folder, {tensor: file for file in files for tensor in file.keys()})  # noqa: SIM118


@contextlib.contextmanager
def _open_file(path: Path, name: str) -> Iterator[Any]:
    if not path.exists():
        present = sorted(p.name for p in path.parent.iterdir())
        raise MissingFileError(
            f"{path} does not exist; expected the official layout with {EMA} and {AE} (or "
            f"{name}{INDEX} and the files that it names), found {present}; download the missing "
            "file"
        )
    try:
        handle = safe_open(path, "numpy")
    except SafetensorError as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes) is not a complete safetensors file ({error}); "
            "it may be truncated: download or copy it again"
        ) from error
    with handle as file:
        yield file


def _check(
    folder: Path, files: Mapping[str, _WeightFiles], table: list[Entry], optional: Mapping[str, Any]
) -> dict[str, str]:
    """Compares the files' headers with the table; returns the dtype of every tensor."""
    problems, dtypes = [], {}
    for file, weight_files in files.items():
        expected = {entry.name: entry.shape for entry in table if entry.file == file}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, handle in weight_files.handles.items():
            header = handle.get_slice(name)
            shapes[name] = tuple(header.get_shape())
            if header.get_dtype() not in DTYPES:
                problems.append(f"  {file}: {name} has dtype {header.get_dtype()}, not a float")
                continue
            dtypes[name] = DTYPES[header.get_dtype()]
        for name in sorted(expected.keys() | (shapes.keys() - optional.keys())):
            if expected.get(name) != shapes.get(name):
                problems.append(_difference(file, name, expected.get(name), shapes.get(name)))
    if problems:
        raise WeightsError(
            f"the weights in {folder} do not fit its JSON files ({len(problems)} tensors):\n"
            + "\n".join(problems[:SHOWN_PROBLEMS])
            + f"\n  and {len(problems) - SHOWN_PROBLEMS} more" * (len(problems) > SHOWN_PROBLEMS)
            + f"\nfetch weights and {', '.join(CONFIG_FILES)} of one and the same model"
        )
    return dtypes


def _difference(
    file: str, name: str, expected: tuple[int, ...] | None, shape: tuple[int, ...] | None
) -> str:
    """Describes a tensor whose shape in the file (None: missing) is not the expected one."""
    if expected is None:
        return f"  {file}: unexpected {name} of shape {list(shape or ())}, expected no such tensor"
    if shape is None:
        return f"  {file}: missing {name}, expected shape {list(expected)}"
    return f"  {file}: {name} has shape {list(shape)}, expected {list(expected)}"


def _check_vocabulary(folder: Path, config: BagelConfig, tokenizer: Tokenizer) -> None:
    # A model may have more embeddings than its tokenizer has ids, never fewer.
    if tokenizer.largest_id >= config.llm.vocab_size:
        raise WeightsError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens with ids up to "
            f"{tokenizer.largest_id}, but vocab_size of {LLM_FILE} is {config.llm.vocab_size}, "
            f"expected at least {tokenizer.largest_id + 1}; use the tokenizer of the same model"
        )
