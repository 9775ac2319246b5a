"""Jits every device-side function of a run, once, with its shardings."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from alphagrpo_jax import prompts, tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.losses.terms import Metrics
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.models.kv_cache import Segment
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.sampling import trajectory
from alphagrpo_jax.sampling.contexts import image_block
from alphagrpo_jax.sampling.trajectory import RolloutSpec, merged_params
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import optimizer as optimizer_lib
from alphagrpo_jax.training import update_loss
from alphagrpo_jax.training.options import (
    eval_spec,
    initial_spec,
    lora_scale,
    rollout_spec,
    update_spec,
)
from alphagrpo_jax.types import ImageBlock, Piece, Rollout, TextBlock, TrainState, row_count


class ImageFns(NamedTuple):
    """The jitted functions of an image step."""

    contexts: Callable  # of a micro-batch
    sample: Callable
    absorb: Callable | None  # what the images add to the contexts of later steps
    join: Callable  # micro-batches to all rows


class TextFns(NamedTuple):
    """The jitted functions of a text step."""

    context: Callable  # of all rows
    sample: Callable
    cut: Callable  # rollout, static length


class SampleFns(NamedTuple):
    """The jitted functions of a rollout."""

    spec: RolloutSpec
    prefill: Callable
    steps: tuple[TextFns | ImageFns, ...]  # one per step of the plan


class TaskFns(NamedTuple):
    """The jitted functions of one task; each compiles once per bucket of lengths."""

    train: SampleFns
    eval: SampleFns
    forward: Callable
    reference: Callable
    average: Callable  # velocities under the average of the trained weights
    count: Callable
    entropy: Callable  # of all micro-batches of a batch, from their old log-probs
    backward: Callable
    gradient: Callable  # `forward` and `backward` in one, where old log-probs are the new ones


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
        initial = _sample_fns(shared, plain, initial_spec(config, loaded))
        eval_initial = _sample_fns(shared, plain, eval_spec(config, loaded, plain))
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return CompiledFns(
        weights=jax.jit(weights) if config.rollout.merge_lora else weights,
        tasks={name: _task_fns(shared, task, state) for name, task in trained_tasks.items()},
        initial=initial,
        eval_initial=eval_initial,
        # The metrics stay: the host waits for those of a micro-batch.
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
    metrics: Metrics,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, Metrics]:
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


def _sample_fns(shared: _Shared, task: tasks.Task, spec: RolloutSpec) -> SampleFns:
    """Jits the functions of a rollout, rows over the mesh."""
    model, mesh = shared.loaded.model, shared.mesh
    config = shared.config
    inputs = input_shapes(config, shared.loaded, task, config.train.prompts_per_step)
    prefill_fn = _bind(trajectory.prefill, model, spec=spec)
    rollout = jax.eval_shape(prefill_fn, shared.params, inputs)
    jitted_prefill = _jitted(prefill_fn, row_shardings(rollout, mesh))
    layout = spec.layout(row_count(inputs) * spec.rows_per_prompt)
    fns: list[TextFns | ImageFns] = []
    for step in spec.plan.steps:
        add = _text_fns if step.kind != tasks.IMAGE else _image_fns
        step_fns, rollout = add(shared, spec, step, layout, rollout)
        fns.append(step_fns)
    return SampleFns(spec, jitted_prefill, tuple(fns))


def _text_fns(
    shared: _Shared, spec: RolloutSpec, step: tasks.PlannedStep, layout: RowLayout, rollout: Rollout
) -> tuple[TextFns, Rollout]:
    """Jits a text step; returns the shapes of the rollout behind it, too."""
    model, mesh, params = shared.loaded.model, shared.mesh, shared.params
    context_fn = _bind(trajectory.text_context, model, step=step, spec=spec)
    ctx, pieces = jax.eval_shape(context_fn, params, rollout)
    sample_fn = _bind(
        trajectory.write_text, model, max_tokens=spec.options.text_tokens, top_p=spec.options.top_p
    )
    number, rows = jax.ShapeDtypeStruct((), jnp.int32), _numbers(layout.rows)
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    written = jax.eval_shape(sample_fn, params, ctx, shared.key, number, rows, temperature)
    after = jax.eval_shape(_bind(trajectory.add_text, step=step), rollout, *written, pieces)
    cut_fn = _bind(trajectory.cut_text, step=step)
    fns = TextFns(
        _jitted(context_fn, row_shardings((ctx, pieces), mesh)),
        _jitted(sample_fn, row_shardings(written, mesh)),
        jax.jit(cut_fn, static_argnums=1, out_shardings=row_shardings(after, mesh)),
    )
    return fns, after


def _image_fns(
    shared: _Shared, spec: RolloutSpec, step: tasks.PlannedStep, layout: RowLayout, rollout: Rollout
) -> tuple[ImageFns, Rollout]:
    """Jits an image step; returns the shapes of the rollout behind it, too."""
    model, mesh, params = shared.loaded.model, shared.mesh, shared.params
    place = {"step": step, "spec": spec}
    number, rows = jax.ShapeDtypeStruct((), jnp.int32), _numbers(layout.micro_batch)
    contexts_fn = _bind(trajectory.image_contexts, model, **place)
    contexts, pieces = jax.eval_shape(contexts_fn, params, rollout, number)
    sample_fn = _bind(
        trajectory.draw_image,
        model,
        options=trajectory.image_options(spec.options, step),
        grid=spec.grid,
        stochastic=spec.stochastic,
    )
    arguments = (contexts, shared.key, number, rows, rows, number)
    sample, pixels = jax.eval_shape(sample_fn, params, *arguments)
    absorb, complete = None, pieces
    if step.node is not None:
        absorb_fn = _bind(trajectory.absorb_image, model, **place)
        piece = jax.eval_shape(absorb_fn, params, rollout, pixels, pieces, number)
        absorb = _jitted(absorb_fn, row_shardings(piece, mesh))
        complete = {**pieces, step.node: piece}
    join_fn = _bind(trajectory.add_images, spec=spec)
    micro_batches = [trajectory.Images(sample, pixels, complete)] * layout.micro_batches
    after = jax.eval_shape(join_fn, rollout, micro_batches)
    fns = ImageFns(
        _jitted(contexts_fn, row_shardings((contexts, pieces), mesh)),
        _jitted(sample_fn, row_shardings((sample, pixels), mesh)),
        absorb,
        _jitted(join_fn, row_shardings(after, mesh)),
    )
    return fns, after


def _task_fns(shared: _Shared, task: tasks.Task, state: TrainState) -> TaskFns:
    """Jits the functions of one task."""
    config, loaded = shared.config, shared.loaded
    gradient_spec, model = update_spec(config, loaded, task), loaded.model
    state_shardings = jax.tree.map(lambda x: x.sharding, state.trainable)
    train_spec, evaluation_spec = (
        rollout_spec(config, loaded, task),
        eval_spec(config, loaded, task),
    )
    # Evaluation's loop over images is training's where their options agree: no step is stochastic
    # when the window starts at the end of the schedule.
    image_options = [
        [trajectory.image_options(spec.options, step) for step in spec.plan.image_steps]
        for spec in (train_spec, evaluation_spec)
    ]
    if image_options[0] == image_options[1]:
        evaluation_spec = dataclasses.replace(evaluation_spec, stochastic=True)
    return TaskFns(
        train=_sample_fns(shared, task, train_spec),
        eval=_sample_fns(shared, task, evaluation_spec),
        forward=jax.jit(_bind(gradient_lib.forward, model=model, spec=gradient_spec)),
        reference=jax.jit(_bind(gradient_lib.reference_log_probs, model=model, spec=gradient_spec)),
        average=jax.jit(_bind(gradient_lib.average_velocities, model=model, spec=gradient_spec)),
        count=jax.jit(_bind(update_loss.count_normalizers, spec=gradient_spec)),
        entropy=jax.jit(_bind(update_loss.join_entropy, layout=gradient_spec.layout)),
        backward=jax.jit(
            _bind(gradient_lib.backward, spec=gradient_spec), out_shardings=(state_shardings, None)
        ),
        gradient=jax.jit(
            _bind(gradient_lib.gradient, model=model, spec=gradient_spec),
            out_shardings=(state_shardings, None),
        ),
    )


@functools.cache
def _wrapper(function: Callable, shardings: tuple[Any, ...], structure: Any) -> Callable:
    """Jits a function once for its output shardings: tasks that share it compile it once."""
    return jax.jit(function, out_shardings=jax.tree.unflatten(structure, shardings))


def _jitted(function: Callable, shardings: Any) -> Callable:
    leaves, structure = jax.tree.flatten(shardings)
    return _wrapper(function, tuple(leaves), structure)


def _numbers(count: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of row numbers."""
    return jax.ShapeDtypeStruct((count,), jnp.int32)


