"""Chips that runs are planned for, with what their makers say of them."""

import dataclasses

GIB = 1 << 30
# Shares of a GPU's memory that JAX takes: by itself, and as runs of large models should set it.
GPU_FRACTION, GPU_FRACTION_VARIABLE = 0.92, "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates and memory of one chip."""

    name: str
    platform: str  # "tpu" or "gpu"
    flops: float  # per second, dense bfloat16 products
    memory: float  # bytes that a program may use
    memory_rate: float  # bytes per second
    link_rate: float  # bytes per second that a chip sends to chips of its slice or machine
    network_rate: float  # bytes per second that a chip sends beyond: its share of the host's
    source: str  # where the figures stand
    axes: int = 0  # of a TPU's torus


_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"

# v4 is absent: its compiler plans for the two cores of a chip apart, which no run uses.
# Memory of a TPU is what its compiler allows a program (its error messages name it); of a GPU the
# data sheet's size, times `GPU_FRACTION`. Link rates are one direction of what is given as both.
# Rates beyond a slice are v5p's own (50 Gbit/s per chip) for all TPUs, and one adapter of 400
# (A100: 200) Gbit/s for each GPU: rent decides these, so they are assumptions.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 200e9, 6.25e9, _CLOUD + "v5e", 2),
        Chip("v5p", "tpu", 459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9, _CLOUD + "v5p", 3),
        Chip("v6e", "tpu", 918e12, 31.25 * GIB, 1638e9, 400e9, 6.25e9, _CLOUD + "v6e", 2),
        Chip("a100-40g", "gpu", 312e12, 40e9 * GPU_FRACTION, 1555e9, 300e9, 25e9, _NVIDIA + "a100"),
        Chip("a100-80g", "gpu", 312e12, 80e9 * GPU_FRACTION, 2039e9, 300e9, 25e9, _NVIDIA + "a100"),
        Chip("h100", "gpu", 989e12, 80e9 * GPU_FRACTION, 3350e9, 450e9, 50e9, _NVIDIA + "h100"),
        Chip("h200", "gpu", 989e12, 141e9 * GPU_FRACTION, 4800e9, 450e9, 50e9, _NVIDIA + "h200"),
    )
}
GPUS_PER_MACHINE = 8  # joined by the fast links


def names(platform: str) -> list[str]:
    """Returns the known chips of a platform."""
    return [chip.name for chip in CHIPS.values() if chip.platform == platform]
