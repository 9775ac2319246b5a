"""The least work of stages: counted by hand, and held against traced programs."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
import tiny_world
from default_options import DEFAULT

from alphagrpo_jax import config_checks
from alphagrpo_jax.config import Config
from alphagrpo_jax.flow.guidance import is_active
from alphagrpo_jax.models import lora
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.flops import attention_flops, decoder_flops, layer_weights
from alphagrpo_jax.models.layers import matmul
from alphagrpo_jax.ops.log_probs import LOGIT_POSITIONS
from alphagrpo_jax.planning import compiling, fit, minimum, model, report, targets
from alphagrpo_jax.planning import stages as stages_lib
from alphagrpo_jax.planning.chips import CHIPS
from alphagrpo_jax.planning.flops import count_flops
from alphagrpo_jax.planning.minimum import Elements, Minimum, Pass, Products
from alphagrpo_jax.planning.stages import EVALUATION, ROLLOUT, UPDATE, PlanStage
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.sampling.image import noise_levels

# Sizes of the tests' model, whose vocabulary is counted: width 32, 4 heads of 8, 2 of them keys'.
LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
DOWN = 48 * 32
# Beside the products and of the least's size: biases of q, k and v, norms.
VECTORS = 32 + 2 * 16 + 2 * 32 + 2 * 8
APART = {
    "train.old_logprob": "self", "train.micro_batch": 2, "train.text_chunk": 0,
    "train.image_steps_at_once": False, "train.merge_lora": False, "rollout.merge_lora": False,
    "train.keep_residuals": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    return tiny_world.write_all(tmp_path_factory.mktemp("world"))


def planned(world: pathlib.Path, **changes) -> tuple[stages_lib.PlannedRun, dict[str, PlanStage]]:
    return _planned(world, tuple(changes.items()))


@functools.cache
def _planned(
    world: pathlib.Path, changes: tuple
) -> tuple[stages_lib.PlannedRun, dict[str, PlanStage]]:
    config = config_checks.from_config_dict(tiny_world.config(world))
    config = config_checks.change_options(
        config, {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1} | dict(changes)
    )
    mesh = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        loaded, _ = model.abstract_model(config, mesh)
        run = stages_lib.make_plan(config, loaded, mesh)
        return run, {stage.name: stage for stage in stages_lib.stages(run, evaluation=False)}


def traced_flops(run: stages_lib.PlannedRun, stage: PlanStage) -> float:
    with jax.set_mesh(run.mesh):
        traced = stage.function.trace(*stage.arguments)
    return count_flops(traced.jaxpr, while_steps=stage.while_steps)


# --------------------------------------------------------------------- arithmetic
def small_model() -> BagelConfig:
    return tiny_world.model().config


def test_matrices_are_counted_by_expert():
    loaded = tiny_world.model()
    rank = 3
    path = "language_model/layers/mlp/down_proj"
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), loaded.base, path, rank))
    counts = minimum.products(loaded.base, adapters)
    head = 32 * loaded.config.llm.vocab_size
    added = 2 * rank * (48 + 32)
    assert counts.und == Elements(2 * LAYER, 0, added, last=2 * (DOWN + rank * 32))
    assert counts.gen == Elements(2 * LAYER, 0, 0, last=2 * DOWN)
    assert counts.head == Elements(head)
    assert counts.und.frozen == layer_weights(loaded.config)
    whole = minimum.products(loaded.base, {"lm_head": loaded.base["lm_head"]})
    assert whole.head == Elements(0, trained=head)
    assert whole.und == Elements(2 * LAYER, last=2 * DOWN)


# One pass of two rows: 10 tokens of text behind 7 cached ones, on average 5 among themselves.
TEXT = Pass(1.0, rows=2, und=10, gen=0, context=7, among=5, logits=10)
COUNTS = Products(Elements(100, 0, 6, last=30), Elements(1000), Elements(50))


def test_a_forward_pass_multiplies_every_matrix_once():
    config = small_model()
    attention = 4 * 2 * 32 * 2 * 10 * (7 + 5)  # layers, width, rows, tokens, keys
    expected = 2 * 2 * 10 * (106 + 50) + attention
    assert minimum.forward_flops(config, COUNTS, [TEXT]) == expected
    assert attention == attention_flops(config, 2, 10, 12)
    image = Pass(3.0, rows=2, und=2, gen=4, context=7, among=6)
    expected = 3 * (2 * 2 * (2 * 106 + 4 * 1000) + 4 * 2 * 32 * 2 * 6 * 13)
    assert minimum.forward_flops(config, COUNTS, [image]) == expected
    plain = Products(*(Elements(float(layer_weights(config))) for _ in range(2)), Elements())
    whole = image._replace(times=1.0, und=0)
    assert minimum.forward_flops(config, plain, [whole._replace(among=4)]) == decoder_flops(
        config, 2, 4, 7
    )


@pytest.mark.parametrize(
    ("remat", "weights", "attended", "head"),
    [
        # Forward and derivative by the input: frozen 2, adapters 3. Attention: two products
        # forward; backward two with the context's seven keys, and four with five new ones.
        (None, 2 * 100 + 3 * 6, 12 + 7 + 10, 2 * 50),
        ("none", 2 * 100 + 3 * 6, 12 + 7 + 10, 2 * 50),
        ("dots", 2 * 100 + 3 * 6, 2 * 12 + 7 + 10, 2 * 50),
        # Once more, but for the last product of a layer.
        ("full", 3 * 100 + 4 * 6 - 30, 2 * 12 + 7 + 10, 3 * 50),
    ],
)
def test_a_gradient_multiplies_what_its_rematerialization_says(remat, weights, attended, head):
    expected = 2 * 2 * 10 * (weights + head) + 4 * 2 * 32 * 2 * 10 * attended
    assert minimum.gradient_flops(small_model(), COUNTS, [TEXT], remat) == expected


def test_logits_of_a_long_text_are_always_computed_again():
    many = LOGIT_POSITIONS + 1
    text = Pass(1.0, rows=1, und=0, gen=0, context=0, among=0, logits=many)
    for remat, times in ((None, 2), ("none", 3), ("dots", 3), ("full", 3)):
        flops = minimum.gradient_flops(small_model(), COUNTS, [text], remat)
        assert flops == 2 * many * 50 * times, remat


def test_what_is_trained_has_a_derivative_of_its_own():
    assert Elements(trained=10).gradient(0) == 30
    assert Elements(trained=10).gradient(1) == 40


# ------------------------------------------------------------------------- stages
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_programs_do_little_more_than_the_least(world, remat):
    run, stages = planned(world, **APART, **{"model.remat": remat})
    for name in ("write_text", "gradient"):
        ratio = traced_flops(run, stages[name]) / stages[name].minimum.flops
        # Besides, latents are read in and out, and a slot of the text predicts nothing.
        assert 1.0 <= ratio < 1.06, name
    least = stages["gradient"].minimum
    assert (least.flops == least.model_flops) == (remat == "none")
    assert stages["prefill"].minimum == Minimum()


def test_velocities_of_finished_images_have_no_branches_and_an_average(world):
    changes = {
        "loss.image": "nft",
        "rollout.sampler": "ode",
        "optimizer.average_limit": 0.3,
        "rollout.guidance.text_scale": 4.0,
        "rollout.guidance.interval": (0.0, 1.0),
    }
    run, stages = planned(world, **APART, **changes)
    for name in ("average", "gradient"):
        ratio = traced_flops(run, stages[name]) / stages[name].minimum.flops
        assert 1.0 <= ratio < 1.1, name
    average, gradient = stages["average"].minimum, stages["gradient"].minimum
    assert 0 < average.model_flops < gradient.model_flops / 2
    held = stages["gradient"].alive["fixed outputs"]  # of all rows, float32
    values = run.config.rollout.window * 4 * run.loaded.config.latent_width
    assert held == 4 * values * run.config.trajectories


def test_a_sum_of_adapters_and_weights_costs_more_than_the_least(world):
    """`train.merge_lora` takes the derivatives by whole matrices."""
    run, stages = planned(world, **APART | {"train.merge_lora": True})
    ratio = traced_flops(run, stages["gradient"]) / stages["gradient"].minimum.flops
    assert ratio > 1.1


def test_two_functions_of_an_update_do_what_one_does(world):
    _, one = planned(world, **APART)
    run, two = planned(world, **APART | {"train.old_logprob": "recompute", "loss.report_kl": True})
    forward, backward = two["forward"].minimum, two["backward"].minimum
    assert forward.flops + backward.flops == pytest.approx(one["gradient"].minimum.flops)
    assert (forward.model_flops, backward.flops > 0) == (0, True)
    assert backward.model_flops == one["gradient"].minimum.model_flops
    assert two["reference"].minimum.flops == 0
    base = minimum.products(run.loaded.base, None)
    adapters = minimum.products(run.loaded.base, run.state.trainable)
    assert two["reference"].minimum.model_flops < forward.flops
    assert base.und.forward < adapters.und.forward
    _, rebuilt = planned(world, **APART | {"train.context_gradient": True})
    assert rebuilt["gradient"].minimum.flops == 0
    assert rebuilt["gradient"].minimum.model_flops == one["gradient"].minimum.model_flops


def test_image_steps_count_their_branches(world):
    interval = (0.5, 1.0)
    changes = {"rollout.guidance.text_scale": 4.0, "rollout.guidance.interval": interval}
    run, stages = planned(world, **APART, **changes)
    config = run.config
    levels = noise_levels(config.rollout)[:-1]
    guided = sum(is_active(config.rollout.guidance, level) for level in levels)
    assert 0 < guided < len(levels)
    # Slots of the system prompt, the prompt and the text; the second branch has the first alone.
    pieces = stages["gradient"].arguments[3].rollout.pieces
    lengths = [sum(s.valid.shape[1] for s in piece.segments) for piece in pieces]
    rows = stages["draw"].rows
    counts = minimum.products(run.loaded.base, run.params.lora)
    latents = 4

    def step(context: int) -> float:
        tokens = 2 * rows * (2 * counts.und.forward + latents * counts.gen.forward)
        return tokens + attention_flops(run.loaded.config, rows, latents + 2, context + latents + 2)

    assert len(lengths) == 3
    plain, dropped = sum(lengths), lengths[0]
    expected = len(levels) * step(plain) + guided * step(dropped)
    assert stages["draw"].minimum.flops == pytest.approx(expected)


def test_a_token_reads_its_experts_weights_and_its_caches(world):
    run, stages = planned(world, **APART)
    config = run.config
    least = stages["write_text"].minimum
    head = 32 * run.loaded.config.llm.vocab_size
    adapters = minimum.products(run.loaded.base, run.params.lora).und.adapters
    assert adapters > 0
    assert least.token_weights == 4 * (2 * (LAYER + VECTORS) + adapters + head)
    in_half = minimum.token_weights(run.params, jnp.dtype("bfloat16"))
    assert in_half == least.token_weights / 2
    context, steps = stages["write_text"].arguments[1], config.rollout.text_tokens + 1
    slot = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    prompts, rows = config.train.prompts_per_step, config.trajectories
    (segment,) = context.segments
    assert segment.valid.shape[0] == prompts
    cached = slot * (prompts * segment.valid.shape[1] + rows * (steps + 1) / 2)
    assert least.token_caches == pytest.approx(cached)
    _, merged = planned(world, **APART | {"rollout.merge_lora": True})
    assert merged["write_text"].minimum.token_weights == 4 * (2 * (LAYER + VECTORS) + head)


def test_images_of_an_iteration(world):
    assert stages_lib.images(DEFAULT) == DEFAULT.trajectories
    mixed = {"task": "mixed", "mixed.batches": 4, "mixed.tasks": ("rt2i", "ti2t")}
    mixed |= {"mixed.weights": (3, 1), "data.answer_train": "a", "data.answer_heldout": "b"}
    config = config_checks.change_options(DEFAULT, mixed)
    assert stages_lib.images(config) == 3 * DEFAULT.trajectories


# -------------------------------------------------------------------------- FLOPs
def test_products_that_nothing_needs_are_not_counted():
    """The derivative by a frozen weight is traced, and no compiler keeps it."""
    frozen = jnp.ones((2, 4, 4))

    def layers(x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda y, w: (jnp.tanh(matmul(y, w, None)), None))
        return jax.lax.scan(step, x, frozen)[0].sum()

    x, product = jnp.ones((3, 4)), 2 * 3 * 4 * 4
    traced = jax.jit(jax.grad(layers)).trace(x).jaxpr
    assert count_flops(traced, while_steps=1) == 2 * 3 * product


# ------------------------------------------------------------------------- report
def needs(name: str, part: str, calls: float, least: Minimum, **compiled) -> fit.StageNeeds:
    stage = PlanStage(name, part, None, (), {"weights": 1e9}, calls, minimum=least)
    zero = compiling.Compiled(0, 0, 0, 0, 0, 0, {}, 0, 0, {}, 0.0)
    return fit.StageNeeds(stage, dataclasses.replace(zero, **compiled), 0.0)


def example(config: Config = DEFAULT) -> list[fit.StageNeeds]:
    peak = CHIPS["v5p"].flops
    text = Minimum(1.0, 0.25 * peak, token_weights=10e9, token_caches=2e9)
    return [
        needs("write_text", ROLLOUT, 1, text, memory_traffic=CHIPS["v5p"].memory_rate,
              step_memory_traffic=15e9),
        needs("gradient", UPDATE, 3, Minimum(0.8 * peak, 0.5 * peak), flops=peak),
        needs("eval_draw", EVALUATION, 9, Minimum(peak, peak), flops=peak),
    ]  # fmt: skip


def target(*, exact: bool = True) -> targets.Target:
    return targets.Target("v5p:2x2x1", CHIPS["v5p"], (1, 2), (0, 0), exact=exact, compiler="c 1")


def test_the_plan_tells_ratios_and_speed():
    text, gradient, _ = report.minimum_lines(example(), DEFAULT, exact=True)
    assert "15.00 GB moved, 1.25 x the 12.00 that must be read" in text
    assert "(weights 10.00, caches 2.00)" in text
    assert "459.0 TFLOP, 1.25 x the 367.2 of the arithmetic" in gradient
    assert f"model.remat={DEFAULT.model.remat}" in gradient
    assert len(report.minimum_lines(example(), DEFAULT, exact=False)) == 2
    # Four seconds: one of text, three of gradients; arithmetic takes 0.25 + 3 x 0.5 of them.
    speed = report.speed_line(example(), target(), images=96)
    assert "24, 12 per chip" in speed
    assert "44% (" in speed
    assert "1.75 s at the chips' peak" in speed
    content = report.as_json(example(), target(), {"data": 2}, [], images=96)
    assert content["images"] == 96
    assert content["images_per_second"] == pytest.approx(24)
    assert content["images_per_second_per_chip"] == pytest.approx(12)
    assert content["arithmetic_seconds"] == pytest.approx(1.75)
    assert content["arithmetic_share"] == pytest.approx(1.75 / 4)
    stages = content["stages"]
    assert stages["write_text"]["token_bytes_ratio"] == pytest.approx(1.25)
    assert stages["write_text"]["least_weight_bytes_per_token"] == 10e9
    assert stages["write_text"]["least_cache_bytes_per_token"] == 2e9
    assert stages["gradient"]["flops_ratio"] == pytest.approx(1.25)
    assert stages["gradient"]["least_flops"] == pytest.approx(0.8 * CHIPS["v5p"].flops)


def test_estimates_and_refused_functions_have_no_such_numbers():
    content = report.as_json(example(), target(exact=False), {"data": 2}, [], images=96)
    assert content["stages"]["write_text"]["token_bytes_ratio"] is None
    refused = [*example(), needs("apply", UPDATE, 1, Minimum(), too_large=1e12)]
    assert "not known" in report.speed_line(refused, target(), images=96)
    content = report.as_json(refused, target(), {"data": 2}, [], images=96)
    assert (content["images_per_second"], content["arithmetic_share"]) == (None, None)
    assert content["stages"]["apply"]["flops_ratio"] is None
