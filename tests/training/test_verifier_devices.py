"""A verifier on a card that JAX holds is refused, unless somebody has left room for it."""

import types

import jax
import pytest

from alphagrpo_jax.config import ConfigError
from alphagrpo_jax.training import verifiers

VARIABLES = ("PREALLOCATE", "MEM_FRACTION", "ALLOCATOR")


@pytest.fixture
def machine(monkeypatch):
    """machine(platform, cards): what JAX runs on."""
    for name in VARIABLES:
        monkeypatch.delenv(f"XLA_PYTHON_CLIENT_{name}", raising=False)

    def machine(platform, cards):
        devices = [types.SimpleNamespace(local_hardware_id=card) for card in cards]
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "local_devices", lambda: devices)

    return machine


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "auto"])
def test_a_card_of_the_run_is_refused(machine, device):
    machine("gpu", (0, 1))
    with pytest.raises(ConfigError, match=r"memory of the cards \[0, 1\].*launch/gpus.sh"):
        verifiers.check_device(device)


@pytest.mark.parametrize(
    ("platform", "device"),
    [("gpu", "cpu"), ("gpu", "cuda:2"), ("cpu", "cuda"), ("cpu", "cpu"), ("tpu", "cpu"),
     ("tpu", "auto")],
)  # fmt: skip
def test_other_devices_are_taken(machine, platform, device):
    machine(platform, (0, 1))
    verifiers.check_device(device)


@pytest.mark.parametrize(
    ("name", "value"),
    [("PREALLOCATE", "false"), ("MEM_FRACTION", ".5"), ("ALLOCATOR", "platform")],
)
def test_whoever_limits_what_jax_takes_may_share_a_card(machine, monkeypatch, name, value):
    machine("gpu", (0,))
    monkeypatch.setenv(f"XLA_PYTHON_CLIENT_{name}", value)
    verifiers.check_device("cuda")


@pytest.mark.parametrize("fraction", [".75", ".92"])
def test_where_jax_takes_most_of_a_card_a_verifier_is_refused(machine, monkeypatch, fraction):
    machine("gpu", (0,))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    with pytest.raises(ConfigError, match="memory of the cards"):
        verifiers.check_device("cuda")


def test_a_tpu_host_has_no_card(machine):
    machine("tpu", (0, 1, 2, 3))
    with pytest.raises(ConfigError, match=r"a TPU host has no GPU.*launch/tpu.sh"):
        verifiers.check_device("cuda")
