"""Chips, targets, FLOPs, the stages of a run, and what is made of a compiler's answers."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest
import tiny_world
from jax.sharding import PartitionSpec

from alphagrpo_jax import config_checks, plan
from alphagrpo_jax.config import Config
from alphagrpo_jax.models.bagel_7b import bagel_7b_config
from alphagrpo_jax.ops import attention
from alphagrpo_jax.planning import compiling, fit, model, report, targets
from alphagrpo_jax.planning import stages as stages_lib
from alphagrpo_jax.planning.chips import CHIPS
from alphagrpo_jax.planning.compiling import Compiled
from alphagrpo_jax.planning.flops import count_flops
from alphagrpo_jax.planning.stages import EVALUATION, INITIAL, ROLLOUT, UPDATE, PlanStage
from alphagrpo_jax.runtime import sharding
from alphagrpo_jax.runtime.errors import InputError, UsageError
from alphagrpo_jax.training import setup
from alphagrpo_jax.training.pacing import AHEAD

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIGS = [ROOT / "configs" / f"bagel_7b_{name}.py" for name in ("rt2i", "srr")]


# ------------------------------------------------------------------ chips and targets
def test_chips_are_plausible():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.source.startswith("https://")
        assert 10e9 < chip.memory < 200e9
        # Products of a few hundred rows are bound by arithmetic, those of one row by memory.
        assert 100 < chip.flops / chip.memory_rate < 1000
        assert chip.network_rate < chip.link_rate < chip.memory_rate
        assert (chip.axes > 0) == (chip.platform == "tpu")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: targets.tpu_target("v9:4x4", 1), ["v9", "v5p", "v6e"]),
        (lambda: targets.tpu_target("h200:8", 1), ["h200", "--chips"]),
        (lambda: targets.tpu_target("v5p:4x4", 1), ["3 axes"]),
        (lambda: targets.tpu_target("v5p", 1), ["v5p:4x4x4"]),
        (lambda: targets.gpu_target("b300:8"), ["b300", "a100-80g", "h200"]),
        (lambda: targets.gpu_target("v5p:8"), ["--topology"]),
        (lambda: targets.gpu_target("h200"), ["h200:8"]),
        (lambda: targets.gpu_target("h200:0"), ["NAME:NUMBER"]),
    ],
)
def test_unknown_machines_are_refused_with_the_known_ones(call, words: list[str]):
    with pytest.raises(UsageError) as error:
        call()
    assert all(word in str(error.value) for word in words)


def test_without_its_compiler_a_topology_says_what_to_install(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"\[plan\]"):
        targets.tpu_target("v5p:2x2x1", 1)


def test_a_topology_that_nobody_rents_is_refused_with_some_that_are(monkeypatch):
    def unknown(*_, **__):
        raise RuntimeError("INVALID_ARGUMENT: no such topology")

    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", unknown)
    with pytest.raises(UsageError, match=r"knows no v5p:3x3x3 \(INVALID.*v5p:4x4x4, v6e:4x4"):
        targets.tpu_target("v5p:3x3x3", 1)


# -------------------------------------------------------------------------- FLOPs
def test_flops_count_loops_as_often_as_they_run():
    weights = jnp.ones((5, 4, 4))

    def scanned(x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda y, w: (jnp.tanh(y @ w), None))
        return jax.lax.scan(step, x, weights)[0].sum()

    x, product = jnp.ones((3, 4)), 2 * 3 * 4 * 4
    forward = jax.jit(scanned).trace(x).jaxpr
    assert count_flops(forward, while_steps=1) == 5 * product
    # Backward: the product again, and one with the weights.
    assert count_flops(jax.jit(jax.grad(scanned)).trace(x).jaxpr, while_steps=1) == 15 * product

    def written(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ weights[0], x)

    assert count_flops(jax.jit(written).trace(x).jaxpr, while_steps=7) == 7 * product


def test_flops_of_branches_and_convolutions():
    def branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x)

    assert count_flops(jax.jit(branch).trace(jnp.ones((3, 3))).jaxpr, while_steps=1) == 2 * 2 * 27
    image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    convolve = jax.jit(
        lambda x: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    expected = 2 * 64 * 5 * 27
    assert count_flops(convolve.trace(image).jaxpr, while_steps=1) == expected


def test_flops_of_a_kernel_are_those_of_all_tiles_and_devices():
    query, mask = jnp.ones((2, 256, 4, 8)), jnp.ones((2, 256, 256), bool)
    key = jnp.ones((2, 2, 256, 8))
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, jax.devices()[:1])):
        for kernel in ("plain", "splash"):
            attend = functools.partial(attention.attend, kernel=kernel)
            traced = jax.jit(attend).trace(query, (key,), (key,), (mask,))
            assert count_flops(traced.jaxpr, while_steps=9) == 4 * 2 * 256 * 256 * 4 * 8, kernel


# ------------------------------------------------------------------------- stages
@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    return tiny_world.write_all(tmp_path_factory.mktemp("world"))


def tiny_config(world: pathlib.Path, **changes) -> Config:
    config = config_checks.from_config_dict(tiny_world.config(world))
    return config_checks.change_options(config, changes)


def stages_of(
    config: Config, *, evaluation: bool = True
) -> tuple[stages_lib.PlannedRun, list[PlanStage]]:
    mesh = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    config = config_checks.change_options(
        config, {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1}
    )
    with jax.set_mesh(mesh):
        loaded, _ = model.abstract_model(config, mesh)
        run = stages_lib.make_plan(config, loaded, mesh)
        return run, list(stages_lib.stages(run, evaluation=evaluation))


def test_stages_are_the_functions_of_a_run(world):
    changes = {"train.old_logprob": "self", "train.micro_batch": 2, "rollout.length_buckets": 2}
    config = tiny_config(world, **changes)
    _, stages = stages_of(config)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    expected = {
        "prefill", "text_context", "write_text", "cut_text", "image_contexts", "draw", "join",
        "gradient", "accumulate", "apply", "eval_write_text", "eval_draw",
    }  # fmt: skip
    assert expected <= set(names)
    by_name = {stage.name: stage for stage in stages}
    assert by_name["gradient"].calls == config.trajectories / 2
    assert by_name["accumulate"].calls == config.trajectories / 2 - 1
    assert by_name["write_text"].while_steps == config.rollout.text_tokens + 1
    assert {stage.part for stage in stages} == {ROLLOUT, UPDATE, EVALUATION}
    assert all(stage.alive["weights"] == stages[0].alive["weights"] > 0 for stage in stages)
    _, fewer = stages_of(config, evaluation=False)
    assert [stage.name for stage in fewer] == [n for n in names if not n.startswith("eval_")]


@pytest.mark.parametrize("kept", [False, True])
def test_refinement_has_initial_images_and_recomputed_log_probs_two_passes(world, kept):
    changes = {"task": "srr", "train.old_logprob": "recompute", "loss.report_kl": True}
    changes["train.keep_residuals"] = kept
    run, stages = stages_of(tiny_config(world, **changes), evaluation=False)
    names = [stage.name for stage in stages]
    assert {"initial_draw", "forward", "backward", "reference"} <= set(names)
    by_name = {stage.name: stage for stage in stages}
    share = run.config.train.prompts_per_step / run.config.srr.queue_prompts
    assert by_name["initial_prefill"].part == INITIAL
    assert by_name["initial_prefill"].calls == share
    passes = by_name["backward"].calls
    assert by_name["forward"].calls == (1 if kept else 2) * passes
    assert by_name["backward"].holds == ("forward",)
    # Those of the other micro-batches; the stage's are counted by `holds`.
    assert ("kept residuals" in by_name["backward"].alive) == kept
    if kept:
        _, residuals = jax.eval_shape(by_name["forward"].function, *by_name["forward"].arguments)
        one = model.device_bytes(residuals)
        assert by_name["backward"].alive["kept residuals"] == pytest.approx(one * (passes - 1))


def test_what_lives_beside_an_update_is_counted(world):
    changes = {"train.old_logprob": "self", "train.micro_batch": 1}
    run, stages = stages_of(tiny_config(world, **changes), evaluation=False)
    by_name = {stage.name: stage for stage in stages}
    adapters = run.resident["LoRA"]
    assert by_name["gradient"].calls > AHEAD
    assert by_name["gradient"].alive["gradient"] == (AHEAD + 1) * adapters
    assert by_name["apply"].alive["contexts"] > 0
    assert "copied state" not in by_name["apply"].alive
    changes = {"train.old_logprob": "recompute", "train.updates_per_batch": 2}
    run, stages = stages_of(tiny_config(world, **changes), evaluation=False)
    copied = adapters + run.resident["optimizer"]
    assert [s.alive["copied state"] for s in stages if s.name == "backward"] == [copied]


def test_a_mixed_update_holds_the_trajectories_of_all_its_batches(world):
    changes = {"task": "mixed", "mixed.batches": 3, "mixed.tasks": ("t2i", "rt2i")}
    changes |= {"mixed.weights": (1, 1)}
    _, stages = stages_of(tiny_config(world, **changes), evaluation=False)
    others = {stage.alive.get("other batches") for stage in stages if stage.name != "merge"}
    assert len(others) == 1
    largest = max(stage.alive["contexts"] for stage in stages if stage.part == UPDATE)
    assert others.pop() == pytest.approx(2 * largest, rel=0.1)


def test_abstract_weights_are_those_that_a_run_has(world):
    config = tiny_config(world)
    run, _ = stages_of(config, evaluation=False)
    mesh = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    loaded = setup.load_policy(config, mesh)
    state = setup.initial_state(config, loaded.base, plan_optimizer(config), mesh)
    for abstract, real in ((run.loaded.base, loaded.base), (run.state, state)):
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), real)
    assert run.resident["weights"] == sum(x.nbytes for x in jax.tree.leaves(loaded.base))


def plan_optimizer(config: Config):
    return stages_lib.make_optimizer(config.optimizer)


def test_a_missing_model_is_one_of_bagels_sizes(world):
    config = tiny_config(world, **{"model.path": "not/here", "model.dtype": "bfloat16"})
    mesh = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    loaded, notes = model.abstract_model(config, mesh)
    assert model.device_bytes(loaded.base) == pytest.approx(29.318e9, rel=1e-3)
    assert any("BAGEL-7B-MoT's sizes" in note for note in notes)
    assert any("tokens of rt2i's system prompt" in note for note in notes)


# ------------------------------------------------------------------- fit and report
def compiled(**changes) -> Compiled:
    zero = Compiled(0, 0, 0, 0, 0, 0, {}, 0, 0, {}, 0.0)
    return dataclasses.replace(zero, **changes)


def needs(name: str = "draw", part: str = ROLLOUT, calls: float = 1.0, **changes) -> fit.StageNeeds:
    alive = {"weights": 30e9, "contexts": 2e9}
    stage = PlanStage(name, part, None, (), alive, calls, rows=4)
    return fit.StageNeeds(stage, compiled(**changes), 0.0)


def test_a_peak_adds_what_is_alive_results_temporaries_and_padding():
    entry = needs(
        argument_bytes=31e9, parameter_bytes=30e9, output_bytes=3e9, alias_bytes=1e9,
        temporary_bytes=4e9,
    )  # fmt: skip
    assert entry.peak == pytest.approx(32e9 + 1e9 + 2e9 + 4e9)


def test_the_roofline_is_what_binds():
    chip = CHIPS["v5p"]
    least = fit.roofline(
        compiled(
            flops=chip.flops, memory_traffic=2 * chip.memory_rate,
            collectives={"all-reduce": [1, chip.link_rate]}, network_bytes=0.0,
        ),
        chip,
    )  # fmt: skip
    assert (least.arithmetic, least.memory, least.links) == (1, 2, 1)
    assert (least.seconds, least.bound) == (2, "memory")
    over_network = compiled(
        collectives={"all-reduce": [1, chip.network_rate]}, network_bytes=chip.network_rate
    )
    assert fit.roofline(over_network, chip).links == 1


def test_an_iteration_adds_up_its_calls():
    chip = CHIPS["h200"]
    entries = [
        needs(calls=3, flops=chip.flops),
        needs("gradient", UPDATE, 2, flops=chip.flops),
        needs("eval_draw", EVALUATION, 9, flops=chip.flops),
    ]
    parts = fit.iteration_seconds(entries, chip)
    assert parts == {ROLLOUT: 3, UPDATE: 2, EVALUATION: 9}
    assert fit.without_evaluation(parts) == 5


def test_the_verdict_names_the_stage():
    chip = CHIPS["v6e"]
    assert report.verdict([needs(temporary_bytes=1e9)], chip) == "fits: yes"
    no = report.verdict([needs(), needs("gradient", temporary_bytes=9.5e9)], chip)
    assert no == "fits: no (gradient needs 41.5 of 33.6 GB per chip)"


def test_json_has_the_bytes_per_token():
    text = needs("write_text", step_collectives={"all-gather": [2, 512.0]})
    target = targets.Target("v5p:2x2x1", CHIPS["v5p"], (1, 2), (0, 0), exact=True, compiler="c 1")
    content = report.as_json([text, needs()], target, {"data": 2}, ["note"], images=4)
    assert content["stages"]["write_text"]["collective_bytes_per_token"] == 512
    assert "collective_bytes_per_token" not in content["stages"]["draw"]
    assert content["fits"]
    assert "measured by c 1" in content["sources"]["temporaries"]
    estimate = report.sources(dataclasses.replace(target, exact=False))
    assert "estimated" in estimate["temporaries"]


@pytest.mark.parametrize(
    ("limit", "fits", "expected"),
    [(24e9, True, {"mesh.tensor": 2}), (16e9, True, {"mesh.tensor": 4}), (1e9, False, None)],
)
def test_suggestions_come_from_sizes(limit: float, fits: bool, expected: dict | None):
    config = config_checks.read_config(CONFIGS[0])
    mesh = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    loaded, _ = model.abstract_model(config, mesh)
    sizes = {"data": 64, "fsdp": 1, "tensor": 1}
    resident = fit.resident_bytes(config, loaded, sizes)
    assert resident == pytest.approx(31.26e9, rel=1e-2)
    stage = PlanStage("draw", ROLLOUT, None, (), {"weights": resident, "contexts": 2e9}, 1.0)
    worst = fit.StageNeeds(stage, compiled(temporary_bytes=2e9), 0.0)
    suggestion = fit.suggest(config, loaded, worst, sizes, limit)
    assert suggestion is not None
    assert suggestion.fits == fits
    if expected:
        assert suggestion.changes == expected
    assert suggestion.peak < worst.peak
    text = report.suggestion_lines(suggestion, CHIPS["v6e"])[0]
    assert "--config.mesh.tensor=" in text


def test_kept_residuals_are_given_up_first():
    config = config_checks.read_config(CONFIGS[0])
    mesh = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    loaded, _ = model.abstract_model(config, mesh)
    sizes = {"data": 8, "fsdp": 1, "tensor": 1}
    resident = fit.resident_bytes(config, loaded, sizes)
    alive = {"weights": resident, "kept residuals": 50e9}
    stage = PlanStage("backward", UPDATE, None, (), alive, 1.0)
    worst = fit.StageNeeds(stage, compiled(temporary_bytes=2e9), 0.0)
    suggestion = fit.suggest(config, loaded, worst, sizes, 60e9)
    assert suggestion is not None
    assert suggestion.changes == {"train.keep_residuals": False}
    assert suggestion.peak == pytest.approx(resident + 2e9)
    assert (
        "--config.train.keep_residuals=False"
        in report.suggestion_lines(suggestion, CHIPS["h200"])[0]
    )


# ---------------------------------------------------------------- compiling, cache
def small_stage(factor: float = 2.0) -> PlanStage:
    mesh = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=place)
    return PlanStage(
        "product", ROLLOUT, jax.jit(lambda x: factor * x @ x), (x,), {"weights": 1.0}, 1.0
    )


def cpu_target() -> targets.Target:
    return targets.Target(
        "h200:1",
        CHIPS["h200"],
        tuple(jax.devices()[:1]),
        (0,),
        exact=False,
        compiler="XLA for CPUs",
    )


def test_results_are_cached_by_program(tmp_path):
    said: list[str] = []
    first = compiling.compile_stage(small_stage(), cpu_target(), tmp_path, said.append)
    assert (first.flops, first.argument_bytes, first.output_bytes) == (2 * 16**3, 1024, 1024)
    assert not first.cached
    assert said == ["compiling rollout: product ..."]
    again = compiling.compile_stage(small_stage(), cpu_target(), tmp_path, said.append)
    assert again.cached
    assert dataclasses.replace(again, cached=False) == first
    assert len(said) == 1
    compiling.compile_stage(small_stage(3.0), cpu_target(), tmp_path, said.append)
    newer = dataclasses.replace(cpu_target(), compiler="CPU 2")
    compiling.compile_stage(small_stage(), newer, tmp_path, said.append)
    assert len(said) == 3
    for path in tmp_path.glob("*.json"):
        path.write_text("{")  # half a file is as none
    assert not compiling.compile_stage(small_stage(), cpu_target(), tmp_path, said.append).cached


class Refused:
    """A function that a compiler refuses with a message; cached results are never those of it."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __getattr__(self, name):
        return lambda *_, **__: self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)

    def as_text(self):
        return self.message

    @property
    def jaxpr(self):
        return jax.make_jaxpr(lambda: 1.0)()


