"""Paired gains with bootstrap intervals over runs and clusters of prompts; pure numpy.

Prompts that ask for one combination, or pose the same riddles, succeed or fail together, so that
whole clusters of prompts are resampled, never single prompts.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
INTERVAL = (0.025, 0.975)  # quantiles


class Gain(NamedTuple):
    """A mean of paired differences, and the means of all bootstrap samples."""

    value: float
    resampled: np.ndarray  # float64[RESAMPLES]

    @property
    def interval(self) -> list[float]:
        """Returns the central 95 % of the bootstrap samples, [low, high]."""
        return [round(float(x), 4) for x in np.quantile(self.resampled, INTERVAL)]


def cluster(record: Mapping) -> str:
    """Returns the name of a prompt's cluster: its combination or, if implied, its riddles."""
    if record["kind"] == "plain":
        return record["combination"]
    return " + ".join(sorted(record["riddles"]))


def sample_runs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Samples how often each bootstrap sample holds each of `count` runs: int[RESAMPLES, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)


def resample(
    gains: np.ndarray, clusters: Sequence[str], runs: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Computes means of bootstrap samples: clusters and runs sampled with replacement.

    Args:
      gains: float64[R, N], paired differences of R runs on N prompts.
      clusters: N names.
      runs: int[RESAMPLES, R], how often each sample holds each run.
      rng: samples the clusters.
    Returns:
      float64[RESAMPLES].
    """
    names, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    count = len(names)
    sums = np.stack([np.bincount(cluster_of, row, count) for row in gains])  # [R, C]
    uses = rng.multinomial(count, np.full(count, 1 / count), len(runs)).astype(np.float64)
    totals = (uses @ sums.T * runs).sum(axis=1) / runs.sum(axis=1)
    return totals / (uses @ np.bincount(cluster_of, minlength=count))


def gains(
    after: np.ndarray,
    before: np.ndarray,
    groups: Sequence[str],
    clusters: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Gain]:
    """Computes gains by group, of `plain` (equal weight per type) and of `all` (plain, implied).

    Args:
      after: bool or float64[R, N], R runs on the same N prompts.
      before: bool or float64[N].
      groups: N names; "implied" and at least one of "plain/..." are among them.
      clusters: N names.
      seed: of the resampling; all groups of a sample hold the same runs.
    """
    rng, names, labels = np.random.default_rng(seed), np.array(groups), np.array(clusters)
    runs = sample_runs(rng, len(after))
    result: dict[str, Gain] = {}
    for name in dict.fromkeys(groups):
        rows = np.flatnonzero(names == name)
        paired = after[:, rows].astype(np.float64) - before[rows]
        result[name] = Gain(
            float(paired.mean()), resample(paired, labels[rows].tolist(), runs, rng)
        )
    result["plain"] = _mean([gain for name, gain in result.items() if name.startswith("plain/")])
    result["all"] = _mean([result["plain"], result["implied"]])
    return result


def _mean(gains_: Sequence[Gain]) -> Gain:
    values, resampled = zip(*gains_, strict=True)
    return Gain(float(np.mean(values)), np.mean(resampled, axis=0))


def shares(exact: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Computes means by group, of `plain` and of `all`, weighted as in `gains`.

    Args:
      exact: bool or float64[N].
      groups: N names.
    """
    names = np.array(groups)
    result = {name: float(exact[names == name].mean()) for name in dict.fromkeys(groups)}
    plain = [share for name, share in result.items() if name.startswith("plain/")]
    result["plain"] = float(np.mean(plain))
    result["all"] = (result["plain"] + result["implied"]) / 2
    return result
