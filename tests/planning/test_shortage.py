"""Too little memory on the devices: the stage, the reason and the plan command of the very run."""

import pathlib
import shlex
import types

import jax
import pytest
import tiny_world

from alphagrpo_jax import config_checks, plan, rollout, update
from alphagrpo_jax.planning import shortage
from alphagrpo_jax.runtime.device_memory import is_shortage

CONFIG_FILE = pathlib.Path(tiny_world.__file__)
ON_TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 40.50G of 31.25G hbm. Exceeded hbm capacity by 9.25G.\n\nTotal hbm usage >= 41.25G:\n"
)
ON_GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456789 bytes."


def raised_in(module, message):
    """An error that a jitted function raised in a function `inner` of a module."""
    scope = {"__name__": module.__name__, "error": jax.errors.JaxRuntimeError(message)}
    exec("def inner():\n    raise error", scope)
    try:
        scope["inner"]()
    except jax.errors.JaxRuntimeError as error:
        return error


def changed(**fields):
    base = config_checks.read_config(CONFIG_FILE)
    return config_checks.change_options(
        base, {name.replace("__", "."): value for name, value in fields.items()}
    )


@pytest.mark.parametrize(
    ("module", "message", "stage", "amount"),
    [
        (update, ON_TPU, "update (inner)", "needs 40.5 GiB"),
        (rollout, ON_GPU, "rollout (inner)", "needs more"),
        (jax, ON_GPU, "start", "needs more"),
    ],
)
def test_the_message_names_stage_and_amount_in_one_line(module, message, stage, amount):
    error = raised_in(module, message)
    assert is_shortage(error)
    text = str(shortage.explain(error, changed(), CONFIG_FILE))
    assert f"the stage {stage} {amount} on a device" in text
    assert message.splitlines()[0] in text
    assert "\n" not in text
    assert f"python -m alphagrpo_jax.plan --config={CONFIG_FILE} --chips=NAME:" in text


def test_the_command_has_the_very_fields_of_the_run():
    config = changed(
        train__micro_batch=2, rollout__guidance__text_scale=3.0, data__train="with blank.jsonl",
        mesh__fsdp=2, rollout__window_range=[1, 3], log__tensorboard=True,
    )  # fmt: skip
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    command = shlex.split(shortage.plan_command(config, CONFIG_FILE, [device] * 8))
    assert command[:3] == ["python", "-m", "alphagrpo_jax.plan"]
    assert len(command) == 3 + 1 + 6 + 1
    options = plan.parse_flags(command[3:])
    assert options.chips == "h100:8"
    assert plan.read_config(options.config, options.changes) == config


def devices(kind, shape, slices=1):
    return [
        types.SimpleNamespace(device_kind=kind, coords=(x, y, z), slice_index=number)
        for number in range(slices)
        for x in range(shape[0])
        for y in range(shape[1])
        for z in range(shape[2])
    ]


@pytest.mark.parametrize(
    ("kind", "shape", "slices", "flags"),
    [
        ("TPU v5p", (4, 4, 4), 1, ["--topology=v5p:4x4x4"]),
        ("TPU v5", (2, 4, 4), 2, ["--topology=v5p:2x4x4", "--slices=2"]),
        ("TPU v6 lite", (8, 8, 1), 1, ["--topology=v6e:8x8"]),
        ("TPU v5 lite", (2, 2, 1), 1, ["--topology=v5e:2x2"]),
        ("NVIDIA A100-SXM4-80GB", (8, 1, 1), 1, ["--chips=a100-80g:8"]),
        ("NVIDIA A100-SXM4-40GB", (1, 1, 1), 1, ["--chips=a100-40g:1"]),
        ("cpu", (3, 1, 1), 1, ["--chips=NAME:3"]),
    ],
)
def test_the_machine_is_named_as_the_plan_takes_it(kind, shape, slices, flags):
    assert shortage.machine_flags(devices(kind, shape, slices)) == flags
