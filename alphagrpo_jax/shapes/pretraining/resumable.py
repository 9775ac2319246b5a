"""What the training scripts share so that they can be stopped and continued."""

import pathlib
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.runtime.errors import InputError


def check_options(saved: Mapping[str, Any], own: Mapping[str, Any], out: pathlib.Path) -> None:
    """Refuses to continue a run with other options.

    Args:
      saved: by the run in `out`.
      own: of this start.
      out: the run's folder.
    Raises:
      InputError: all options that differ.
    """
    different = [
        f"{name}: the run has {saved.get(name)!r}, this start {own.get(name)!r}"
        for name in sorted(saved.keys() | own.keys())
        if saved.get(name) != own.get(name)
    ]
    if different:
        raise InputError(
            f"{out} holds a run with other options:\n  "
            + "\n  ".join(different)
            + "\nrepeat that run's command, or choose another --out"
        )
