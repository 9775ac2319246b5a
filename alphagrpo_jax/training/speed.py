"""Measures a run's speed: images per second and device, and the share of the devices' peak."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from alphagrpo_jax import tasks
from alphagrpo_jax.config import Config, Guidance
from alphagrpo_jax.flow.guidance import is_active
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.flops import decoder_flops, head_flops
from alphagrpo_jax.runtime.chips import peak_of
from alphagrpo_jax.sampling.image import noise_levels
from alphagrpo_jax.sampling.trajectory import image_options
from alphagrpo_jax.types import RolloutBatch

STAGES = ("initial_images", "rollout", "reward_wait", "update")  # of an update; no evaluation


class StepFlops(NamedTuple):
    """FLOPs of one step of a trajectory."""

    sampled: float
    trained: float  # of one forward pass over what the loss reads


def speed_metrics(
    config: Config,
    model: BagelConfig,
    rollouts: Sequence[RolloutBatch],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """Returns the speed of an update, as metrics.

    Args:
      config: the run's.
      model: sizes of the policy.
      rollouts: the update's batches.
      seconds: per stage, `time/STAGE`.
    Returns:
      `time/images_per_second_per_device`, and `time/mfu` where the device's peak is known.
    """
    total = sum(seconds.get(f"time/{stage}", 0.0) for stage in STAGES)
    devices = jax.devices()
    if total <= 0:
        return {}
    images = sum(
        len(rollout.records) * rollout.batch.task.events.count(tasks.IMAGE) for rollout in rollouts
    )
    metrics = {"time/images_per_second_per_device": images / total / len(devices)}
    peak = peak_of(devices[0].device_kind)
    if peak is not None:
        flops = sum(
            update_flops(
                config,
                model,
                rollout.batch.task,
                rows=len(rollout.records),
                text_tokens=rollout.metrics.get("text/length", 0.0),
            )
            for rollout in rollouts
        )
        metrics["time/mfu"] = flops / (total * len(devices) * peak.flops)
    return metrics


def update_flops(
    config: Config, model: BagelConfig, task: tasks.Task, *, rows: int, text_tokens: float
) -> float:
    """Counts the FLOPs that a batch of trajectories and the update on it need at least.

    Counted are the decoder's products and attention over texts and image steps: sampling, the
    outputs of the reference and of the average policy where they are computed, and the gradient.
    Not counted: inputs (one row per prompt), contexts of inputs, autoencoder, adapters, and what is
    computed twice to save memory, such as the forward pass before the update.

    Args:
      config: the run's.
      model: sizes of the policy.
      task: of the trajectories.
      rows: trajectories.
      text_tokens: mean length of a text.
    """
    plan = tasks.plan(task.events).steps
    steps = [_step_flops(config, model, step, rows=rows, text_tokens=text_tokens) for step in plan]
    loss = config.loss
    has_reference = loss.text_beta > 0 or loss.image_beta > 0 or loss.report_kl
    # A frozen weight needs no gradient of its own, so that its products count twice, else thrice.
    passes = (2 if config.train.trainable == "lora" else 3) * config.train.updates_per_batch
    passes += has_reference
    image_passes = passes + loss.matches  # velocities of the average policy
    by_kind = (passes, image_passes)
    untrained = [kind == "none" for kind in (loss.text, loss.image)]
    return sum(
        step.sampled
        + (0 if untrained[planned.kind == tasks.IMAGE] else by_kind[planned.kind == tasks.IMAGE])
        * step.trained
        for planned, step in zip(plan, steps, strict=True)
    )


def _step_flops(
    config: Config,
    model: BagelConfig,
    step: tasks.PlannedStep,
    *,
    rows: int,
    text_tokens: float,
) -> StepFlops:
    """Counts one step, in the context of the texts before it."""
    context = text_tokens * step.index
    if step.kind != tasks.IMAGE:
        flops = decoder_flops(model, rows, text_tokens, context)
        flops += head_flops(model, rows, text_tokens)
        return StepFlops(flops, flops)
    height, width = model.latent_grid(config.model.height, config.model.width)
    options = image_options(config.rollout, step)
    evaluation = decoder_flops(model, rows, height * width, text_tokens)
    branches = [_branches(options.guidance, level) for level in noise_levels(options)[:-1]]
    # The window lies somewhere within its range; the mean of its steps stands for all places.
    low, high = options.window_range
    mean_branches = sum(branches[low:high]) / len(branches[low:high])
    trained = options.window * (1 if config.loss.matches else mean_branches)
    return StepFlops(sum(branches) * evaluation, trained * evaluation)


def _branches(guidance: Guidance, level: float) -> int:
    """Counts the contexts in which an image step at a noise level is evaluated."""
    if not is_active(guidance, level):
        return 1
    return 1 + guidance.uses_text + guidance.uses_image
