"""The stages of a run: every function that it calls, with the shapes and places of its arguments.

A stage also says what else is alive while it runs, which no compiler of a single function knows.
Lengths are the greatest that the configuration allows, and nothing is ever computed.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alphagrpo_jax import tasks
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.planning import minimum
from alphagrpo_jax.planning.minimum import UNCOUNTED, Minimum, Pass
from alphagrpo_jax.planning.model import abstract_state, device_bytes, placed
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.sampling import trajectory
from alphagrpo_jax.sampling.contexts import with_pieces
from alphagrpo_jax.sampling.trajectory import Images
from alphagrpo_jax.tasks import Task
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training.optimizer import average_of, make_optimizer
from alphagrpo_jax.training.pacing import AHEAD
from alphagrpo_jax.training.sampling import bucket_lengths
from alphagrpo_jax.training.steps import (
    CompiledFns,
    SampleFns,
    TaskFns,
    TextFns,
    compile_fns,
    input_shapes,
    row_shardings,
)
from alphagrpo_jax.training.update_loss import FixedOutputs
from alphagrpo_jax.types import Rollout, TrainState, UpdateBatch

# Parts of a run: an iteration is its rollout, the update, and its share of initial images.
ROLLOUT, UPDATE, INITIAL, EVALUATION = "rollout", "update", "initial images", "evaluation"


@dataclasses.dataclass(frozen=True)
class PlanStage:
    """One function of a run, ready to be lowered."""

    name: str  # such as write_text, different from all others
    part: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    alive: dict[str, float]  # bytes per device by kind, the arguments included
    calls: float  # per iteration; of an evaluation's stages, per evaluation
    while_steps: int = 1  # how often its loop of unknown length runs at most
    holds: tuple[str, ...] = ()  # stages of its part whose results are alive too
    rows: int = 0  # per device, of a micro-batch; 0: all rows
    minimum: Minimum = UNCOUNTED


class PlannedRun(NamedTuple):
    """Holds what all stages of a run share."""

    config: Config
    loaded: LoadedModel
    mesh: Mesh
    fns: CompiledFns
    state: TrainState
    params: Any  # the weights that rollouts read
    resident: dict[str, float]  # bytes per device that are alive all the time, by kind


def make_plan(config: Config, loaded: LoadedModel, mesh: Mesh) -> PlannedRun:
    """Prepares the stages of a run on a mesh, `jax.set_mesh` being in force."""
    optimizer = make_optimizer(config.optimizer)
    state = abstract_state(config, loaded.base, optimizer, mesh)
    fns = compile_fns(config, loaded, state, optimizer, mesh)
    trained = "LoRA" if config.train.trainable == "lora" else "trained weights"
    resident = {
        "weights": device_bytes(loaded.base),
        trained: device_bytes(state.trainable),
        "optimizer": device_bytes(state.opt_state),
    }
    if config.rollout.merge_lora:
        params = jax.eval_shape(fns.weights, loaded.base, state.trainable)
        params = placed(params, mesh)
    else:
        params = fns.weights(loaded.base, state.trainable)
    return PlannedRun(config, loaded, mesh, fns, state, params, resident)


def stages(plan: PlannedRun, *, evaluation: bool = True) -> Iterator[PlanStage]:
    """Lists the stages of a run in the order of their first call.

    Args:
      plan: the run's.
      evaluation: False leaves out the stages of evaluations.
    """
    config = plan.config
    if config.rollout.merge_lora:
        arguments = (plan.loaded.base, plan.state.trainable)
        alive = {**plan.resident}
        yield PlanStage("merge", ROLLOUT, plan.fns.weights, arguments, alive, 1.0)
    if plan.fns.initial is not None:
        share = config.train.prompts_per_step / config.srr.queue_prompts
        walk = _Walk(plan, INITIAL, tasks.TASKS["t2i"], config.srr.queue_prompts, share, "initial_")
        yield from walk.sample(plan.fns.initial)
    training, contexts = _with_other_batches(plan), 0.0
    for name, fns in plan.fns.tasks.items():
        walk = _training_walk(training, name)
        yield from walk.sample(fns.train)
        yield from _update(training, walk.task, fns, walk.rollout, walk.calls)
        contexts = max(contexts, device_bytes(walk.rollout))
    yield from _apply(training, contexts)
    if not evaluation:
        return
    batches = -(-config.eval.prompts // config.eval.micro_batch)
    if plan.fns.eval_initial is not None:
        task, count = tasks.TASKS["t2i"], config.eval.micro_batch
        walk = _Walk(plan, EVALUATION, task, count, batches, "eval_initial_")
        yield from walk.sample(plan.fns.eval_initial)
    for name, fns in plan.fns.tasks.items():
        task, count = tasks.TASKS[name], config.eval.micro_batch
        walk = _Walk(plan, EVALUATION, task, count, batches, "eval_" + _prefix(config, name))
        yield from walk.sample(fns.eval)


def images(config: Config) -> float:
    """Counts the images of an iteration that the verifiers judge."""
    shares = _task_shares(config).items()
    steps = sum(share * tasks.TASKS[name].events.count(tasks.IMAGE) for name, share in shares)
    return config.trajectories * steps


def _training_walk(plan: PlannedRun, name: str) -> "_Walk":
    """Begins to walk through the rollout of a task's batch."""
    config = plan.config
    share, prompts = _task_shares(config)[name], config.train.prompts_per_step
    return _Walk(plan, ROLLOUT, tasks.TASKS[name], prompts, share, _prefix(config, name))


