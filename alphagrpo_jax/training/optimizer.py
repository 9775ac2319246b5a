"""The optimizer of an update, and its learning rate."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alphagrpo_jax.config import OptimizerOptions

GEN_EXPERT = r"_moe_gen/|(^|/)(vae2llm|llm2vae|time_embedder)/"  # paths of the image side


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """Makes AdamW behind clipping of the global gradient norm, with the rates of `make_schedule`.

    `gen_scale` multiplies the steps of the image expert's parameters.
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
    return optax.chain(*transformations)


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