# A chip's memory is 33.6 GB; 40.5 GiB are 43.5 GB, arguments (1 kB) included, and 1 GB is alive.
@pytest.mark.parametrize(
    ("message", "end"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (40.50G) exceeds available HBM (31.25G).", "needs 44.5 of 33.6 GB per chip)"),
        ("RESOURCE_EXHAUSTED: Used 1.50G of 1.25G hbm", "needs 2.6 of 33.6 GB per chip)"),
        ("RESOURCE_EXHAUSTED: Ran out of memory.", "needs more than 33.6 GB per chip)"),
    ],
)  # fmt: skip
def test_a_refused_stage_does_not_end_the_plan(message: str, end: str, tmp_path):
    stage = dataclasses.replace(small_stage(), function=Refused(message), alive={"weights": 1e9})
    taken = needs(temporary_bytes=1e9)
    for cached in (False, True):
        result = compiling.compile_stage(stage, cpu_target(), tmp_path, lambda _: None)
        assert result.cached == cached
        entries = [taken, fit.StageNeeds(stage, result, 0.0)]
        assert report.verdict(entries, CHIPS["v6e"]) == f"fits: no (product {end}"
        target = dataclasses.replace(cpu_target(), chip=CHIPS["v6e"])
        content = report.as_json(entries, target, {"data": 1}, [], images=1)
        assert not content["fits"]
        assert json.loads(json.dumps(content, allow_nan=False))["peak_stage"] == "product"
        assert "(refused)" in report.memory_table(entries)


