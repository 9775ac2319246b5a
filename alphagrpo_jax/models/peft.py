"""Adapters in the files of the PEFT library: writing them, and starting from such.

A folder has `adapter_config.json` and `adapter_model.safetensors`. Modules have the names of
BAGEL's official PyTorch modules, a matrix A is [r, in] and a matrix B [out, r], and what they add
to a layer's output is `lora_alpha / r` times `x A^T B^T`.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from alphagrpo_jax.models.name_table import Entry, entries
from alphagrpo_jax.runtime.errors import InputError, MissingFileError, UsageError
from alphagrpo_jax.runtime.files import replace_bytes, replace_text
from alphagrpo_jax.runtime.paths import model_folder

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # of old versions of the library
PREFIX = "base_model.model."  # that PEFT puts before every name
# What adapters of the whole model and of its language model alone have before the same names.
OUTER = ("", "language_model.")
LETTERS = {"a": "lora_A", "b": "lora_B"}
# Settings under which the same numbers would mean something else, with the only value that is read.
PLAIN: Mapping[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
# Settings that say whose adapter it is or how it was made, whatever their values.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
# Values of init_lora_weights under which the base's weights were changed, too.
CHANGED_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
SHOWN = 5  # names of a kind in an error message


class AdapterError(InputError):
    """An adapter's files that are missing, damaged, or of other layers, ranks or shapes."""


class _Matrix(NamedTuple):
    """A matrix of one layer: its name without the prefix, where it is in the tree, its shape."""

    name: str
    path: tuple[str, ...]
    layer: int | None  # index on the leading axis of a stacked leaf
    shape: tuple[int, ...]  # in the file


