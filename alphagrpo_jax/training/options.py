"""The static arguments of jitted functions, from a configuration and a task."""

import dataclasses

from alphagrpo_jax import tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.flow.guidance import Guidance
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.rewards.scoring import ScoringOptions
from alphagrpo_jax.sampling.image import ImageOptions
from alphagrpo_jax.sampling.trajectory import RolloutOptions
from alphagrpo_jax.training import gradient as gradient_lib


def scoring_options(config: Config, task: tasks.Task) -> ScoringOptions:
    """How rewards are made of answers, with the task's shaping."""
    weight = config.reward.format_weight if task.format_reward else 0.0
    own = config.reward
    return ScoringOptions(
        own.aggregate,
        own.score,
        weight,
        own.isolate,
        own.dependencies,
        extra=tuple(zip(own.extra_scores, own.extra_weights, strict=True)),
        rate_semantic=own.rate_semantic,
        rate_quality=own.rate_quality,
    )


def rollout_options(config: Config, loaded: Loaded, task: tasks.Task) -> RolloutOptions:
    """What training rollouts of a task compile for."""
    own = config.rollout
    grid = loaded.config.latent_grid(config.model.height, config.model.width)
    system = loaded.tokenizer.wrap(task.system_prompt) if task.system_prompt else []
    image = ImageOptions(
        grid=grid,
        num_points=own.num_points,
        shift=own.shift,
        window=own.window,
        window_range=own.window_range,
        noise_level=own.noise_level,
        sampler=own.sampler,
        guidance=Guidance(**dataclasses.asdict(own.guidance)),
    )
    return RolloutOptions(
        plan=tasks.plan(task.events),
        system_tokens=tuple(system),
        group_size=config.train.group_size,
        max_text_tokens=config.srr.text_tokens if task.refines else own.text_tokens,
        top_p=own.top_p,
        image=image,
        edit_guidance=Guidance(**dataclasses.asdict(own.edit_guidance)),
        shared_noise=own.shared_noise,
        merge_lora=own.merge_lora,
    )


def eval_options(config: Config, loaded: Loaded, task: tasks.Task) -> RolloutOptions:
    """What evaluation rollouts compile for: one per prompt, images without stochastic steps.

    The text guidance of images that are no edits is `eval.text_guidance`.
    """
    options = rollout_options(config, loaded, task)
    guidance = dataclasses.replace(options.image.guidance, text_scale=config.eval.text_guidance)
    image = dataclasses.replace(
        options.image, num_points=config.eval.num_points, guidance=guidance, window=0
    )
    return dataclasses.replace(
        options, group_size=1, top_p=config.eval.top_p, image=image, shared_noise=False
    )


def initial_options(config: Config, loaded: Loaded) -> RolloutOptions:
    """What stage 1 of task srr compiles for: plain text-to-image, several images per prompt."""
    options = rollout_options(config, loaded, tasks.TASKS["t2i"])
    image = dataclasses.replace(options.image, num_points=config.srr.num_points, window=0)
    return dataclasses.replace(
        options, group_size=config.srr.initial_images, image=image, shared_noise=False
    )


def update_options(config: Config, loaded: Loaded, task: tasks.Task) -> gradient_lib.UpdateOptions:
    """What updates on a task's trajectories compile for."""
    options = rollout_options(config, loaded, task)
    return gradient_lib.UpdateOptions(
        plan=options.plan,
        system_tokens=options.system_tokens,
        image=options.image,
        edit_guidance=options.edit_guidance,
        temperature=config.rollout.temperature,
        micro_batch=config.train.micro_batch,
        context_gradient=config.train.context_gradient,
        lora_scale=lora_scale(config),
        loss=config.loss,
    )


def lora_scale(config: Config) -> float | None:
    """alpha / rank; None where a part of the base is trained."""
    return config.lora.alpha / config.lora.rank if config.train.trainable == "lora" else None