def test_a_compilers_other_errors_name_the_stage_and_have_no_traceback(tmp_path):
    stage = dataclasses.replace(small_stage(), function=Refused("UNIMPLEMENTED: sorting so much"))
    with pytest.raises(InputError, match=r"product: XLA for CPUs .* UNIMPLEMENTED: sorting"):
        compiling.compile_stage(stage, cpu_target(), tmp_path, lambda _: None)


def test_a_card_of_another_kind_does_not_make_numbers_exact(monkeypatch):
    card = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(targets, "_gpu_devices", lambda count: (card,) * count)
    assert targets.gpu_target("h200:1").exact
    estimate = targets.gpu_target("a100-80g:1")
    assert not estimate.exact
    assert estimate.devices[0].platform == "cpu"


# ------------------------------------------------------------------------- command
def test_flags_change_fields(world, monkeypatch):
    monkeypatch.chdir(world)
    config = plan.read_config(
        ROOT / "tests" / "tiny_world.py",
        ["--config.mesh.tensor=4", "--config.rollout.merge_lora=false", "--config.task=srr"],
    )
    assert (config.mesh.tensor, config.rollout.merge_lora, config.task) == (4, False, "srr")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chips=h200:1", "--config.mesh.tenser=4"], "mesh.tenser"),
        (["--chips=h200:1", "--config.mesh.tensor=x"], "mesh.tensor"),
        (["--chips=h200:1", "--config.mesh.tensor"], "FIELD=VALUE"),
        (["--chips=h200:1", "--config.mesh.tensor=3"], "mesh.tensor"),
        (["--chips=h200:1", "--slices=2"], "--slices"),
        (["--chips=z80:1"], "z80"),
        (["--topology=v5p"], "v5p:4x4x4"),
        (["--chips=h200:1", "--config=nowhere.py"], "nowhere.py"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], words: str, capsys):
    code = plan.main(arguments)
    assert code == (1 if "nowhere.py" in words else 2)
    output = capsys.readouterr()
    assert words in output.err
    assert "fits" not in output.out


