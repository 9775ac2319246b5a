"""From a configuration to what the commands run: model, data, options, jitted steps."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from alphagrpo_jax import prompts, tasks, update
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.flow.guidance import Guidance
from alphagrpo_jax.models.bagel_weights import Loaded, load_model
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rewards.pool import Pool, PoolOptions
from alphagrpo_jax.rewards.scoring import ScoringOptions
from alphagrpo_jax.rewards.verifiers.endpoints import checked_urls
from alphagrpo_jax.rewards.worker import Factory
from alphagrpo_jax.rollout import RolloutOptions, drawing_params, generate, prefill
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.sampling.image import ImageOptions
from alphagrpo_jax.types import TextBlock, TrainState, join_rows, map_rows

ENDPOINT_SHARE = 0.9  # of the pool's deadlines, for what an endpoint worker does by itself


class Data(NamedTuple):
    """Both prompt sets, tokenised."""

    train: prompts.PromptSet
    heldout: prompts.PromptSet


class Steps(NamedTuple):
    """The jitted functions of a run; each compiles once."""

    weights: Callable  # base, trainable -> what rollouts read
    prefill: Callable  # of a training micro-batch
    generate: Callable
    eval_prefill: Callable
    eval_generate: Callable  # `generate` itself where evaluation draws as training does
    join: Callable  # micro-batches of rollouts -> one
    forward: Callable
    reference: Callable
    count: Callable
    entropy: Callable  # of all parts of an update, from their old scores
    backward: Callable
    accumulate: Callable
    apply: Callable


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


def load_data(config: Config, loaded: Loaded, cache: str | os.PathLike) -> Data:
    """Both prompt sets of a configuration; see `prompts.load`."""
    read = functools.partial(
        prompts.load, tokenizer=loaded.tokenizer, bucket=config.rollout.prompt_tokens, cache=cache
    )
    return Data(train=read(resolve(config.data.train)), heldout=read(resolve(config.data.heldout)))


def make_pool(config: Config, *, audit_path: str | None = None) -> Pool:
    """Starts the verifier workers (in the background)."""
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
            audit_path=audit_path,
        ),
    )


def verifier_factories(config: Config) -> list[Factory]:
    """What each worker of the pool builds.

    With kind "openai" every worker balances over all endpoints; otherwise the endpoints stand
    beside local workers, each with a worker of its own, and the pool balances.

    Raises:
      ConfigError: an endpoint that is no base URL, or one twice.
    """
    verifier = config.verifier
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
            "path": str(resolve(verifier.path)),
            "device": verifier.device,
            "dtype": verifier.dtype,
            "num_threads": verifier.threads,
            "top_k": verifier.top_k or None,
            "text_fallback": verifier.text_fallback,
        }
        local = ("hf", options)
    remote = [_endpoint_factory(config, (url,)) for url in verifier.endpoints]
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


def scoring_options(config: Config) -> ScoringOptions:
    """How rewards are made of answers, with the task's shaping."""
    weight = config.reward.format_weight if tasks.TASKS[config.task].format_reward else 0.0
    own = config.reward
    return ScoringOptions(own.aggregate, own.score, weight, dependencies=own.dependencies)


def rollout_options(config: Config, loaded: Loaded) -> RolloutOptions:
    """What training rollouts compile for."""
    own, task = config.rollout, tasks.TASKS[config.task]
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
        max_text_tokens=own.text_tokens,
        top_p=own.top_p,
        image=image,
        shared_noise=own.shared_noise,
        merge_lora=own.merge_lora,
    )


def eval_options(config: Config, loaded: Loaded) -> RolloutOptions:
    """What evaluation rollouts compile for: one per prompt, images without stochastic steps."""
    options = rollout_options(config, loaded)
    guidance = dataclasses.replace(options.image.guidance, text_scale=config.eval.text_guidance)
    image = dataclasses.replace(
        options.image, num_points=config.eval.num_points, guidance=guidance, window=0
    )
    return dataclasses.replace(
        options, group_size=1, top_p=config.eval.top_p, image=image, shared_noise=False
    )