def input_shapes(
    config: Config, loaded: LoadedModel, task: tasks.Task, count: int
) -> tuple[TextBlock | ImageBlock, ...]:
    """Returns the shapes of the inputs of `count` prompts, texts at their greatest length.

    Shardings do not depend on the number of prompts, so that evaluation's may differ.
    """
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
    return merged_params(params, merge_lora=merge_lora)


def row_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a rollout's arrays.

    Rows lie over the mesh, key and value heads over its tensor axis; arrays without rows, and
    those of prompts, which trajectories on all devices read, lie whole on the other axes.
    """
    replicated, ways = sharding.replicated(mesh), sharding.batch_ways(mesh)

    def of_piece(piece: Piece) -> Piece:
        rows = piece.level == "trajectory"
        segments = tuple(of_segment(segment, rows=rows) for segment in piece.segments)
        advance = sharding.batch_sharding(mesh) if rows else replicated
        return dataclasses.replace(piece, segments=segments, advance=advance)

    def of_segment(segment: Segment, *, rows: bool = True) -> Segment:
        # A segment of one row is read by the rows of all devices.
        rows = rows and segment.valid.shape[0] % ways == 0
        heads: Any = sharding.cache_sharding(mesh, segment.k.shape, rows=rows)
        valid: Any = sharding.batch_sharding(mesh) if rows else replicated
        return dataclasses.replace(segment, k=heads, v=heads, valid=valid)

    def of_node(node: Any) -> Any:
        if isinstance(node, Piece):
            return of_piece(node)
        if isinstance(node, Segment):
            return of_segment(node)
        return sharding.batch_sharding(mesh) if node.ndim else replicated

    return jax.tree.map(of_node, tree, is_leaf=lambda node: isinstance(node, Piece | Segment))
