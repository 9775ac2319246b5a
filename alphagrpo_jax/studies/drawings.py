"""Generated images of studies: the file that `measure --drawings` writes, and exact shares."""

import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replacing
from alphagrpo_jax.runtime.paths import existing_file
from alphagrpo_jax.shapes import checker


def write(path: pathlib.Path, images: np.ndarray, records: Sequence[Mapping]) -> None:
    """Writes images uint8[N, 48, 48, 3] and their records, as JSON texts, to an .npz file."""
    texts = np.array([json.dumps(record) for record in records])
    with replacing(path) as file:
        np.savez_compressed(file, images=images, records=texts)


def read(path: pathlib.Path) -> tuple[np.ndarray, list[dict]]:
    """Reads images uint8[N, 48, 48, 3] and records.

    Raises:
      MissingFileError: there is no such file.
      InputError: the file holds something else.
    """
    hint = "make one with python -m alphagrpo_jax.studies.measure --drawings"
    try:
        file = np.load(existing_file(path, hint))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:  # of NumPy: no file of arrays
        raise InputError(f"--drawings {path} cannot be read ({error}); {hint}") from error
    if not isinstance(file, np.lib.npyio.NpzFile) or {*file} != {"images", "records"}:
        raise InputError(f"--drawings {path}: expected an .npz of images and records; {hint}")
    with file:
        return file["images"], [json.loads(str(text)) for text in file["records"]]


def fact_shares(images: np.ndarray, records: Sequence[Mapping]) -> np.ndarray:
    """Computes the share of each record's facts that hold in its image: float64[N]."""
    return np.array(
        [
            np.mean(list(checker.facts(image, record["facts"]).values()))
            for image, record in zip(images, records, strict=True)
        ]
    )
