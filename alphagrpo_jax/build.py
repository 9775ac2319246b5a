"""From a configuration to what the commands run: model, data, options, jitted steps."""

import dataclasses
import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from alphagrpo_jax import optimizers, prompts, tasks, update
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.flow.guidance import Guidance
from alphagrpo_jax.models.bagel_weights import Loaded, load_model
from alphagrpo_jax.rewards.scoring import ScoringOptions
from alphagrpo_jax.rewards.verifiers.chat.endpoints import checked_urls
from alphagrpo_jax.rewards.workers.pool import Pool, PoolOptions
from alphagrpo_jax.rewards.workers.worker import Factory
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.paths import model_folder, resolve
from alphagrpo_jax.sampling.image import ImageOptions
from alphagrpo_jax.sampling.trajectory import RolloutOptions
from alphagrpo_jax.types import TrainState

ENDPOINT_SHARE = 0.9  # of the pool's deadlines, for what an endpoint worker does by itself


class Data(NamedTuple):
    """Both prompt sets of a task, tokenised."""

    train: prompts.PromptSet
    heldout: prompts.PromptSet


def load_policy(config: Config, mesh: Mesh) -> Loaded:
    """The pretrained model on the mesh.

    Raises:
      ConfigError: an image size that the latent grid does not divide.
    """

    def place(path: str, leaf: np.ndarray) -> jax.Array:
        return jax.device_put(leaf, sharding.param_sharding(path, leaf.shape, mesh))

    loaded = load_model(
        config.model.path, jnp.dtype(config.model.dtype), remat=config.model.remat, place=place
    )
    stride = loaded.config.latent_stride
    if config.model.height % stride or config.model.width % stride:
        raise ConfigError(
            f"model.height={config.model.height} and model.width={config.model.width} must be "
            f"multiples of {stride} pixels, the side of a latent token"
        )
    return loaded


def make_mesh(config: Config) -> Mesh:
    """The mesh of a configuration.

    Raises:
      ConfigError: it does not fit the devices, or does not cut a micro-batch evenly.
    """
    try:
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    ways = sharding.batch_ways(mesh)
    sizes = {
        "train.micro_batch": config.train.micro_batch,
        "rollout.micro_batch": config.rollout.micro_batch,
        "eval.micro_batch": config.eval.micro_batch,
    }
    for name, size in sizes.items():
        if size % ways:
            raise ConfigError(
                f"{name}={size} does not divide over mesh.data x mesh.fsdp = {ways} parts; make it "
                f"a multiple of {ways} or change the mesh"
            )
    return mesh


def load_data(config: Config, loaded: Loaded, cache: str | os.PathLike) -> dict[str, Data]:
    """Both prompt sets of every task of a configuration; see `prompts.load`."""
    found = {}
    for name in config.tasks:
        task = tasks.TASKS[name]
        read = functools.partial(
            prompts.load,
            tokenizer=loaded.tokenizer,
            task=task,
            bucket=config.rollout.prompt_tokens,
            cache=cache,
            own_images=task.image == "record" or (task.refines and config.srr.source == "record"),
        )
        found[name] = Data(*(read(resolve(path)) for path in config.data.pair(task.data)))
    return found


def make_pool(config: Config) -> Pool:
    """Starts the verifier workers (in the background).

    Raises:
      ConfigError: see `verifier_factories`.
      OSError: the audit log cannot be opened.
    """
    verifier = config.verifier
    factories = verifier_factories(config)
    return Pool(
        factories,
        PoolOptions(
            workers=len(factories),
            threads=verifier.threads,
            capacity=max(1024, 2 * config.trajectories),
            attempt_seconds=verifier.attempt_seconds,
            total_seconds=verifier.total_seconds,
            start_seconds=verifier.start_seconds,
            max_attempts=verifier.max_attempts,
            cache_size=verifier.cache_size,
            audit_path=audit_path(verifier.audit),
        ),
    )


def audit_path(name: str) -> str | None:
    """The audit log of this process; of several, each has one of its own, NAME.NUMBER.jsonl."""
    if not name or jax.process_count() == 1:
        return name or None
    path = pathlib.PurePath(name)
    return str(path.with_name(f"{path.stem}.{jax.process_index()}{path.suffix}"))


