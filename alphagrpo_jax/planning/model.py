"""A run's model, weights and train state as shapes with their places: nothing is read or made."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from alphagrpo_jax import tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel import Bagel, base_shapes
from alphagrpo_jax.models.bagel_7b import TOKENIZER, bagel_7b_config
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.errors import MissingFileError
from alphagrpo_jax.runtime.paths import resolve
from alphagrpo_jax.runtime.tokenizer import Tokenizer
from alphagrpo_jax.training import gradient, setup
from alphagrpo_jax.types import TrainState


def abstract_model(config: Config, mesh: Mesh) -> tuple[LoadedModel, list[str]]:
    """Describes the model that a configuration names, and says what stands in for what.

    Where `model.path` is no folder here, the model has BAGEL-7B-MoT's sizes.

    Raises:
      ConfigError: sizes that do not fit the configuration; see `setup.check_sizes` and
        `setup.attention_kernel`.
    """
    folder, notes = _folder(config.model.path), []
    try:
        tokenizer = Tokenizer.from_folder(folder or resolve(TOKENIZER))
    except MissingFileError:
        tokenizer, folder_has = Tokenizer.from_folder(resolve(TOKENIZER)), False
    else:
        folder_has = folder is not None
    if folder is None:
        model_config = bagel_7b_config(tokenizer)
        notes.append(f"model.path={config.model.path} is no folder here: BAGEL-7B-MoT's sizes")
    else:
        model_config = BagelConfig.from_folder(folder, tokenizer.special)
    if not folder_has:
        prompts = {name: tasks.TASKS[name].system_prompt for name in config.tasks}
        counts = [
            f"{len(tokenizer.wrap(prompt))} tokens of {name}'s system prompt"
            for name, prompt in prompts.items()
            if prompt
        ]
        notes.append(f"the shipped tokenizer stands in for the model's: {', '.join(counts)}")
    dtype = jnp.dtype(config.model.dtype)
    attention = setup.attention_kernel(config, mesh)
    model = Bagel(model_config, dtype, config.model.remat, config.model.unroll, attention)
    base = placed(base_shapes(model), mesh, dtype=dtype)
    return LoadedModel(model, base, tokenizer, model_config, {}, {}), notes


def _folder(path: str) -> Path | None:
    """Returns the model's folder, if it is here."""
    try:
        return resolve(path)
    except MissingFileError:
        return None


def placed(tree: Any, mesh: Mesh, *, dtype: Any = None) -> Any:
    """Lays shapes of parameters on the mesh as a run does, in another dtype if one is given."""

    def lay(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        place = sharding.param_sharding(sharding.path_name(path), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(lay, tree)


def abstract_state(
    config: Config, base: dict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Describes the train state of a run; see `setup.initial_state`."""

    def init(base: dict, key: jax.Array) -> tuple[Any, Any]:
        trainable = gradient.init_trainable(base, key, config.lora, config.train)
        return trainable, optimizer.init(trainable)

    key = jax.eval_shape(lambda: jax.random.key(0))
    trainable, opt_state = placed(jax.eval_shape(init, base, key), mesh)
    replicated = sharding.replicated(mesh)
    placed_key: Any = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
    return TrainState(trainable=trainable, opt_state=opt_state, key=placed_key)


def device_bytes(tree: Any) -> float:
    """Returns the bytes of a pytree of arrays or placed shapes on one device, without padding."""
    return float(sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree)))


def _leaf_bytes(leaf: Any) -> float:
    shape = leaf.shape
    if getattr(leaf, "sharding", None) is not None:
        shape = leaf.sharding.shard_shape(shape)
    size = 1
    for side in shape:
        size *= side
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return float(size * (8 if is_key else leaf.dtype.itemsize))