def _with_other_batches(plan: PlannedRun) -> PlannedRun:
    """Counts the trajectories of an update's other batches: they stay until its end."""
    config = plan.config
    others = config.mixed.batches - 1 if config.task == "mixed" else 0
    if others == 0:
        return plan
    largest = 0.0
    for name, fns in plan.fns.tasks.items():
        walk = _training_walk(plan, name)
        for _ in walk.sample(fns.train):
            pass
        largest = max(largest, device_bytes(walk.rollout))
    return plan._replace(resident={**plan.resident, "other batches": others * largest})


def _task_shares(config: Config) -> dict[str, float]:
    """Returns the mean number of batches of each task in an update."""
    if config.task != "mixed":
        return {config.task: 1.0}
    total = sum(config.mixed.weights)
    pairs = zip(config.mixed.tasks, config.mixed.weights, strict=True)
    return {name: config.mixed.batches * weight / total for name, weight in pairs}


def _prefix(config: Config, task: str) -> str:
    """Returns what the names of a task's stages begin with: nothing, if it is the only one."""
    return f"{task}_" if len(config.tasks) > 1 else ""


class _Walk:
    """Walks through the steps of a rollout as `training.sampling.run_steps` does."""

    def __init__(
        self, plan: PlannedRun, part: str, task: Task, prompts: int, calls: float, prefix: str
    ) -> None:
        self.plan, self.part, self.task = plan, part, task
        self.prompts, self.calls, self.prefix = prompts, calls, prefix
        self.rollout: Any = None  # shapes, of the samples so far

    def sample(self, fns: SampleFns) -> Iterator[PlanStage]:
        """Lists the stages of a rollout, and leaves its shapes in `rollout`."""
        plan = self.plan
        inputs = input_shapes(plan.config, plan.loaded, self.task, self.prompts)
        everywhere = sharding.replicated(plan.mesh)
        inputs = jax.tree.map(lambda x: _shape(x, everywhere), inputs)
        arguments = (plan.params, inputs)
        yield self._stage("prefill", fns.prefill, arguments, inputs)
        self.rollout = _results(plan, fns.prefill, *arguments)
        for step, step_fns in zip(fns.spec.plan.steps, fns.steps, strict=True):
            walk = self._text if isinstance(step_fns, TextFns) else self._image
            yield from walk(fns, step_fns, step)

    def _stage(
        self, name: str, function: Any, arguments: tuple, *alive: Any, calls: int = 1, **more: Any
    ) -> PlanStage:
        kinds = {**self.plan.resident, "contexts": device_bytes(alive)}
        if self.plan.config.rollout.merge_lora:
            kinds["merged weights"] = device_bytes(self.plan.params)
        return PlanStage(
            self.prefix + name, self.part, function, arguments, kinds, self.calls * calls, **more
        )

    def _least(self, passes: Iterable[Pass], real: float) -> Minimum:
        """Returns the least work of a call that samples, a share `real` of whose rows count."""
        params, model = self.plan.params, self.plan.loaded.config
        flops = minimum.forward_flops(model, minimum.products(params.base, params.lora), passes)
        return _per_device(self.plan, flops, flops * real)

    def _text(self, fns: SampleFns, step_fns: Any, step: Any) -> Iterator[PlanStage]:
        plan = self.plan
        layout = fns.spec.layout(self.prompts * fns.spec.rows_per_prompt)
        arguments: tuple = (plan.params, self.rollout)
        yield self._stage("text_context", step_fns.context, arguments, self.rollout)
        ctx, pieces = _results(plan, step_fns.context, *arguments)
        temperature = _number(plan.mesh, jnp.float32)
        rows = _rows(plan.mesh, layout.rows)
        arguments = (plan.params, ctx, plan.state.key, _number(plan.mesh), rows, temperature)
        steps = fns.spec.options.text_tokens + 1
        alive = (self.rollout, ctx, pieces)
        written = _results(plan, step_fns.sample, *arguments)
        all_pieces = with_pieces(self.rollout.pieces, pieces)
        written_work = minimum.written_text(layout.rows, steps, all_pieces, step)
        least = dataclasses.replace(
            self._least([written_work], layout.count / layout.rows),
            token_weights=minimum.token_weights(plan.params, jnp.dtype(plan.config.model.dtype)),
            token_caches=minimum.token_caches(ctx, written[1], steps),
        )
        more = {"while_steps": steps, "minimum": least}
        yield self._stage("write_text", step_fns.sample, arguments, *alive, **more)
        add = functools.partial(trajectory.add_text, step=step)
        self.rollout = _results(plan, add, self.rollout, *written, pieces)
        buckets = bucket_lengths(steps + 1, plan.config.rollout.length_buckets)
        if len(buckets) > 1:
            arguments = (self.rollout, buckets[-2])
            yield self._stage("cut_text", step_fns.cut, arguments, self.rollout)

    def _image(self, fns: SampleFns, step_fns: Any, step: Any) -> Iterator[PlanStage]:
        plan = self.plan
        layout = fns.spec.layout(self.prompts * fns.spec.rows_per_prompt)
        count, number = layout.micro_batches, _number(plan.mesh)
        more: dict[str, Any] = {"calls": count, "rows": layout.micro_rows}
        arguments: tuple = (plan.params, self.rollout, number)
        contexts, pieces = _results(plan, step_fns.contexts, *arguments)
        rows = _rows(plan.mesh, layout.micro_batch)
        draw = (plan.params, contexts, plan.state.key, number, rows, rows, number)
        sample, pixels = _results(plan, step_fns.sample, *draw)
        absorbed = {}
        if step_fns.absorb is not None:
            absorb = (plan.params, self.rollout, pixels, pieces, number)
            absorbed = {step.node: _results(plan, step_fns.absorb, *absorb)}
        images = Images(sample, pixels, {**pieces, **absorbed})
        before = [images] * (count - 1)  # the last micro-batch has all others beside it
        yield self._stage(
            "image_contexts", step_fns.contexts, arguments, self.rollout, before, **more
        )
        alive = (self.rollout, before, contexts, pieces)
        all_pieces = with_pieces(self.rollout.pieces, pieces)
        passes = minimum.image_steps(layout.micro_batch, fns.spec, all_pieces, step, trained=False)
        least = self._least(passes, layout.count / (layout.micro_batch * count))
        yield self._stage("draw", step_fns.sample, draw, *alive, minimum=least, **more)
        if step_fns.absorb is not None:
            alive = (self.rollout, before, pieces, sample, pixels)
            yield self._stage("absorb_image", step_fns.absorb, absorb, *alive, **more)
        arguments = (self.rollout, [images] * count)
        yield self._stage("join", step_fns.join, arguments, *arguments)
        self.rollout = _results(plan, step_fns.join, *arguments)


