"""Chips that runs are planned for, with what their makers say of them."""

import dataclasses

from alphagrpo_jax.runtime.chips import peak_of

GIB = 1 << 30
# Shares of a GPU's memory that JAX takes: by itself, and as runs of large models should set it.
GPU_FRACTION, GPU_FRACTION_VARIABLE = 0.92, "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one chip."""

    name: str
    kind: str  # as JAX names it
    platform: str  # "tpu" or "gpu"
    flops: float  # per second, dense bfloat16 products
    memory: float  # bytes that a program may use
    memory_rate: float  # bytes per second
    link_rate: float  # bytes per second that a chip sends to chips of its slice or machine
    network_rate: float  # bytes per second that a chip sends beyond: its share of the host's
    source: str  # where the figures stand
    axes: int = 0  # of a TPU's torus


def _chip(
    name: str,
    kind: str,
    *,
    memory: float | None = None,
    links: float,
    network: float,
    axes: int = 0,
) -> Chip:
    """Completes what `runtime.chips` knows of a kind of device."""
    peak = peak_of(kind)
    assert peak is not None  # a test asks for all
    platform = "tpu" if axes else "gpu"
    usable = peak.memory * GPU_FRACTION if memory is None else memory
    rates = (peak.flops, usable, peak.memory_rate, links, network)
    return Chip(name, kind, platform, *rates, peak.source, axes)


# v4 is absent: its compiler plans for the two cores of a chip apart, which no run uses.
# Memory of a TPU is what its compiler allows a program (its error messages name it); of a GPU the
# data sheet's size, times `GPU_FRACTION`. Link rates are one direction of what is given as both.
# Rates beyond a slice are v5p's own (50 Gbit/s per chip) for all TPUs, and one adapter of 400
# (A100: 200) Gbit/s for each GPU: rent decides these, so they are assumptions.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("v5e", "TPU v5e", memory=15.75 * GIB, links=200e9, network=6.25e9, axes=2),
        _chip("v5p", "TPU v5p", memory=95.74 * GIB, links=600e9, network=6.25e9, axes=3),
        _chip("v6e", "TPU v6e", memory=31.25 * GIB, links=400e9, network=6.25e9, axes=2),
        _chip("a100-40g", "NVIDIA A100-SXM4-40GB", links=300e9, network=25e9),
        _chip("a100-80g", "NVIDIA A100-SXM4-80GB", links=300e9, network=25e9),
        _chip("h100", "NVIDIA H100 80GB HBM3", links=450e9, network=50e9),
        _chip("h200", "NVIDIA H200", links=450e9, network=50e9),
    )
}
GPUS_PER_MACHINE = 8  # joined by the fast links


def names(platform: str) -> list[str]:
    """Returns the known chips of a platform."""
    return [chip.name for chip in CHIPS.values() if chip.platform == platform]
