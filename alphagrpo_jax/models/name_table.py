"""The declarative table between BAGEL's checkpoint names and the parameter tree.

A row maps a prefix of tensor names to a prefix of tree paths; what follows is the same words, with
"." for "/". `{i}` counts the layers that the tree stacks on its leading axis, `{level}` and
`{block}` stay in the path. The first row whose path matches decides.
"""

import dataclasses
import re

import numpy as np
from flax import traverse_util

from alphagrpo_jax.models.bagel_config import BagelConfig

EMA, AE = "ema.safetensors", "ae.safetensors"

ROWS: tuple[tuple[str, str, str], ...] = (
    # file, tensor name prefix, tree path prefix
    (EMA, "language_model.model.embed_tokens", "embed_tokens"),
    (EMA, "language_model.model.layers.{i}", "language_model/layers"),
    (EMA, "language_model.model", "language_model"),
    (EMA, "language_model.lm_head", "lm_head"),
    (EMA, "time_embedder.mlp.{block}", "time_embedder/mlp_{block}"),
    (EMA, "vae2llm", "vae2llm"),
    (EMA, "llm2vae", "llm2vae"),
    (EMA, "connector", "connector"),
    (EMA, "vit_model.vision_model.embeddings.patch_embedding", "vit_model/patch_embedding"),
    (EMA, "vit_model.vision_model.embeddings.position_embedding", "vit_model/position_embedding"),
    (EMA, "vit_model.vision_model.encoder.layers.{i}", "vit_model/layers"),
    (EMA, "vit_model.vision_model", "vit_model"),
    (AE, "encoder.down.{level}.block.{block}", "vae/encoder/down_{level}/block_{block}"),
    (AE, "encoder.down.{level}", "vae/encoder/down_{level}"),
    (AE, "decoder.up.{level}.block.{block}", "vae/decoder/up_{level}/block_{block}"),
    (AE, "decoder.up.{level}", "vae/decoder/up_{level}"),
    (AE, "encoder", "vae/encoder"),
    (AE, "decoder", "vae/decoder"),
)
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# tree axes of a kernel -> checkpoint axes: [in, out] -> [out, in], HWIO -> OIHW
TO_FILE = {2: (1, 0), 4: (3, 2, 0, 1)}
TO_TREE = {2: (1, 0), 4: (2, 3, 1, 0)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint file and where it lives in the tree."""

    file: str
    name: str
    path: tuple[str, ...]
    layer: int | None  # index on the leading axis of a stacked leaf
    shape: tuple[int, ...]  # in the file

    def to_tree(self, tensor: np.ndarray) -> np.ndarray:
        """Converts a tensor from the file's layout to one layer of the tree's."""
        return self._transposed(tensor, TO_TREE)

    def to_file(self, leaf: np.ndarray) -> np.ndarray:
        """Converts one layer of the tree to the file's layout."""
        return self._transposed(leaf, TO_FILE)

    def file_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Converts an index into one layer of the tree's to one into the file's tensor."""
        if self.path[-1] != "kernel":
            return index
        return tuple(index[axis] for axis in TO_FILE[len(index)])

    def _transposed(self, x: np.ndarray, axes: dict[int, tuple[int, ...]]) -> np.ndarray:
        return x.transpose(axes[x.ndim]) if self.path[-1] == "kernel" else x


def position_tables(config: BagelConfig) -> dict[str, tuple[int, int]]:
    """Returns (width, side) of the fixed position tables, by name; they are only written.

    The official files hold them, so that ours do too; reading recomputes them.
    """
    width = config.llm.hidden_size
    return {
        "latent_pos_embed.pos_embed": (width, config.max_latent_size),
        "vit_pos_embed.pos_embed": (width, config.vit_max_num_patch_per_side),
    }


def entries(shapes: dict) -> list[Entry]:
    """Lists all tensors of a model's checkpoint.

    Args:
      shapes: the base tree, any leaves with a `.shape`.
    Raises:
      KeyError: a parameter that no row matches.
    """
    flat = traverse_util.flatten_dict(shapes)
    return [entry for path in sorted(flat) for entry in _leaf_entries(path, flat[path].shape)]


def _leaf_entries(path: tuple[str, ...], shape: tuple[int, ...]) -> list[Entry]:
    file, name, fields = _row("/".join(path[:-1]))
    rest = fields.pop("rest").replace("/", ".")
    stacked = "{i}" in name
    layers = range(shape[0]) if stacked else [None]
    # Only its shape matters: transposing it gives the shape in the file.
    one_layer = np.empty(shape[1:] if stacked else shape, np.bool_)
    leaf_entries: list[Entry] = []
    for layer in layers:
        full_name = name.format(i=layer, **fields) + rest + "." + LEAVES[path[-1]]
        entry = Entry(file, full_name, path, layer, ())
        leaf_entries.append(dataclasses.replace(entry, shape=entry.to_file(one_layer).shape))
    return leaf_entries


def _row(joined: str) -> tuple[str, str, dict[str, str]]:
    """Returns file, name prefix and fields of the first row that matches a path."""
    for file, name, prefix in ROWS:
        match = re.fullmatch(_pattern(prefix), joined)
        if match:
            return file, name, match.groupdict()
    raise KeyError(f"no row of the name table matches parameter {joined}")


def _pattern(prefix: str) -> str:
    return re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", prefix) + r"(?P<rest>(/.*)?)"