def test_without_a_machine_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as end:
        plan.main([])
    assert end.value.code == 2
    assert "--topology" in capsys.readouterr().err


def test_the_command_ends_with_the_refused_stage(world, tmp_path, monkeypatch, capsys):
    def compile_stage(stage, target, cache, say):
        refused = stage.name in ("gradient", "forward")
        return compiling._too_large(200e9, stage) if refused else compiled()

    monkeypatch.setattr(compiling, "compile_stage", compile_stage)
    words = [f"--config={ROOT / 'tests' / 'tiny_world.py'}", f"--out={tmp_path / 'plan.json'}"]
    words += [f"--config.model.path={world / 'model'}", "--chips=h200:1", "--skip-evaluation"]
    assert plan.main(words) == 1
    output = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"fits: no \((gradient|forward) needs 200\.\d of 129\.7 .*", output[-1])
    assert any("fit: " in line or "take" in line for line in output[-4:-1])  # what to change
    assert not json.loads((tmp_path / "plan.json").read_text())["fits"]


@pytest.mark.parametrize("slices", ["0", "-1", "two"])
def test_numbers_of_slices_are_checked(slices: str, capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(["--topology=v5p:4x4x4", f"--slices={slices}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "--slices" in error
    assert "at least 1" in error


@pytest.mark.slow
def test_the_command_plans_compiles_once_and_ends_with_the_verdict(world, tmp_path, run_python):
    words = [
        "-m", "alphagrpo_jax.plan", f"--config={ROOT / 'tests' / 'tiny_world.py'}",
        "--chips=h200:2", f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'plan.json'}",
        f"--config.model.path={world / 'model'}", "--skip-evaluation",
    ]  # fmt: skip
    first = run_python(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "fits: yes"
    assert "compiling update: gradient" in first.stderr or "forward" in first.stderr
    again = run_python(*words)
    assert again.returncode == 0
    assert "compiling" not in again.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_plans_a_topology(world, tmp_path, run_python):
    done = run_python(
        "-m", "alphagrpo_jax.plan", f"--config={ROOT / 'tests' / 'tiny_world.py'}",
        "--topology=v5e:2x2", f"--cache={tmp_path / 'cache'}", "--skip-evaluation",
        f"--config.model.path={world / 'model'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "measured by libtpu" in done.stdout
    assert done.stdout.splitlines()[-1] == "fits: yes"


def test_bagels_configurations_are_read():
    for path in CONFIGS:
        config = config_checks.read_config(path)
        assert (config.mesh.fsdp, config.verifier.kind) == (1, "openai")
    assert bagel_7b_config(tiny_world.tokenizer()).llm.num_hidden_layers == 28
