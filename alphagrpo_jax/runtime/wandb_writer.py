"""Sends the rows of a run to Weights & Biases; the package is imported only where it is wanted."""

import math
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from alphagrpo_jax.runtime.errors import MissingFileError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.runtime.metrics import SAMPLES, sample_label
from alphagrpo_jax.runtime.results import breakdown

ID_FILE = "wandb_id"  # so that a resumed run continues its page


class WandbWriter:
    """Sends numbers and sample grids; does nothing without a project."""

    def __init__(
        self, project: str, folder: str | os.PathLike, config: Mapping[str, Any], *, enabled: bool
    ) -> None:
        """Opens the run's page, or continues it.

        Args:
          project: its name there; "" for none.
          folder: of the run; its name is the page's.
          config: the run's, as nested dicts.
          enabled: False on all processes but the first.
        Raises:
          MissingFileError: the package is not installed.
        """
        self._folder, self._run = pathlib.Path(folder), None
        if not project or not enabled:
            return
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingFileError(
                f"log.wandb={project!r} needs the package wandb ({error}); install it by "
                "pip install -c constraints.txt '.[wandb]', or set log.wandb to ''"
            ) from error
        path = self._folder / ID_FILE
        if not path.exists():
            replace_text(path, uuid.uuid4().hex + "\n")
        self._image = wandb.Image
        self._run = wandb.init(
            project=project,
            name=self._folder.absolute().name,
            id=path.read_text().strip(),
            resume="allow",
            dir=str(self._folder),
            config=dict(config),
        )
        # Rows that were lost with their checkpoint are sent once more: W&B's own step never falls.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends the numbers of a row, and the step's sample grids where it has an evaluation."""
        if self._run is None:
            return
        row: dict[str, Any] = {
            key: value
            for key, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        if breakdown(values):
            for path in sorted((self._folder / SAMPLES).glob(f"{sample_label(step)}*.png")):
                task = path.stem.removeprefix(sample_label(step)).removeprefix("_")
                row[f"{SAMPLES}/{task}" if task else SAMPLES] = self._image(str(path))
        self._run.log(row | {"step": step})

    def close(self) -> None:
        """Ends the page's run."""
        if self._run is not None:
            self._run.finish()
