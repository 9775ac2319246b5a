"""What does not change during a run."""

import pathlib
from typing import NamedTuple

from alphagrpo_jax import prompts
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.training import steps as steps_lib
from alphagrpo_jax.training import verifiers as verifiers_lib
from alphagrpo_jax.types import TrainState


class Run(NamedTuple):
    """What does not change during a run."""

    config: Config
    loaded: Loaded
    data: dict[str, prompts.TaskData]  # by task
    steps: steps_lib.CompiledFns
    pool: scoring.VerifierPool
    workdir: pathlib.Path
    second: scoring.VerifierPool | None = None  # asked at evaluations only

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of images, pixels."""
        return self.config.model.height, self.config.model.width

    def weights(self, state: TrainState) -> PolicyParams:
        """What rollouts read; a policy that judges its own images judges by them too."""
        found = self.steps.weights(self.loaded.base, state.trainable)
        verifiers_lib.follow(self.pool, found)
        return found
