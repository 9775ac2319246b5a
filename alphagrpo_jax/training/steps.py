"""Every device-side function of a run, jitted once with its shardings."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from alphagrpo_jax import loss, prompts, tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_weights import Loaded
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.sampling.trajectory import (
    RolloutSpec,
    generate,
    image_block,
    prefill,
    sampling_params,
)
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import optimizer as optimizer_lib
from alphagrpo_jax.training.options import (
    eval_spec,
    initial_spec,
    lora_scale,
    rollout_spec,
    update_spec,
)
from alphagrpo_jax.training.setup import make_schedule
from alphagrpo_jax.types import ImageBlock, TextBlock, TrainState, join_rows, map_rows


class SampleFns(NamedTuple):
    """The jitted halves of a rollout."""

    prefill: Callable
    generate: Callable


class TaskFns(NamedTuple):
    """The jitted functions of one task; each compiles once."""

    train: SampleFns  # of a training micro-batch
    eval: SampleFns  # its `generate` is that of training where evaluation draws alike
    join: Callable  # micro-batches of rollouts -> one
    forward: Callable
    reference: Callable
    count: Callable
    entropy: Callable  # of all parts of an update, from their old scores
    backward: Callable


class CompiledFns(NamedTuple):
    """The jitted functions of a run."""

    weights: Callable  # base, trainable -> what rollouts read
    tasks: dict[str, TaskFns]
    initial: SampleFns | None  # the images that task srr repairs, several per prompt
    eval_initial: SampleFns | None  # one per prompt
    accumulate: Callable
    add: Callable  # gradients of two batches
    apply: Callable


def compile_fns(
    config: Config,
    loaded: Loaded,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> CompiledFns:
    """Every device-side function of a run, jitted once with its shardings."""
    weights = _bind(
        sampling_weights, scale=lora_scale(config), merge_lora=config.rollout.merge_lora
    )
    params = jax.eval_shape(weights, loaded.base, state.trainable)
    setting = _Setting(config, loaded, params, state.key, mesh)
    named = {name: tasks.TASKS[name] for name in config.tasks}
    initial = eval_initial = None
    if any(_needs_initial(config, task) for task in named.values()):
        plain = tasks.TASKS["t2i"]
        initial, *_ = _sample_fns(setting, plain, initial_spec(config, loaded))
        eval_initial, *_ = _sample_fns(setting, plain, eval_spec(config, loaded, plain))
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return CompiledFns(
        weights=jax.jit(weights) if config.rollout.merge_lora else weights,
        tasks={name: _task_fns(setting, task, state) for name, task in named.items()},
        initial=initial,
        eval_initial=eval_initial,
        accumulate=jax.jit(gradient_lib.accumulate, donate_argnums=0),
        add=jax.jit(lambda first, second: jax.tree.map(jnp.add, first, second), donate_argnums=0),
        apply=jax.jit(
            functools.partial(_apply, optimizer=optimizer, schedule=make_schedule(config)),
            out_shardings=(state_shardings, None),
            donate_argnums=0,
        ),
    )


@functools.cache
def _bind(function: Callable, *arguments: Any, **options: Any) -> Callable:
    """Returns `functools.partial`, the same object for the same arguments.

    jax.jit keys its caches by the function object: so a second run in one process traces nothing.
    """
    return functools.partial(function, *arguments, **options)


def _apply(
    state: TrainState,
    gradient: Any,
    metrics: loss.Metrics,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, loss.Metrics]:
    """`update.apply`, with the learning rate among the metrics."""
    rate = optimizer_lib.next_rate(state.opt_state, schedule=schedule)
    moved, metrics = gradient_lib.apply(state, gradient, metrics, optimizer=optimizer)
    return moved, metrics | {"update/learning_rate": rate}


def _needs_initial(config: Config, task: tasks.Task) -> bool:
    return task.image == "drawn" and config.srr.source == "drawn"


class _Setting(NamedTuple):
    """What all functions of a run are jitted for."""

    config: Config
    loaded: Loaded
    params: PolicyParams  # shapes of what rollouts read
    key: jax.Array
    mesh: Mesh


def _sample_fns(
    setting: _Setting, task: tasks.Task, spec: RolloutSpec
) -> tuple[SampleFns, Any, Any]:
    """The jitted halves of a rollout, rows over the mesh, and the shapes of what they give."""
    filling = _bind(prefill, setting.loaded.model, spec=spec)
    generating = _bind(generate, setting.loaded.model, spec=spec)
    given = jax.eval_shape(filling, setting.params, _input_shapes(setting, task))
    kinds = (jnp.int32, jnp.int32, jnp.float32)
    scalars = (setting.key, *(jax.ShapeDtypeStruct((), kind) for kind in kinds))
    drawn = jax.eval_shape(generating, setting.params, given, *scalars)
    drawing = SampleFns(
        *(
            jax.jit(half, out_shardings=_row_shardings(out, spec.plan, setting.mesh))
            for half, out in ((filling, given), (generating, drawn))
        )
    )
    return drawing, given, drawn


def _task_fns(setting: _Setting, task: tasks.Task, state: TrainState) -> TaskFns:
    """The jitted functions of one task."""
    config, loaded, mesh = setting.config, setting.loaded, setting.mesh
    spec = rollout_spec(config, loaded, task)
    for_eval = eval_spec(config, loaded, task)
    for_update, model = update_spec(config, loaded, task), loaded.model
    own, _, drawn = _sample_fns(setting, task, spec)
    same = dataclasses.replace(spec, rows_per_prompt=1, stochastic=False) == for_eval
    eval_drawing, *_ = _sample_fns(setting, task, for_eval)
    kept = jax.tree.map(lambda x: x.sharding, state.trainable)
    return TaskFns(
        train=own,
        eval=eval_drawing._replace(generate=own.generate) if same else eval_drawing,
        join=jax.jit(
            _bind(join_rows, shared=spec.plan.shared),
            out_shardings=_row_shardings(drawn[0], spec.plan, mesh),
        ),
        forward=jax.jit(_bind(gradient_lib.forward, model=model, spec=for_update)),
        reference=jax.jit(_bind(gradient_lib.reference_log_probs, model=model, spec=for_update)),
        count=jax.jit(_bind(gradient_lib.count_normalizers, spec=for_update)),
        entropy=jax.jit(gradient_lib.join_entropy),
        backward=jax.jit(_bind(gradient_lib.backward, spec=for_update), out_shardings=(kept, None)),
    )


def _input_shapes(setting: _Setting, task: tasks.Task) -> tuple[TextBlock | ImageBlock, ...]:
    """Shapes of the inputs of one training micro-batch; of other sizes, the shardings are alike."""
    config, loaded = setting.config, setting.loaded
    count = config.rollout.micro_batch // config.train.group_size
    templates = iter(task.texts)
    height, width = config.model.height, config.model.width
    blocks: list[TextBlock | ImageBlock] = []
    for kind in task.inputs:
        if kind == tasks.TEXT:
            added = prompts.added_tokens(next(templates), loaded.tokenizer)
            shape = (count, config.rollout.prompt_tokens + added)
            block = TextBlock(*(jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, bool)))
        else:
            image = jax.ShapeDtypeStruct((count, height, width, 3), jnp.uint8)
            block = jax.eval_shape(_bind(image_block, loaded.model), image)
        blocks.append(block)
    return tuple(blocks)


def sampling_weights(
    base: dict, trainable: Any, *, scale: float | None, merge_lora: bool
) -> PolicyParams:
    """The weights of rollouts under a train state."""
    params = gradient_lib.policy_params(base, trainable, lora_scale=scale)
    return sampling_params(params, merge_lora=merge_lora)


def _row_shardings(tree: Any, plan: tasks.Plan, mesh: Mesh) -> Any:
    """Shardings of a rollout's arrays: rows over the mesh, what all rows share whole."""
    whole = sharding.replicated(mesh)
    rows = map_rows(lambda axis, x: sharding.batch_sharding(mesh, axis), tree, shared=plan.shared)
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.sharding.Sharding) else whole, rows
    )
