"""Errors about memory: what they need, and what commands say of them."""

import jax
import pytest
import torch

from alphagrpo_jax.runtime import cli, device_memory

ON_TPU = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 31.25G hbm."
ON_GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456789 bytes."


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 40.50G of 31.25G hbm. Exceeded hbm capacity by 9.25G.", 40.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (800.00G) exceeds available HBM (95.74G).", 800 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory while allocating.", float("inf")),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2.00GiB.", float("inf")),
        ("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 1.37G. That "
         "was not possible. There are 1.20G free.", float("inf")),
        ("RESOURCE_EXHAUSTED: Used 40.50G of 31.25G hbm. 2.0M of vmem are reserved.", 40.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.0M of 16.0M vmem.",
         None),
        ("INVALID_ARGUMENT: something else", None),
    ],
)  # fmt: skip
def test_a_refusal_says_how_much_was_needed(message: str, needed: float | None):
    assert device_memory.needed_bytes(message) == needed


@pytest.mark.parametrize(
    "error",
    [
        ValueError(ON_TPU),
        jax.errors.JaxRuntimeError("INTERNAL: something else"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: in memory space vmem. Used 2M of 1M vmem."),
        torch.AcceleratorError("CUDA error: unspecified launch failure", 1),
    ],
)
def test_other_errors_are_no_shortage_and_keep_their_traceback(error):
    assert not device_memory.is_shortage(error)

    def command():
        raise error

    with pytest.raises(type(error)):
        cli.exit_code_of(command)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (jax.errors.JaxRuntimeError(f"{ON_TPU}\n\nTotal hbm: 41.25G"), "alphagrpo_jax.plan"),
        (jax.errors.JaxRuntimeError(ON_GPU), "alphagrpo_jax.plan"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--max-batch"),
        (torch.AcceleratorError("CUDA error: out of memory", 2), "--max-batch"),
    ],
)
def test_a_command_says_in_one_line_what_to_do(error, remedy, capsys):
    def command():
        raise error

    assert cli.exit_code_of(command) == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert output.startswith("error: too little memory on a device: ")
    assert str(error).splitlines()[0] in output
    assert remedy in output
    assert "Traceback" not in output