def verifier_factories(config: Config) -> list[Factory]:
    """What each worker of the pool builds.

    With kind "openai" every worker balances over all endpoints; otherwise the endpoints stand
    beside local workers, each with a worker of its own, and the pool balances.

    Raises:
      ConfigError: an endpoint that is no base URL, or one twice; or the policy is the verifier.
    """
    verifier = config.verifier
    if verifier.kind == "self":
        raise ConfigError(
            "verifier.kind=self: the policy judges its own images in training only; give a "
            "verifier of another kind here"
        )
    if verifier.endpoints:
        try:
            checked_urls(verifier.endpoints)
        except ValueError as error:
            raise ConfigError(f"verifier.endpoints: {error}") from error
    if verifier.kind == "openai":
        return [_endpoint_factory(config, verifier.endpoints)] * verifier.workers
    if verifier.kind == "callable":
        local: Factory = ("callable", {"target": verifier.path})
    else:
        options = {
            "path": str(model_folder(verifier.path)),
            "device": verifier.device,
            "dtype": verifier.dtype,
            "num_threads": verifier.threads,
            "top_k": verifier.top_k or None,
            "text_fallback": verifier.text_fallback,
        }
        local = ("hf", options)
    # What one server cannot answer goes to another worker soon, from the start of the run on.
    soon = {"outage_attempts": 2, "must_serve": False, "start_seconds": 0.0}
    remote = []
    for url in verifier.endpoints:
        kind, options = _endpoint_factory(config, (url,))
        remote.append((kind, {**options, **soon}))
    return [local] * verifier.workers + remote


def _endpoint_factory(config: Config, endpoints: tuple[str, ...]) -> Factory:
    """A worker over endpoints; its own deadlines end before the pool would kill it."""
    verifier = config.verifier
    options = {
        "endpoints": endpoints,
        "model": verifier.model,
        "api_key_env": verifier.api_key_env,
        "concurrency": verifier.concurrency,
        "question_seconds": verifier.question_seconds,
        "answer_seconds": ENDPOINT_SHARE * verifier.attempt_seconds,
        "start_seconds": ENDPOINT_SHARE * verifier.start_seconds,
        "top_logprobs": verifier.top_logprobs,
        "text_fallback": verifier.text_fallback,
    }
    return "openai", options


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


def update_options(config: Config, loaded: Loaded, task: tasks.Task) -> update.UpdateOptions:
    """What updates on a task's trajectories compile for."""
    options = rollout_options(config, loaded, task)
    fields = dataclasses.asdict(config.loss)
    return update.UpdateOptions(
        plan=options.plan,
        system_tokens=options.system_tokens,
        image=options.image,
        edit_guidance=options.edit_guidance,
        temperature=config.rollout.temperature,
        micro_batch=config.train.micro_batch,
        context_gradient=config.train.context_gradient,
        lora_scale=lora_scale(config),
        loss=update.LossOptions(
            **fields | {"text": fields["text"] == "grpo", "image": fields["image"] == "grpo"}
        ),
    )


def lora_scale(config: Config) -> float | None:
    """alpha / rank; None where a part of the base is trained."""
    return config.lora.alpha / config.lora.rank if config.train.trainable == "lora" else None


def initial_state(
    config: Config, base: dict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first update, on the mesh."""
    root = jax.random.key(config.seed)
    run_key, lora_key = jax.random.split(root)
    full = config.train.full_targets if config.train.trainable == "full" else None

    def init(base: dict, key: jax.Array) -> tuple[Any, Any]:
        trainable = update.init_trainable(
            base, key, rank=config.lora.rank, targets=config.lora.targets, full_targets=full
        )
        return trainable, optimizer.init(trainable)

    shapes = jax.eval_shape(init, base, lora_key)
    placed = jax.jit(init, out_shardings=sharding.param_shardings(shapes, mesh))
    trainable, opt_state = placed(base, lora_key)
    key = jax.device_put(run_key, sharding.replicated(mesh))
    return TrainState(trainable=trainable, opt_state=opt_state, key=key)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of a configuration."""
    return optimizers.make_optimizer(**dataclasses.asdict(config.optimizer))


def make_schedule(config: Config) -> optax.Schedule:
    """The optimizer's learning rate by the number of applied updates."""
    own = config.optimizer
    return optimizers.make_schedule(
        own.learning_rate, warmup_steps=own.warmup_steps, decay_steps=own.decay_steps
    )