def update_options(config: Config, loaded: Loaded) -> update.UpdateOptions:
    """What updates compile for."""
    options = rollout_options(config, loaded)
    fields = dataclasses.asdict(config.loss)
    return update.UpdateOptions(
        plan=options.plan,
        system_tokens=options.system_tokens,
        image=options.image,
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
    return update.make_optimizer(**dataclasses.asdict(config.optimizer))


def drawing_weights(
    base: dict, trainable: Any, *, scale: float | None, merge_lora: bool
) -> PolicyParams:
    """The weights of rollouts under a train state."""
    params = update.policy_params(base, trainable, lora_scale=scale)
    return drawing_params(params, merge_lora=merge_lora)


def jit_steps(
    config: Config,
    loaded: Loaded,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Steps:
    """Every device-side function of a run, jitted once with its shardings."""
    options, for_eval = rollout_options(config, loaded), eval_options(config, loaded)
    for_update, model = update_options(config, loaded), loaded.model
    weights = functools.partial(
        drawing_weights, scale=lora_scale(config), merge_lora=options.merge_lora
    )
    filling = functools.partial(prefill, model, options=options)
    generating = functools.partial(generate, model, options=options)
    count = config.rollout.micro_batch // config.train.group_size
    shape = (count, config.rollout.prompt_tokens)
    block = TextBlock(*(jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, bool)))
    params = jax.eval_shape(weights, loaded.base, state.trainable)
    given = jax.eval_shape(filling, params, (block,) * options.plan.events.count(tasks.TEXT))
    kinds = (jnp.int32, jnp.int32, jnp.float32)
    scalars = (state.key, *(jax.ShapeDtypeStruct((), kind) for kind in kinds))
    drawn = jax.eval_shape(generating, params, given, *scalars)
    generate_step = jax.jit(generating, out_shardings=_row_shardings(drawn, options.plan, mesh))
    same = dataclasses.replace(options.image, window=0) == for_eval.image and (
        options.top_p == for_eval.top_p and not options.shared_noise
    )
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    kept = state_shardings.trainable
    return Steps(
        weights=jax.jit(weights) if options.merge_lora else weights,
        prefill=jax.jit(filling, out_shardings=_row_shardings(given, options.plan, mesh)),
        generate=generate_step,
        eval_prefill=jax.jit(functools.partial(prefill, model, options=for_eval)),
        eval_generate=generate_step
        if same
        else jax.jit(functools.partial(generate, model, options=for_eval)),
        join=jax.jit(
            functools.partial(join_rows, shared=options.plan.shared),
            out_shardings=_row_shardings(drawn[0], options.plan, mesh),
        ),
        forward=jax.jit(functools.partial(update.forward, model=model, options=for_update)),
        reference=jax.jit(
            functools.partial(update.score_reference, model=model, options=for_update)
        ),
        count=jax.jit(functools.partial(update.count, options=for_update)),
        entropy=jax.jit(update.join_entropy),
        backward=jax.jit(
            functools.partial(update.backward, options=for_update), out_shardings=(kept, None)
        ),
        accumulate=jax.jit(update.accumulate, donate_argnums=0),
        apply=jax.jit(
            functools.partial(update.apply, optimizer=optimizer),
            out_shardings=(state_shardings, None),
            donate_argnums=0,
        ),
    )


def _row_shardings(tree: Any, plan: tasks.Plan, mesh: Mesh) -> Any:
    """Shardings of a rollout's arrays: rows over the mesh, what all rows share whole."""
    whole = sharding.replicated(mesh)
    rows = map_rows(lambda axis, x: sharding.batch_sharding(mesh, axis), tree, shared=plan.shared)
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.sharding.Sharding) else whole, rows
    )
