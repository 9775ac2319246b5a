"""A policy to use: the pretrained one of a configuration, or that of a run's newest checkpoint."""

import dataclasses
import pathlib
from typing import NamedTuple

import jax

from alphagrpo_jax import policy
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.runtime import checkpoint, sharding
from alphagrpo_jax.trainer import start_place
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import setup
from alphagrpo_jax.training.run_folder import payload, run_config


class Trained(NamedTuple):
    """A policy, and what it came from."""

    config: Config
    loaded: Loaded
    params: policy.PolicyParams
    step: int  # updates done; 0 without a checkpoint


def from_config(config: Config) -> Trained:
    """The pretrained policy of a configuration, on one device."""
    loaded = setup.load_policy(config, _one_device())
    return Trained(config, loaded, policy.PolicyParams(loaded.base), 0)


def from_run(folder: str | pathlib.Path, *, model_path: str | None = None) -> Trained:
    """The policy of a run's newest checkpoint, on one device.

    Args:
      folder: the run's.
      model_path: where the pretrained model lies now; None: where the run found it.
    Raises:
      FileNotFoundError: the folder is not a run's, or has no checkpoint yet.
      CheckpointError: the checkpoint cannot be read.
    """
    config = run_config(folder)
    if model_path is not None:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, path=model_path)
        )
    mesh = _one_device()
    loaded = setup.load_policy(config, mesh)
    state = setup.initial_state(config, loaded.base, setup.make_optimizer(config), mesh)
    saves = checkpoint.Checkpoints(folder, keep=config.checkpoint.keep)
    step = saves.latest()
    if step is None:
        raise FileNotFoundError(f"the run in {folder} has no complete checkpoint yet")
    trainable = saves.state(step, payload(state, start_place(config)))["trainable"]
    saves.close()
    params = gradient_lib.policy_params(
        loaded.base, trainable, lora_scale=options_lib.lora_scale(config)
    )
    return Trained(config, loaded, params, step)


def _one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, 1, jax.devices()[:1])
