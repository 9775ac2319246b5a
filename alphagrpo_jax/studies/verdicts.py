"""Keeps the exact checker's verdicts on a policy's images in a small JSON file.

A file also stores everything that its verdicts depend on, and is refused for anything else.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alphagrpo_jax.config import Config
from alphagrpo_jax.models.name_table import AE, EMA
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.paths import existing_file, resolve
from alphagrpo_jax.shapes import checker


def load_or_judge(path: pathlib.Path, make: Callable[[], np.ndarray], about: Mapping) -> np.ndarray:
    """Reads the verdicts in `path`; if there is no such file, makes and writes them.

    Args:
      path: of a JSON file.
      make: returns the verdicts bool[N].
      about: everything that the verdicts depend on.
    Raises:
      InputError: the file holds verdicts about something else, or none.
    """
    about = json.loads(json.dumps(about))  # in the form that it is read back in
    if path.exists():
        return _read(path, about)
    exact = make()
    marks = "".join("1" if value else "0" for value in exact)
    replace_text(path, json.dumps({"about": about, "exact": marks}) + "\n")
    return exact


def _read(path: pathlib.Path, about: Mapping) -> np.ndarray:
    try:
        stored = json.loads(path.read_text())
        marks, got = stored["exact"], stored["about"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no judgements ({error!r}); delete it to draw again"
        ) from error
    names = sorted(name for name in {*got, *about} if got.get(name) != about.get(name))
    if names:
        raise InputError(
            f"{path} is about other {', '.join(names)}: got "
            f"{[got.get(name) for name in names]}, expected "
            f"{[about.get(name) for name in names]}; choose another --out, or delete the file "
            "to draw again"
        )
    return np.array([mark == "1" for mark in marks], bool)


def files_digest(*files: str | pathlib.Path) -> str:
    """Computes the SHA-256 of the SHA-256 digests of the files' contents."""
    digest = hashlib.sha256()
    for path in files:
        with pathlib.Path(path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def model_digest(path: str) -> str:
    """Computes the digest of a model's weights, given as in `model.path`."""
    hint = "give a folder in the official layout"
    return files_digest(*(existing_file(resolve(path) / name, hint) for name in (EMA, AE)))


def sampling_settings(config: Config) -> dict:
    """Collects what sampling depends on, besides weights, prompts and keys."""
    return {
        "task": config.task,
        "dtype": config.model.dtype,
        "size": [config.model.height, config.model.width],
        "top_p": config.eval.top_p,
        "num_points": config.eval.num_points,
        "text_guidance": config.eval.text_guidance,
        "shift": config.rollout.shift,
        "guidance": dataclasses.asdict(config.rollout.guidance),
        "tokens": [config.rollout.prompt_tokens, config.rollout.text_tokens],
    }


def verdict_key(config: Config, records: Sequence[Mapping]) -> dict:
    """Collects what the verdicts of all policies depend on: prompts, checker, model, settings."""
    return {
        "prompts": hashlib.sha256(json.dumps(records).encode()).hexdigest(),
        "checker": checker.RULES,
        "model": model_digest(config.model.path),
        "settings": sampling_settings(config),
    }
