"""Static arguments of jitted functions, from a configuration and a task.

Each holds sections of the configuration, changed where the task or the occasion says so, and beside
them what is derived and no option: the plan, token ids, the latent grid.
"""

import dataclasses

from alphagrpo_jax import tasks
from alphagrpo_jax.config import Config, MeshOptions, PassOptions, RewardOptions, part_of
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.sampling.trajectory import RolloutSpec
from alphagrpo_jax.training.update_loss import UpdateSpec


def scoring_options(config: Config, task: tasks.Task) -> RewardOptions:
    """Returns the section `reward`, without a format reward where the task has none."""
    if task.format_reward:
        return config.reward
    return dataclasses.replace(config.reward, format_weight=0.0)


def rollout_spec(config: Config, loaded: LoadedModel, task: tasks.Task) -> RolloutSpec:
    """Returns what training rollouts of a task are compiled for."""
    options = config.rollout
    if task.refines:  # its text is a reflection
        options = dataclasses.replace(options, text_tokens=config.srr.text_tokens)
    system = loaded.tokenizer.wrap(task.system_prompt) if task.system_prompt else []
    return RolloutSpec(
        plan=tasks.plan(task.events),
        system_tokens=tuple(system),
        grid=loaded.config.latent_grid(config.model.height, config.model.width),
        rows_per_prompt=config.train.group_size,
        stochastic=True,
        options=options,
        shards=row_shards(config.mesh),
        micro_batch=config.rollout.micro_batch,
    )


def eval_spec(config: Config, loaded: LoadedModel, task: tasks.Task) -> RolloutSpec:
    """Returns what evaluation rollouts are compiled for: one per prompt, no stochastic steps.

    The text guidance of images that are no edits is `eval.text_guidance`.
    """
    spec = rollout_spec(config, loaded, task)
    options = dataclasses.replace(
        spec.options,
        num_points=config.eval.num_points,
        guidance=dataclasses.replace(spec.options.guidance, text_scale=config.eval.text_guidance),
        top_p=config.eval.top_p,
        shared_noise=False,
    )
    return dataclasses.replace(spec, rows_per_prompt=1, stochastic=False, options=options)


def initial_spec(config: Config, loaded: LoadedModel) -> RolloutSpec:
    """Returns what initial images are compiled for: text-to-image, several images per prompt."""
    spec = rollout_spec(config, loaded, tasks.TASKS["t2i"])
    options = dataclasses.replace(
        spec.options, num_points=config.srr.num_points, shared_noise=False
    )
    return dataclasses.replace(
        spec, rows_per_prompt=config.srr.initial_images, stochastic=False, options=options
    )


def update_spec(config: Config, loaded: LoadedModel, task: tasks.Task) -> UpdateSpec:
    """Returns what updates on a task's trajectories are compiled for."""
    spec = rollout_spec(config, loaded, task)
    return UpdateSpec(
        rollout=spec,
        loss=config.loss,
        layout=RowLayout.make(
            config.trajectories, shards=spec.shards, micro_batch=config.train.micro_batch
        ),
        rebuild_contexts=config.train.context_gradient,
        lora_scale=lora_scale(config),
        passes=part_of(config.train, PassOptions),
    )


def lora_scale(config: Config) -> float | None:
    """Returns alpha / rank; None where a part of the base is trained."""
    return config.lora.alpha / config.lora.rank if config.train.trainable == "lora" else None


def row_shards(mesh: MeshOptions) -> int:
    """Returns over how many shards rows lie; 1 while the mesh's size is not yet known."""
    return 1 if -1 in (mesh.data, mesh.fsdp) else mesh.data * mesh.fsdp
