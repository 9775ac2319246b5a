"""Reads a folder of recorded outputs; holds the roles of its arrays and the pass rule."""

import ast
import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alphagrpo_jax.runtime.errors import MissingFileError, UserError

ATOL = RTOL = 1e-4
UINT8_SLACK = 1  # truncation may flip a value
EXPECTED_JSON, EXPECTED_NPZ = "expected.json", "expected.npz"
OUTPUT = "output"

# Role of an array: the first pattern that matches the full name decides. Only outputs are
# compared; inputs are fed in; packing describes the official packed layout; exempt arrays are
# kept for information.
ROLES: tuple[tuple[str, str], ...] = (
    (r".*_JOINT", "exempt"),
    (r"c1\.posids\.interpolate\..*", "exempt"),
    (r"c9\..*_logprob_with_constants", "exempt"),
    (r"meta\..*", "input"),
    (r"c1\.prepare_prompts\..*", "packing"),
    (r"c2\.(vit_image|vae_image|decode_latent|time_t)", "input"),
    (r"c4\.stop_id", "input"),
    (r"c(5|6|7|10)\.x_t", "input"),
    (r"c5\.input\..*", "packing"),
    (r"c7\.(vae_input|vit_input)\..*", "packing"),
    (r"c8\.init_noise", "input"),
    (r"c9\.step\d+_(x|v|z)", "input"),
    (r"c12\.(resize_in_wh|image_uint8)", "input"),
    (r"c13\..*\.init_noise", "input"),
    (r"c14\.(padded_latent|noise|sigma|packed_vit_tokens|split_lens)", "input"),
    (r"c14\.(packed_.*|ce_loss_indexes|mse_loss_indexes)", "packing"),
    (r".*", OUTPUT),
)


class FixtureError(UserError, ValueError):
    """A folder that does not hold recorded outputs."""


@dataclasses.dataclass(frozen=True)
class Fixture:
    """The recorded outputs of one folder."""

    folder: Path
    arrays: Mapping[str, np.ndarray]
    descriptions: Mapping[str, str]
    texts: Mapping[str, str]
    grad_norm_names: Mapping[str, list[str]]

    def outputs(self) -> dict[str, list[str]]:
        """Returns the names of the arrays to recompute, by case."""
        groups: dict[str, list[str]] = {}
        for name in self.arrays:
            if role(name) == OUTPUT:
                groups.setdefault(case_of(name), []).append(name)
        return groups

    def restricted(self, pattern: str) -> "Fixture":
        """Drops the outputs whose full name does not match."""
        arrays = {
            name: array
            for name, array in self.arrays.items()
            if role(name) != OUTPUT or re.fullmatch(pattern, name)
        }
        return dataclasses.replace(self, arrays=arrays)

    def matching(self, pattern: str) -> list[tuple[str, re.Match]]:
        """Returns the names that match a pattern fully, with the match, in the file's order."""
        pairs = ((name, re.fullmatch(pattern, name)) for name in self.arrays)
        return [(name, match) for name, match in pairs if match]

    def options(self, name: str) -> dict[str, Any]:
        """Parses the call's options, written as a dictionary in an array's description."""
        match = re.search(r"\{.*?\}", self.descriptions[name])
        if not match:
            raise FixtureError(
                f"{self.folder}: the description of {name} holds no options in braces: "
                f"{self.descriptions[name]!r}"
            )
        return ast.literal_eval(match.group())

    def number(self, name: str, pattern: str) -> float:
        """Parses a number of an array's description; `pattern` has one group."""
        match = re.search(pattern, self.descriptions[name])
        if not match:
            raise FixtureError(
                f"{self.folder}: the description of {name} does not match {pattern!r}: "
                f"{self.descriptions[name]!r}"
            )
        return float(match.group(1))


def role(name: str) -> str:
    """Returns the array's role: `output`, `input`, `packing` or `exempt`."""
    return next(kind for pattern, kind in ROLES if re.fullmatch(pattern, name))


def case_of(name: str) -> str:
    """Returns the case of an array's name: `c5` of `c5.v_s1_nocfg`."""
    return name.split(".", 1)[0]


def load_fixture(folder: str | Path) -> Fixture:
    """Reads the recorded outputs of a folder.

    Raises:
      FileNotFoundError: no expected.json or expected.npz.
      FixtureError: one of the two is damaged, or they do not belong together.
    """
    folder = Path(folder)
    missing = [name for name in (EXPECTED_JSON, EXPECTED_NPZ) if not (folder / name).exists()]
    if missing:
        raise MissingFileError(
            f"{folder} lacks {missing}; expected a folder of recorded outputs with "
            f"{EXPECTED_JSON}, {EXPECTED_NPZ} and a BAGEL folder's files; check --fixture"
        )
    index = _read_index(folder / EXPECTED_JSON)
    try:
        with np.load(folder / EXPECTED_NPZ) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FixtureError(
            f"{folder / EXPECTED_NPZ} cannot be read ({error}); it may be truncated: fetch the "
            "folder again"
        ) from error
    if arrays.keys() != index["arrays"].keys():
        odd = sorted(arrays.keys() ^ index["arrays"].keys())
        raise FixtureError(
            f"{folder}: {EXPECTED_JSON} and {EXPECTED_NPZ} name different arrays, e.g. {odd[:5]}; "
            "fetch the folder again"
        )
    descriptions = {name: entry["desc"] for name, entry in index["arrays"].items()}
    return Fixture(folder, arrays, descriptions, index["texts"], index["grad_norm_names"])


def _read_index(path: Path) -> dict[str, Any]:
    """Reads expected.json, which describes the arrays."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FixtureError(f"{path} is not valid JSON ({error}); fetch the folder again") from error
    expected = ("arrays", "texts", "grad_norm_names")
    missing = [name for name in expected if not (isinstance(index, dict) and name in index)]
    if missing:
        raise FixtureError(f"{path} lacks {missing}, expected {expected}; fetch the folder again")
    return index


def compare(got: npt.ArrayLike | None, expected: np.ndarray) -> tuple[bool, float]:
    """Compares a recomputed array; returns whether it passes, and its largest absolute error.

    Floats: `|got - expected| <= 1e-4 + 1e-4 |expected|`; integers: equal; uint8: within 1. An array
    that was not recomputed, has another shape or kind, or holds NaN fails with error infinity.
    """
    if got is None:
        return False, float("inf")
    got = np.asarray(got)
    floats = [np.issubdtype(x.dtype, np.floating) for x in (got, expected)]
    if got.shape != expected.shape or floats[0] != floats[1]:
        return False, float("inf")
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    if floats[1]:
        limit = ATOL + RTOL * np.abs(expected.astype(np.float64))
    else:
        limit = np.full(expected.shape, UINT8_SLACK if expected.dtype == np.uint8 else 0)
    if not np.all(np.isfinite(error)):
        return False, float("inf")
    return bool(np.all(error <= limit)), float(error.max(initial=0.0))
