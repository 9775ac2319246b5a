"""Gauges of collapse: how many different images a policy still draws."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np


def diversity(
    images: np.ndarray, choices: Sequence[Mapping[str, Sequence[str]]]
) -> dict[str, float]:
    """Measures how evenly images use what their prompts leave open.

    `diversity/NAME`, for each kind of open choice: the effective number of values, the exponential
    of the entropy of their shares; 1 where all images choose the same. `diversity/pixels`: the mean
    absolute difference of an image from the mean image, in [0, 1].

    Args:
      images: uint8[N, H, W, 3].
      choices: of each image, the values that it chose by name.
    """
    counts: dict[str, collections.Counter[str]] = {}
    for image_choices in choices:
        for name, values in image_choices.items():
            counts.setdefault(name, collections.Counter()).update(values)
    metrics = {
        f"diversity/{name}": effective_number(list(values.values()))
        for name, values in counts.items()
        if values
    }
    mean = images.mean(axis=0, dtype=np.float64)  # image by image: all at once would be large
    distances = [float(np.abs(image - mean).mean()) / 255.0 for image in images]
    metrics["diversity/pixels"] = float(np.mean(distances))
    return metrics


def effective_number(counts: Sequence[int]) -> float:
    """Computes `exp(-sum p log p)` of the shares `p` of positive counts."""
    shares = np.asarray(counts, np.float64) / np.sum(counts)
    return float(np.exp(-np.sum(shares * np.log(shares))))