def _per_device(plan: PlannedRun, flops: float, model_flops: float) -> Minimum:
    return Minimum(flops / plan.mesh.size, model_flops / plan.mesh.size)


class _LeastWork(NamedTuple):
    """The least work of the functions of an update."""

    gradient: Minimum
    reference: Minimum
    average: Minimum
    forward: Minimum
    backward: Minimum


def _update_minimum(plan: PlannedRun, task: Task, rollout: Rollout) -> _LeastWork:
    """Computes the least work of an update's functions on a micro-batch.

    Where contexts are computed again, that is no part of it, and there is no ratio.
    """
    spec, model = options_lib.update_spec(plan.config, plan.loaded, task), plan.loaded.config
    layout, base = spec.layout, plan.loaded.base
    passes = minimum.trained_passes(layout.micro_batch, spec, rollout)
    elements = minimum.products(base, plan.state.trainable)
    real = layout.count / (layout.micro_batch * layout.micro_batches)
    forward = minimum.forward_flops(model, elements, passes)
    gradient = minimum.gradient_flops(model, elements, passes, plan.config.model.remat)
    model_flops = real * minimum.gradient_flops(model, elements, passes, None)
    reference = real * minimum.forward_flops(model, minimum.products(base, None), passes)
    images_alone = dataclasses.replace(spec, loss=dataclasses.replace(spec.loss, text="none"))
    image_passes = minimum.trained_passes(layout.micro_batch, images_alone, rollout)
    average = minimum.forward_flops(model, elements, image_passes)
    average_model_flops = real * average
    if spec.rebuild_contexts:
        gradient = forward = average = 0.0
    return _LeastWork(
        gradient=_per_device(plan, gradient, model_flops),
        reference=_per_device(plan, 0.0, reference),
        average=_per_device(plan, average, average_model_flops),
        # Log-probs from before the update are those of its first pass, computed twice.
        forward=_per_device(plan, forward, 0.0),
        backward=_per_device(plan, gradient - forward, model_flops),
    )


