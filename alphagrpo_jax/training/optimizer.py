"""The optimizer of an update, and its learning rate."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

GEN_EXPERT = r"_moe_gen/|(^|/)(vae2llm|llm2vae|time_embedder)/"  # paths of the image side


def make_optimizer(
    *,
    learning_rate: float,
    gen_scale: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    warmup_steps: int,
    decay_steps: int,
) -> optax.GradientTransformation:
    """AdamW after clipping the global gradient norm, with the rates of `make_schedule`.

    `gen_scale` multiplies the steps of the image expert's parameters.
    """
    schedule = make_schedule(learning_rate, warmup_steps=warmup_steps, decay_steps=decay_steps)
    parts = [
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    ]
    if gen_scale != 1.0:
        parts.append(optax.masked(optax.scale(gen_scale), _is_gen))
    return optax.chain(*parts)


def make_schedule(learning_rate: float, *, warmup_steps: int, decay_steps: int) -> optax.Schedule:
    """The rate by the number of applied updates: up linearly from zero over `warmup_steps`, so that
    the first has rate zero, and, if `decay_steps` > 0, down linearly to zero at `decay_steps`.
    """
    schedule: optax.Schedule = optax.constant_schedule(learning_rate)
    if decay_steps:
        schedule = optax.linear_schedule(learning_rate, 0.0, max(decay_steps - warmup_steps, 1))
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [warmup_steps])
    return schedule


def next_rate(opt_state: Any, *, schedule: optax.Schedule) -> jax.Array:
    """The learning rate of the next applied update, float32[], by the state of `make_optimizer`."""
    count = optax.tree.get(opt_state, "ScaleByScheduleState").count
    return jnp.asarray(schedule(count), jnp.float32)


def _is_gen(tree: Any) -> Any:
    def one(path: tuple, _: jax.Array) -> bool:
        name = "/".join(str(entry.key) for entry in path)
        return re.search(GEN_EXPERT, name) is not None

    return jax.tree_util.tree_map_with_path(one, tree)
