"""Jits every device-side function of a run, once, with its shardings."""

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
from alphagrpo_jax.models.bagel_weights import LoadedModel
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
from alphagrpo_jax.types import ImageBlock, TextBlock, TrainState, join_rows, map_rows


class SampleFns(NamedTuple):
    """The jitted halves of a rollout."""

    prefill: Callable
    generate: Callable


class TaskFns(NamedTuple):
    """The jitted functions of one task; each compiles once."""

    train: SampleFns  # of a training micro-batch
    eval: SampleFns  # its `generate` is that of training where evaluation samples alike
    join: Callable  # micro-batches of rollouts -> one
    forward: Callable
    reference: Callable
    count: Callable
    entropy: Callable  # of all micro-batches of a batch, from their old log-probs
    backward: Callable


class CompiledFns(NamedTuple):
    """The jitted functions of a run."""

    weights: Callable  # base, trainable -> what rollouts read
    tasks: dict[str, TaskFns]
    initial: SampleFns | None  # initial images of refining tasks, several per prompt
    eval_initial: SampleFns | None  # one per prompt
    accumulate: Callable
    add: Callable  # gradients of two batches
    copy: Callable  # a train state
    apply_gradient: Callable


def compile_fns(
    config: Config,
    loaded: LoadedModel,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> CompiledFns:
    """Jits every device-side function of a run with its shardings; compiles at the first call.

    Args:
      config: the run's.
      loaded: the pretrained model.
      state: for its structure and shardings.
      optimizer: applied to the gradient.
      mesh: the devices.
    """
    weights = _bind(
        sampling_weights, scale=lora_scale(config), merge_lora=config.rollout.merge_lora
    )
    params = jax.eval_shape(weights, loaded.base, state.trainable)
    shared = _Shared(config, loaded, params, state.key, mesh)
    trained_tasks = {name: tasks.TASKS[name] for name in config.tasks}
    initial = eval_initial = None
    if any(_needs_initial(config, task) for task in trained_tasks.values()):
        plain = tasks.TASKS["t2i"]
        initial, *_ = _sample_fns(shared, plain, initial_spec(config, loaded))
        eval_initial, *_ = _sample_fns(shared, plain, eval_spec(config, loaded, plain))
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return CompiledFns(
        weights=jax.jit(weights) if config.rollout.merge_lora else weights,
        tasks={name: _task_fns(shared, task, state) for name, task in trained_tasks.items()},
        initial=initial,
        eval_initial=eval_initial,
        accumulate=jax.jit(gradient_lib.accumulate, donate_argnums=0),
        add=jax.jit(lambda first, second: jax.tree.map(jnp.add, first, second), donate_argnums=0),
        copy=jax.jit(lambda state: jax.tree.map(jnp.copy, state)),
        apply_gradient=jax.jit(
            functools.partial(
                _apply, optimizer=optimizer, schedule=optimizer_lib.make_schedule(config.optimizer)
            ),
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
    """Applies `gradient.apply_gradient`, and adds the learning rate to the metrics."""
    rate = optimizer_lib.next_rate(state.opt_state, schedule=schedule)
    new_state, metrics = gradient_lib.apply_gradient(state, gradient, metrics, optimizer=optimizer)
    return new_state, metrics | {"update/learning_rate": rate}


def _needs_initial(config: Config, task: tasks.Task) -> bool:
    return task.image == "drawn" and config.srr.source == "drawn"


class _Shared(NamedTuple):
    """Arguments that all jitted functions of a run share."""

    config: Config
    loaded: LoadedModel
    params: PolicyParams  # shapes of the weights that rollouts read
    key: jax.Array
    mesh: Mesh


def _sample_fns(shared: _Shared, task: tasks.Task, spec: RolloutSpec) -> tuple[SampleFns, Any, Any]:
    """Jits the halves of a rollout, rows over the mesh; returns the shapes of their results too."""
    prefill_fn = _bind(prefill, shared.loaded.model, spec=spec)
    generate_fn = _bind(generate, shared.loaded.model, spec=spec)
    prefix = jax.eval_shape(prefill_fn, shared.params, _input_shapes(shared, task))
    dtypes = (jnp.int32, jnp.int32, jnp.float32)
    scalars = (shared.key, *(jax.ShapeDtypeStruct((), dtype) for dtype in dtypes))
    rollout = jax.eval_shape(generate_fn, shared.params, prefix, *scalars)
    fns = SampleFns(
        *(
            jax.jit(fn, out_shardings=_row_shardings(result, spec.plan, shared.mesh))
            for fn, result in ((prefill_fn, prefix), (generate_fn, rollout))
        )
    )
    return fns, prefix, rollout


def _task_fns(shared: _Shared, task: tasks.Task, state: TrainState) -> TaskFns:
    """Jits the functions of one task."""
    config, loaded, mesh = shared.config, shared.loaded, shared.mesh
    spec = rollout_spec(config, loaded, task)
    evaluation_spec = eval_spec(config, loaded, task)
    gradient_spec, model = update_spec(config, loaded, task), loaded.model
    train_fns, _, rollout = _sample_fns(shared, task, spec)
    eval_fns, *_ = _sample_fns(shared, task, evaluation_spec)
    # One compilation less where evaluation samples as training does: `generate` takes rows as they
    # come, and no step is stochastic when the window starts at the end of the schedule.
    if dataclasses.replace(spec, rows_per_prompt=1, stochastic=False) == evaluation_spec:
        eval_fns = eval_fns._replace(generate=train_fns.generate)
    state_shardings = jax.tree.map(lambda x: x.sharding, state.trainable)
    return TaskFns(
        train=train_fns,
        eval=eval_fns,
        join=jax.jit(
            _bind(join_rows, shared=spec.plan.shared),
            out_shardings=_row_shardings(rollout[0], spec.plan, mesh),
        ),
        forward=jax.jit(_bind(gradient_lib.forward, model=model, spec=gradient_spec)),
        reference=jax.jit(_bind(gradient_lib.reference_log_probs, model=model, spec=gradient_spec)),
        count=jax.jit(_bind(gradient_lib.count_normalizers, spec=gradient_spec)),
        entropy=jax.jit(gradient_lib.join_entropy),
        backward=jax.jit(
            _bind(gradient_lib.backward, spec=gradient_spec), out_shardings=(state_shardings, None)
        ),
    )


def _input_shapes(shared: _Shared, task: tasks.Task) -> tuple[TextBlock | ImageBlock, ...]:
    """Returns the shapes of the inputs of one training micro-batch.

    Shardings do not depend on the number of rows, so that evaluation's may differ.
    """
    config, loaded = shared.config, shared.loaded
    count = config.rollout.micro_batch // config.train.group_size
    templates = iter(task.texts)
    height, width = config.model.height, config.model.width
    blocks: list[TextBlock | ImageBlock] = []
    for kind in task.inputs:
        if kind == tasks.TEXT:
            added = prompts.added_tokens(next(templates), loaded.tokenizer)
            shape = (count, config.rollout.prompt_tokens + added)
            # Shapes in place of arrays.
            leaves: Any = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool)]
            block = TextBlock(*leaves)
        else:
            image = jax.ShapeDtypeStruct((count, height, width, 3), jnp.uint8)
            block = jax.eval_shape(_bind(image_block, loaded.model), image)
        blocks.append(block)
    return tuple(blocks)


def sampling_weights(
    base: dict, trainable: Any, *, scale: float | None, merge_lora: bool
) -> PolicyParams:
    """Returns the weights of rollouts under a train state."""
    params = gradient_lib.policy_params(base, trainable, lora_scale=scale)
    return sampling_params(params, merge_lora=merge_lora)


def _row_shardings(tree: Any, plan: tasks.Plan, mesh: Mesh) -> Any:
    """Returns the shardings of a rollout's arrays: rows over the mesh, shared arrays replicated."""
    replicated = sharding.replicated(mesh)
    rows = map_rows(lambda axis, x: sharding.batch_sharding(mesh, axis), tree, shared=plan.shared)
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.sharding.Sharding) else replicated, rows
    )
