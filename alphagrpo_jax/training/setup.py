"""Builds what a configuration names: mesh, model, data, optimizer, train state."""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from alphagrpo_jax import prompts, tasks
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.models import peft
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.bagel_weights import LoadedModel, load_model
from alphagrpo_jax.prompts import TaskData
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.runtime.paths import model_folder, resolve
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.types import TrainState

# By platform, those of `ops.fused_attention`. A GPU that is only described may be called "cuda".
FUSED_KERNELS = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}


def load_policy(config: Config, mesh: Mesh) -> LoadedModel:
    """Loads the pretrained model onto the mesh.

    Raises:
      ConfigError: see `check_sizes` and `attention_kernel`.
      MissingFileError: no such folder, and no such model of the hub.
    """
    loaded = load_model(
        model_folder(config.model.path),
        jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention_kernel=attention_kernel(config, mesh),
        sharding_of=functools.partial(sharding.param_sharding, mesh=mesh),
    )
    check_sizes(config, loaded.config, mesh)
    return loaded


def attention_kernel(config: Config, mesh: Mesh) -> str:
    """Returns the kernel of `ops.attention` that `model.attention` means on these devices.

    Raises:
      ConfigError: a number format that the kernel does not compute in.
    """
    if config.model.attention == "plain":
        return "plain"
    kernel = FUSED_KERNELS.get(mesh.devices.flat[0].platform, "plain")
    if kernel == "cudnn" and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"model.attention=fused computes in bfloat16 on GPUs, but model.dtype="
            f"{config.model.dtype}; set model.dtype=bfloat16 or model.attention=plain"
        )
    return kernel


def check_sizes(config: Config, model_config: BagelConfig, mesh: Mesh) -> None:
    """Checks that a model's sizes fit the configuration and the mesh.

    Raises:
      ConfigError: an image size that the latent grid does not divide, or that is too large; or
        heads that mesh.tensor does not divide.
    """
    tensor = mesh.shape["tensor"]
    heads = (model_config.llm.num_attention_heads, model_config.llm.num_key_value_heads)
    if any(count % tensor for count in heads):
        raise ConfigError(
            f"mesh.tensor={tensor} must divide the model's {heads[0]} query and {heads[1]} key "
            f"heads; make it a divisor of {math.gcd(*heads)}, and mesh.fsdp larger instead"
        )
    stride = model_config.latent_stride
    if config.model.height % stride or config.model.width % stride:
        raise ConfigError(
            f"model.height={config.model.height} and model.width={config.model.width} must be "
            f"multiples of {stride} pixels, the side of a latent token"
        )
    most = model_config.max_latent_size
    rows, columns = model_config.latent_grid(config.model.height, config.model.width)
    if max(rows, columns) > most and not model_config.interpolate_pos:
        raise ConfigError(
            f"model.height={config.model.height} and model.width={config.model.width} are {rows} x "
            f"{columns} latent tokens, but the model's position table has {most} x {most}; make "
            f"them at most {most * stride} pixels"
        )


def make_mesh(config: Config) -> Mesh:
    """Makes the mesh of a configuration.

    Raises:
      ConfigError: it does not fit the devices.
    """
    try:
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except UsageError as error:
        raise ConfigError(str(error)) from error
    return mesh


def enter_mesh(config: Config) -> tuple[Config, Mesh]:
    """Makes the mesh and enters it; returns the configuration with its sizes, and the mesh.

    Raises:
      ConfigError: see `make_mesh`.
    """
    mesh = make_mesh(config)
    jax.set_mesh(mesh)
    sizes = dataclasses.replace(config.mesh, **mesh.shape)
    return dataclasses.replace(config, mesh=sizes), mesh


def load_data(config: Config, loaded: LoadedModel, cache: str | os.PathLike) -> dict[str, TaskData]:
    """Loads both prompt sets of every task of a configuration; see `prompts.load`."""
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
        found[name] = TaskData(*(read(resolve(path)) for path in config.data.pair(task.data)))
    return found


def initial_state(
    config: Config, base: dict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Makes the state before the first update, on the mesh."""
    root = jax.random.key(config.seed)
    run_key, lora_key = jax.random.split(root)

    def init(base: dict, key: jax.Array) -> tuple[Any, Any]:
        trainable = gradient_lib.init_trainable(base, key, config.lora, config.train)
        return trainable, optimizer.init(trainable)

    shapes = jax.eval_shape(init, base, lora_key)
    placed = jax.jit(init, out_shardings=sharding.param_shardings(shapes, mesh))
    trainable, opt_state = placed(base, lora_key)
    key = jax.device_put(run_key, sharding.replicated(mesh))
    return TrainState(trainable=trainable, opt_state=opt_state, key=key)


def with_adapter(config: Config, state: TrainState) -> TrainState:
    """Puts the adapter of `lora.init_from` into the state before the first update, if there is one.

    Raises:
      ConfigError: nothing of it would be trained.
      MissingFileError, AdapterError, UsageError: see `peft.read_adapter`.
    """
    if not config.lora.init_from:
        return state
    if config.train.trainable != "lora":
        raise ConfigError(
            f"lora.init_from={config.lora.init_from!r} needs train.trainable=lora, got "
            f"{config.train.trainable!r}; to train the model with the adapter merged in, merge it "
            "and give the folder as model.path"
        )
    leaves = peft.read_adapter(config.lora.init_from, state.trainable, alpha=config.lora.alpha)

    def place(old: jax.Array, values: np.ndarray) -> jax.Array:
        # Each process what its devices hold: `jax.device_put` would compare all of it across hosts.
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: values[index])

    state = dataclasses.replace(state, trainable=jax.tree.map(place, state.trainable, leaves))
    if not config.optimizer.average_limit:
        return state
    # The average begins at the adapter, as it would at fresh ones.
    shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
    init = jax.jit(make_optimizer(config.optimizer).init, out_shardings=shardings)
    return dataclasses.replace(state, opt_state=init(state.trainable))
