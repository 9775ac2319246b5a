"""Peak rates of the chips that runs are measured against, by the names that JAX gives them."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class ChipPeak:
    """Peak rates and memory of a chip, as its maker says."""

    flops: float  # per second, dense bfloat16 products
    memory_rate: float  # bytes per second
    memory: float  # bytes
    source: str  # where the figures stand


_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
PEAKS = {  # pattern of `jax.Device.device_kind` -> chip; the first that matches counts
    "TPU v4": ChipPeak(275e12, 1228e9, 32 * 2**30, _CLOUD + "v4"),
    "TPU v5 ?(lite|e)": ChipPeak(197e12, 819e9, 16 * 2**30, _CLOUD + "v5e"),
    "TPU v5p?": ChipPeak(459e12, 2765e9, 95 * 2**30, _CLOUD + "v5p"),
    "TPU v6 ?(lite|e)": ChipPeak(918e12, 1638e9, 32 * 2**30, _CLOUD + "v6e"),
    "NVIDIA A100.*40GB": ChipPeak(312e12, 1555e9, 40e9, _NVIDIA + "a100"),
    "NVIDIA A100.*80GB": ChipPeak(312e12, 2039e9, 80e9, _NVIDIA + "a100"),
    "NVIDIA H100 (80GB HBM3|SXM).*": ChipPeak(989e12, 3350e9, 80e9, _NVIDIA + "h100"),
    "NVIDIA H100 PCIe": ChipPeak(756e12, 2000e9, 80e9, _NVIDIA + "h100"),
    "NVIDIA H200.*": ChipPeak(989e12, 4800e9, 141e9, _NVIDIA + "h200"),
}


def peak_of(device_kind: str) -> ChipPeak | None:
    """Returns the peaks of a chip by JAX's name of its kind; None if they are not known."""
    matches = (peak for name, peak in PEAKS.items() if re.fullmatch(name, device_kind))
    return next(matches, None)
