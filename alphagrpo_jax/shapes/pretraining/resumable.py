"""Shared by the training scripts: exit codes and the check that a resumed run is the same run."""

import pathlib
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.runtime.errors import InputError


def check_options(saved: Mapping[str, Any], current: Mapping[str, Any], out: pathlib.Path) -> None:
    """Checks that a run is continued with the options that it was started with.

    Args:
      saved: options of the run in `out`.
      current: options of this start.
      out: the run's folder.
    Raises:
      InputError: options differ; the message lists them all.
    """
    different = [
        f"{name}: the run has {saved.get(name)!r}, this start {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if different:
        raise InputError(
            f"{out} holds a run with other options:\n  "
            + "\n  ".join(different)
            + "\nrepeat that run's command, or choose another --out"
        )
