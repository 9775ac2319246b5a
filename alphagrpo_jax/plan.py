"""Plans a run before it is paid for: memory, work and time of every function, and whether it fits.

    python -m alphagrpo_jax.plan --config=configs/bagel_7b_rt2i.py --topology=v5p:4x4x4
    python -m alphagrpo_jax.plan --config=configs/bagel_7b_rt2i.py --chips=a100-80g:8

Every function of the run is compiled for abstract weights by the machine's own compiler: neither
the machine nor the weights are needed. A TPU's compiler comes with `pip install '.[plan]'`; for
GPUs, XLA's is used where JAX sees a GPU; elsewhere exact sizes and XLA for CPUs give an estimate.

Exit codes: 0 it fits, 1 it does not, 2 wrong usage or configuration.
"""

import argparse
import ast
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from alphagrpo_jax import config_checks
from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.planning import compiling, fit, model, report, targets
from alphagrpo_jax.planning import stages as stages_lib
from alphagrpo_jax.planning.fit import StageNeeds
from alphagrpo_jax.planning.targets import Target
from alphagrpo_jax.runtime import cli, sharding
from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.runtime.files import replace_text
from alphagrpo_jax.training import setup

OVERRIDE = "--config."


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(prog="python -m alphagrpo_jax.plan", description=__doc__)
    parser.add_argument("--config", default=config_checks.DEFAULT_CONFIG, help="a Python file")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="TPU chips and their torus, e.g. v5p:4x4x4")
    where.add_argument("--chips", help="GPUs and their number, e.g. h200:8 or a100-80g:56")
    parser.add_argument("--slices", type=cli.COUNT, default=1, help="slices of that topology")
    parser.add_argument("--out", help="a JSON file for the plan")
    parser.add_argument("--cache", help="folder of compiled stages; default: the user's cache")
    parser.add_argument(
        "--skip-evaluation", action="store_true", help="leave the functions of evaluations out"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    changes = [word for word in words if word.startswith(OVERRIDE)]
    options = parser.parse_args([word for word in words if not word.startswith(OVERRIDE)])
    options.changes = changes
    return options


def read_config(path: str | pathlib.Path, changes: Sequence[str]) -> Config:
    """Reads a configuration with changed fields, given as `--config.FIELD=VALUE`.

    Raises:
      ConfigError: no such field, or a value that it may not have.
    """
    config = config_checks.read_config(path)
    values: dict[str, Any] = {}
    for word in changes:
        key, equals, text = word.removeprefix(OVERRIDE).partition("=")
        if not equals:
            raise ConfigError(f"{word}: expected --config.FIELD=VALUE")
        values[key] = _parsed(config, key, text)
    return config_checks.change_options(config, values) if values else config


def _parsed(config: Config, key: str, text: str) -> Any:
    """Parses a field's value by the type of the present one."""
    present: Any = config
    for name in key.split("."):
        if not dataclasses.is_dataclass(present) or not hasattr(present, name):
            raise ConfigError(f"--config.{key}: there is no such field; configs/grpo.py has all")
        present = getattr(present, name)
    if isinstance(present, str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text  # refused below, with what is expected


def find_target(options: argparse.Namespace) -> Target:
    """Returns the machine that the flags name; decides JAX's platform."""
    if options.topology:
        targets.prepare_platform(tpu=True)
        return targets.tpu_target(options.topology, options.slices)
    if options.slices > 1:
        raise UsageError("--slices belongs to --topology; of GPUs, give --chips=NAME:NUMBER")
    targets.prepare_platform(tpu=False, stand_ins=targets.split_chips(options.chips)[1])
    return targets.gpu_target(options.chips)


def compile_all(
    config: Config, target: Target, mesh: Mesh, cache: pathlib.Path, *, evaluation: bool
) -> tuple[LoadedModel, list[str], list[StageNeeds]]:
    """Compiles all stages of a run, saying on stderr which one it is at.

    Returns:
      The model, what stands in for what, and the needs of every stage.
    """
    start, needs = time.monotonic(), list[StageNeeds]()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {text}", file=sys.stderr, flush=True)

    loaded, notes = model.abstract_model(config, mesh)
    setup.check_sizes(config, loaded.config, mesh)
    twins: Iterator[stages_lib.PlanStage] = iter(())
    if not target.exact:
        in_float32 = config_checks.change_options(config, {"model.dtype": "float32"})
        twin, _ = model.abstract_model(in_float32, mesh)
        plan = stages_lib.make_plan(in_float32, twin, mesh)
        twins = stages_lib.stages(plan, evaluation=evaluation)
    plan = stages_lib.make_plan(config, loaded, mesh)
    for stage in stages_lib.stages(plan, evaluation=evaluation):
        compiled = compiling.compile_stage(stage, target, cache, say)
        if not compiled.cached:
            say(f"  {stage.name}: {compiled.compile_seconds:.0f} s")
        if not target.exact:
            wide = compiling.compile_stage(next(twins), target, cache, say)
            compiled = compiling.stand_in(compiled, wide, stage)
        held = [entry.compiled.output_bytes for entry in needs if entry.stage.name in stage.holds]
        needs.append(StageNeeds(stage, compiled, sum(held)))
    return loaded, notes, needs


def left_out(config: Config, *, evaluation: bool) -> list[str]:
    """Says what of a run the verdict does not cover."""
    notes = []
    if not evaluation:
        notes.append("the functions of evaluations were left out: the verdict is of training alone")
    if config.verifier.kind == "self":
        notes.append("verifier.kind=self: the policy's work as its own verifier was left out")
    return notes


def run(options: argparse.Namespace) -> int:
    """Plans a run and prints what it finds; returns the exit code."""
    config = read_config(options.config, options.changes)
    target = find_target(options)
    try:
        mesh = sharding.make_mesh(
            config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=target.devices
        )
    except UsageError as error:
        raise ConfigError(f"{error} ({target.name} has {len(target.devices)})") from error
    sizes = dict(mesh.shape)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    cache = pathlib.Path(options.cache) if options.cache else compiling.default_cache()
    with jax.set_mesh(mesh):
        evaluation = not options.skip_evaluation
        loaded, notes, needs = compile_all(config, target, mesh, cache, evaluation=evaluation)
    chip = target.chip
    print(
        f"{pathlib.Path(options.config).name}, task {config.task}, on {target.name}: "
        f"{len(target.devices)} chips, mesh "
        + " ".join(f"{axis}={size}" for axis, size in sizes.items())
    )
    for note in (*notes, *left_out(config, evaluation=evaluation), report.memory_line(chip)):
        print(f"note: {note}")
    for kind, source in report.sources(target).items():
        print(f"{kind}: {source}")
    print("\n" + report.memory_table(needs))
    print("\n" + report.work_table(needs, chip) + "\n")
    images = stages_lib.images(config)
    for line in (
        *report.collective_lines(needs),
        *report.minimum_lines(needs, config, exact=target.exact),
        *report.time_lines(needs, chip),
        report.speed_line(needs, target, images),
    ):
        print(line)
    worst = report.worst_of(needs)
    print(f"most memory: {worst.stage.name}, {worst.peak / report.GB:.1f} GB per chip")
    fits = report.fits(needs, chip)
    if not fits:
        suggestion = fit.suggest(config, loaded, worst, sizes, chip.memory)
        print("\n".join(report.suggestion_lines(suggestion, chip)))
    if options.out:
        content = report.as_json(needs, target, sizes, notes, images)
        replace_text(options.out, json.dumps(content, indent=2) + "\n")
    print(report.verdict(needs, chip))
    return cli.DONE if fits else cli.FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