def write_adapter(
    folder: str | pathlib.Path, adapters: dict, *, alpha: float, base_model: str, dtype: str
) -> None:
    """Writes an adapter, which the PEFT library loads into BAGEL's official modules.

    The configuration is written last: while it is missing, the folder is not complete.

    Args:
      folder: made if needed.
      adapters: tree of `lora.init`.
      alpha: adapters are scaled by alpha / rank.
      base_model: the name or folder of the pretrained model, for the configuration.
      dtype: of the tensors.
    Raises:
      AccessError: a file cannot be written.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(adapters)
    tensors = {}
    for matrix in _matrices(adapters):
        leaf = flat[matrix.path]
        values = np.asarray(leaf if matrix.layer is None else leaf[matrix.layer])
        tensors[PREFIX + matrix.name] = np.ascontiguousarray(values.T.astype(jnp.dtype(dtype)))
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": _rank(adapters),
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
        **PLAIN,
    }
    replace_bytes(folder / WEIGHTS_FILE, safetensors.numpy.save(tensors, {"format": "pt"}))
    replace_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: str | pathlib.Path, adapters: dict, *, alpha: float) -> dict:
    """Reads an adapter in place of others.

    Names may begin with PEFT's prefix or not, and with that of the language model or not.

    Args:
      folder: with both files; ORG/NAME of the Hugging Face hub, too.
      adapters: tree of `lora.init`, arrays or shapes.
      alpha: the run's; the file's must be the same.
    Returns:
      The tree with the file's matrices, float32 numpy.
    Raises:
      MissingFileError: no such folder or file.
      AdapterError: other layers, ranks or shapes, all in one message; settings that mean another
        computation; values that are no numbers; or damaged files.
      UsageError: another alpha.
    """
    folder = model_folder(folder)
    _check_config(folder, _rank(adapters), alpha)
    flat = traverse_util.flatten_dict(adapters)
    leaves = {path: np.empty(leaf.shape, np.float32) for path, leaf in flat.items()}
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        is_pickled = path.with_name(PICKLED_FILE).is_file()
        hint = f"; {PICKLED_FILE} there is not read, since unpickling runs code of whoever made it"
        raise MissingFileError(
            f"{path} does not exist{hint * is_pickled}; lora.init_from names a folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, as save_pretrained of the PEFT library writes it"
        )
    try:
        with safe_open(path, "numpy") as file:
            places = _checked_names(path, file, _matrices(adapters))
            for matrix, name in places.items():
                values = file.get_tensor(name).astype(np.float32)
                if not np.isfinite(values).all():
                    raise AdapterError(
                        f"{path}: {name} holds NaN or infinite values, expected numbers; fetch or "
                        "export the adapter again"
                    )
                leaves[matrix.path][... if matrix.layer is None else matrix.layer] = values.T
    except SafetensorError as error:
        raise AdapterError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated: download "
            "or copy it again"
        ) from error
    return traverse_util.unflatten_dict(leaves)


def _rank(adapters: dict) -> int:
    flat = traverse_util.flatten_dict(adapters)
    return next(leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "a")


def _matrices(adapters: dict) -> list[_Matrix]:
    """Lists the matrices of all layers.

    Raises:
      UsageError: a kernel that is no matrix has an adapter, for which PEFT has another form.
    """
    flat = traverse_util.flatten_dict(adapters)
    kernels = {}
    for path in (path[:-1] for path in flat if path[-1] == "a"):
        a, b = flat[(*path, "a")].shape, flat[(*path, "b")].shape
        kernels[(*path, "kernel")] = jax.ShapeDtypeStruct((*a[:-1], b[-1]), jnp.float32)
    matrices = []
    for entry in entries(traverse_util.unflatten_dict(kernels)):
        if len(entry.shape) != 2:
            raise UsageError(
                f"{entry.name} has the shape {list(entry.shape)}, expected a matrix: adapters of "
                "convolutions cannot be exchanged; leave them out of lora.targets"
            )
        matrices += [_matrix(entry, flat, letter) for letter in LETTERS]
    return matrices


def _matrix(entry: Entry, flat: Mapping[tuple[str, ...], Any], letter: str) -> _Matrix:
    path = (*entry.path[:-1], letter)
    name = f"{entry.name.removesuffix('.weight')}.{LETTERS[letter]}.weight"
    return _Matrix(name, path, entry.layer, tuple(flat[path].shape[:-3:-1]))


def _check_config(folder: pathlib.Path, rank: int, alpha: float) -> None:
    """Compares an adapter's settings with the run's."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist; lora.init_from names a folder with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}, as save_pretrained of the PEFT library writes it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is no JSON ({error}); download or copy it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: got no LoRA adapter, expected peft_type LORA")
    for key, value in PLAIN.items():
        if (config.get(key) or value) != value:
            raise AdapterError(
                f"{path}: got {key}={config[key]!r}, expected {value!r}: adapters of this kind "
                "compute something else; train or export one without it"
            )
    if unknown := sorted(key for key in config.keys() - HARMLESS - PLAIN.keys() if config[key]):
        raise AdapterError(
            f"{path}: got {unknown[0]}={config[unknown[0]]!r}, expected no such setting: it is not "
            "known here and may mean another computation; train or export an adapter without it"
        )
    if CHANGED_BASE.match(str(config.get("init_lora_weights"))):
        raise AdapterError(
            f"{path}: got init_lora_weights={config['init_lora_weights']!r}, expected true, false "
            "or gaussian: such an adapter belongs to changed weights of the base, not to the "
            "model's; convert it by save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.get("r") != rank:
        raise AdapterError(
            f"{path}: got r={config.get('r')!r}, expected lora.rank={rank}; set lora.rank to it"
        )
    if config.get("lora_alpha") != alpha:
        raise UsageError(
            f"{path}: got lora_alpha={config.get('lora_alpha')!r}, expected lora.alpha={alpha:g}: "
            "the matrices mean another change of the weights under another scale; set lora.alpha "
            f"to {config.get('lora_alpha')!r}"
        )


def _checked_names(path: pathlib.Path, file: Any, matrices: list[_Matrix]) -> dict[_Matrix, str]:
    """Finds the name in the file of every matrix.

    Raises:
      AdapterError: names are missing or unexpected, or shapes differ.
    """
    names = {_plain_name(name): name for name in file.keys()}  # noqa: SIM118 (not a mapping)
    expected = {matrix.name: matrix for matrix in matrices}
    # With what stands before the names in this file, most of them are found.
    outer = max(OUTER, key=lambda start: sum(start + name in expected for name in names))
    names = {outer + name: full_name for name, full_name in names.items()}
    shapes = {name: tuple(file.get_slice(names[name]).get_shape()) for name in names}
    lines = {
        "missing": [name for name in expected if name not in names],
        "unexpected": [names[name] for name in names if name not in expected],
        "of another shape": [
            f"{names[name]} of shape {list(shapes[name])}, expected {list(matrix.shape)}"
            for name, matrix in expected.items()
            if name in names and shapes[name] != matrix.shape
        ],
    }
    if problems := {kind: misfits for kind, misfits in lines.items() if misfits}:
        raise AdapterError(
            f"{path} does not fit the run's adapters:\n"
            + "\n".join(
                f"  {len(misfits)} {kind}: {', '.join(misfits[:SHOWN])}"
                + " ..." * (len(misfits) > SHOWN)
                for kind, misfits in problems.items()
            )
            + "\nset lora.targets and lora.rank to the adapter's, and model.path to its model"
        )
    return {matrix: names[name] for name, matrix in expected.items()}


def _plain_name(name: str) -> str:
    """Strips PEFT's prefix, and the adapter's own name, which unpublished files have."""
    return re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", name.removeprefix(PREFIX))
