"""Run: everything that stays the same during a training run, with one TaskContext per task."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from alphagrpo_jax.config import Config, RewardOptions
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.prompts import TaskData
from alphagrpo_jax.rewards.scoring import VerifierPool
from alphagrpo_jax.runtime.console import SILENT, Console
from alphagrpo_jax.runtime.stopping import NEVER, StopRequest
from alphagrpo_jax.tasks import TASKS, Task
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.steps import CompiledFns, SampleFns, TaskFns
from alphagrpo_jax.types import TrainState


class TaskContext(NamedTuple):
    """Everything of one task, built once per run."""

    task: Task
    data: TaskData
    fns: TaskFns
    scoring: RewardOptions


class InitialImagesContext(NamedTuple):
    """Functions and options for initial images of refining tasks; they are those of task t2i."""

    fns: SampleFns | None  # several images per prompt; None: the records' own, or no such task
    eval_fns: SampleFns | None  # one per prompt
    scoring: RewardOptions


class Run(NamedTuple):
    """Everything that stays the same during a run."""

    config: Config
    loaded: LoadedModel
    fns: CompiledFns
    tasks: Mapping[str, TaskContext]
    initial: InitialImagesContext
    verifier: VerifierPool
    workdir: pathlib.Path
    second_verifier: VerifierPool | None = None  # asked at evaluations only
    console: Console = SILENT  # shows how far an evaluation is
    stop: StopRequest = NEVER  # ends what is under way; looked at between micro-batches

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of images, pixels."""
        return self.config.model.height, self.config.model.width

    def sampling_params(self, state: TrainState) -> PolicyParams:
        """Returns the weights that rollouts read under a train state."""
        return self.fns.weights(self.loaded.base, state.trainable)


def make_run(
    config: Config,
    loaded: LoadedModel,
    data: Mapping[str, TaskData],
    fns: CompiledFns,
    verifier: VerifierPool,
    workdir: pathlib.Path,
    second_verifier: VerifierPool | None = None,
    console: Console = SILENT,
    stop: StopRequest = NEVER,
) -> Run:
    """Puts a run together.

    Args:
      config: the run's.
      loaded: the pretrained model.
      data: prompts by task.
      fns: jitted functions.
      verifier: answers questions about images; its answers become rewards.
      workdir: the run's folder.
      second_verifier: rates held-out images beside it.
      console: shows how far an evaluation is.
      stop: ends the run's work once it is overdue.
    """
    contexts = {
        name: TaskContext(
            TASKS[name],
            task_data,
            fns.tasks[name],
            options_lib.scoring_options(config, TASKS[name]),
        )
        for name, task_data in data.items()
    }
    plain_scoring = options_lib.scoring_options(config, TASKS["t2i"])
    initial = InitialImagesContext(fns.initial, fns.eval_initial, plain_scoring)
    return Run(
        config, loaded, fns, contexts, initial, verifier, workdir, second_verifier, console, stop
    )
