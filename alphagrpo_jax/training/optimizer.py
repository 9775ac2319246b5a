"""The optimizer of an update, and its learning rate."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alphagrpo_jax.config import OptimizerOptions

GEN_EXPERT = r"_moe_gen/|(^|/)(vae2llm|llm2vae|time_embedder)/"  # paths of the image side


class AverageState(NamedTuple):
    """State of `keep_average`."""

    count: jax.Array  # int32[], optimizer steps
    average: Any  # as the parameters


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """Makes AdamW behind clipping of the global gradient norm, with the rates of `make_schedule`.

    `gen_scale` multiplies the steps of the image expert's parameters. With `average_limit` above 0
    the state holds the moving average of the parameters, see `average_of`.
    """
    adamw = optax.adamw(
        make_schedule(options),
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
    transformations = [optax.clip_by_global_norm(options.clip_norm), adamw]
    if options.gen_scale != 1.0:
        transformations.append(optax.masked(optax.scale(options.gen_scale), _is_gen))
    if options.average_limit:
        transformations.append(keep_average(options.average_rate, options.average_limit))
    return optax.chain(*transformations)


def keep_average(rate: float, limit: float) -> optax.GradientTransformation:
    """Makes a transformation that keeps the parameters' average and leaves their steps as they are.

    `average := d average + (1 - d) new`, `d = min(limit, rate step)`, from step 1: the average
    policy of DiffusionNFT (arXiv 2509.16117). It must be the last of a chain.

    Args:
      rate, limit: see above.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        count = state.count + 1
        decay = jnp.minimum(limit, rate * count)
        average = jax.tree.map(
            lambda past, new: decay * past + (1.0 - decay) * new,
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, AverageState(count, average)

    return optax.GradientTransformation(init, update)


def average_of(opt_state: Any) -> Any:
    """Returns the average of the parameters from the state of an optimizer that keeps it."""
    return optax.tree.get(opt_state, "AverageState").average


def make_schedule(options: OptimizerOptions) -> optax.Schedule:
    """Makes the learning rate a function of the number of applied updates.

    It rises linearly from zero over `warmup_steps`, so that the first update has rate zero, and, if
    `decay_steps` > 0, falls linearly to zero at `decay_steps`.
    """
    rate, rising = options.learning_rate, options.warmup_steps
    schedule: optax.Schedule = optax.constant_schedule(rate)
    if options.decay_steps:
        schedule = optax.linear_schedule(rate, 0.0, max(options.decay_steps - rising, 1))
    if rising:
        warmup = optax.linear_schedule(0.0, rate, rising)
        schedule = optax.join_schedules([warmup, schedule], [rising])
    return schedule


def next_rate(opt_state: Any, *, schedule: optax.Schedule) -> jax.Array:
    """Returns the next applied update's learning rate, float32[], by `make_optimizer`'s state."""
    count = optax.tree.get(opt_state, "ScaleByScheduleState").count
    return jnp.asarray(schedule(count), jnp.float32)


def _is_gen(tree: Any) -> Any:
    """Marks the leaves of the image expert, a tree of bool."""

    def is_gen(path: tuple, _: jax.Array) -> bool:
        name = "/".join(str(entry.key) for entry in path)
        return re.search(GEN_EXPERT, name) is not None

    return jax.tree_util.tree_map_with_path(is_gen, tree)
