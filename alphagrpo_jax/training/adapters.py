"""Loads the adapters of a run without its model, of which they are a small part."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.prompts import start_position
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.paths import model_folder
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.run_folder import newest_arrays, payload, run_config
from alphagrpo_jax.types import TrainState


class RunAdapters(NamedTuple):
    """The adapters of a run's newest checkpoint."""

    config: Config
    adapters: dict  # tree of `lora.init`
    step: int  # updates done


def adapters_from_run(folder: str | pathlib.Path, *, model_path: str | None = None) -> RunAdapters:
    """Loads the adapters of a run's newest checkpoint, without the weights of its model.

    Args:
      folder: of the run.
      model_path: see `inference.from_run`; its JSON files are read.
    Raises:
      InputError: the run trains a part of the model itself.
      MissingFileError, CheckpointError: see `inference.from_run`.
    """
    config = run_config(folder)
    if config.train.trainable != "lora":
        raise InputError(
            f"{folder}: the run has train.trainable={config.train.trainable!r} and no adapters, "
            "expected 'lora'; export the whole model instead"
        )
    model = model_folder(config.model.path if model_path is None else model_path)
    sizes = BagelConfig.from_folder(model, Tokenizer.from_folder(model).special)
    optimizer = make_optimizer(config.optimizer)

    def content(base: dict) -> dict[str, Any]:
        key = jax.random.key(config.seed)
        trainable = gradient_lib.init_trainable(base, key, config.lora, config.train)
        state = TrainState(trainable, optimizer.init(trainable), key)
        return payload(state, start_position(config))

    place = sharding.replicated(sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
    shapes = jax.eval_shape(content, base_shapes(Bagel(sizes, dtype=jnp.dtype(config.model.dtype))))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    arrays, step = newest_arrays(folder, config, like)
    return RunAdapters(config, arrays["trainable"], step)