def _update(
    plan: PlannedRun, task: Task, fns: TaskFns, rollout: Rollout, share: float
) -> Iterator[PlanStage]:
    """Lists the stages of an update on the trajectories of one task."""
    config, mesh, state = plan.config, plan.mesh, plan.state
    layout = options_lib.update_spec(config, plan.loaded, task).layout
    everywhere = sharding.replicated(mesh)
    by_row: list[Any] = [
        jax.ShapeDtypeStruct((layout.rows,), dtype, sharding=everywhere)
        for dtype in (jnp.float32, jnp.float32, bool)
    ]
    batch = UpdateBatch(rollout, *by_row)
    number, weight = _number(mesh), _number(mesh, jnp.float32)
    totals = jax.tree.map(
        lambda x: _shape(x, everywhere), jax.eval_shape(lambda x: fns.count(x, None), batch)
    )
    # The host runs ahead of the device: gradients of dispatched micro-batches have their memory.
    gradient = device_bytes(state.trainable) * min(layout.micro_batches, AHEAD + 1)
    alive = {**plan.resident, "contexts": device_bytes(batch), "gradient": gradient}
    alive |= _copied_state(plan)
    prefix = _prefix(config, task.name)
    updates = config.train.updates_per_batch
    passes, rows = share * layout.micro_batches, layout.micro_rows
    least = _update_minimum(plan, task, rollout)

    def stage(name: str, function: Any, arguments: tuple, calls: float, **more: Any) -> PlanStage:
        return PlanStage(
            prefix + name, UPDATE, function, arguments, alive, calls, rows=rows, **more
        )

    yield stage("count", fns.count, (batch, None), share * updates)
    weights = (state.trainable, plan.loaded.base)
    loss, reference, average, old = config.loss, None, None, None
    if loss.text_beta > 0 or loss.image_beta > 0 or loss.report_kl:
        arguments: tuple = (plan.loaded.base, rollout, number)
        yield stage("reference", fns.reference, arguments, passes, minimum=least.reference)
        reference = jax.eval_shape(fns.reference, *arguments)
    if loss.matches:
        average = average_of(plan.state.opt_state)
        arguments = (average, plan.loaded.base, rollout, number)
        yield stage("average", fns.average, arguments, passes, minimum=least.average)
        average = jax.eval_shape(fns.average, *arguments)
    outputs = device_bytes((reference, average)) * layout.micro_batches
    alive |= {"fixed outputs": outputs} if outputs else {}
    common = (FixedOutputs(reference, average), batch, number, totals, weight)
    if config.train.old_logprob == "self":
        arguments = (*weights, *common)
        calls = passes * updates
        yield stage("gradient", fns.gradient, arguments, calls, minimum=least.gradient)
        return
    arguments = (*weights, rollout, number)
    old, residuals = jax.eval_shape(fns.forward, *arguments)
    if config.train.keep_residuals:
        batches = config.mixed.batches if config.task == "mixed" else 1
        alive["kept residuals"] = device_bytes(residuals) * (batches * layout.micro_batches - 1)
    first_pass = 0 if config.train.keep_residuals else 1
    calls = passes * (updates + first_pass)
    yield stage("forward", fns.forward, arguments, calls, minimum=least.forward)
    arguments = (*weights, residuals, old, old, *common)
    more: dict[str, Any] = {"holds": (prefix + "forward",), "minimum": least.backward}
    yield stage("backward", fns.backward, arguments, passes * updates, **more)


def _copied_state(plan: PlannedRun) -> dict[str, float]:
    """Counts the state that stays for a stop while several optimizer steps are taken."""
    train, state = plan.config.train, plan.state
    if train.updates_per_batch == 1 or train.trainable != "lora":
        return {}
    return {"copied state": device_bytes((state.trainable, state.opt_state))}


def _apply(plan: PlannedRun, contexts: float) -> Iterator[PlanStage]:
    """Lists what adds gradients up and applies them.

    Args:
      plan: the run's.
      contexts: bytes per device of a batch's trajectories.
    """
    config, state = plan.config, plan.state
    gradient, loss_total = state.trainable, _number(plan.mesh, jnp.float32)
    size = device_bytes(gradient)
    micro_batches = options_lib.update_spec(
        config, plan.loaded, tasks.TASKS[config.tasks[0]]
    ).layout.micro_batches
    metrics: dict[str, Any] = {"loss/total": loss_total}
    pair = (gradient, metrics)
    common = {**plan.resident, "contexts": contexts, **_copied_state(plan)}
    alive = {**common, "gradient": size * min(micro_batches, AHEAD + 1)}
    updates = config.train.updates_per_batch
    if micro_batches > 1:
        calls = (micro_batches - 1) * updates
        arguments: tuple = (*pair, pair)
        yield PlanStage("accumulate", UPDATE, plan.fns.accumulate, arguments, alive, calls)
    alive = {**common, "gradient": size}
    arguments = (state, gradient, metrics)
    yield PlanStage("apply", UPDATE, plan.fns.apply_gradient, arguments, alive, updates)


def _results(plan: PlannedRun, function: Any, *arguments: Any) -> Any:
    """Returns the shapes of a rollout's arrays behind a function, with their places."""
    tree = jax.eval_shape(function, *arguments)
    return jax.tree.map(_shape, tree, row_shardings(tree, plan.mesh))


def _shape(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _number(mesh: Mesh, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=sharding.replicated(mesh))


def _rows(mesh: Mesh, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), jnp.int32, sharding=sharding.replicated(mesh))
