"""Starts the pools of a run's scorers beside that of its verifier."""

import pathlib

import jax

from alphagrpo_jax.config import Config
from alphagrpo_jax.rewards.workers.combined import CombinedPool
from alphagrpo_jax.rewards.workers.in_process import InProcessPool
from alphagrpo_jax.rewards.workers.pool import Pool
from alphagrpo_jax.rewards.workers.worker import Factory
from alphagrpo_jax.runtime.paths import model_folder
from alphagrpo_jax.runtime.stopping import StopRequest
from alphagrpo_jax.score_specs import ScorerSpec

EXACT: Factory = ("callable", {"target": "alphagrpo_jax.rewards.exact:ExactScorer"})


def with_scorers(
    config: Config, verifier: Pool | InProcessPool, *, stop: StopRequest | None = None
) -> Pool | InProcessPool | CombinedPool:
    """Starts the workers of the reward's scorers, in the background; there may be none.

    Args:
      config: the run's; deadlines, attempts and threads are those of `verifier`.
      verifier: the verifier's pool, which computes likelihoods; closed if a scorer cannot start.
      stop: as of `Pool`.
    Returns:
      A pool over both; without scorers the verifier's own.
    Raises:
      MissingFileError: a model folder is missing.
      OSError: an audit log cannot be opened.
    """
    if not config.reward.scorers:
        return verifier
    pools: dict[str, Pool | InProcessPool] = {}
    combined = CombinedPool(verifier, {})
    try:
        for spec in config.reward.scorers:
            pools[spec.name] = _start(config, spec, stop) if spec.has_processes else verifier
            combined = CombinedPool(verifier, pools)
    except BaseException:
        combined.close()
        raise
    return combined


def audit_path(name: str, scorer: str = "") -> str | None:
    """Names this process's audit log: FILE.SCORER.NUMBER.jsonl for FILE.jsonl.

    Args:
      name: `verifier.audit`; "" for none.
      scorer: the scorer's name; "" for the verifier.
    """
    number = "" if jax.process_count() == 1 else str(jax.process_index())
    path = pathlib.PurePath(name)
    marks = [mark for mark in (scorer, number) if mark]
    return str(path.with_name(".".join([path.stem, *marks]) + path.suffix)) if name else None


def _start(config: Config, spec: ScorerSpec, stop: StopRequest | None) -> Pool:
    """Starts one scorer's workers."""
    return Pool(
        [_factory(config, spec)] * spec.processes,
        config.verifier,
        capacity=max(1024, 2 * config.trajectories),
        audit_path=audit_path(config.verifier.audit, spec.name),
        stop=stop,
    )


def _factory(config: Config, spec: ScorerSpec) -> Factory:
    """Describes what a scorer's workers build."""
    if spec.kind == "exact":
        return EXACT
    if spec.kind == "callable":
        return "function", {"target": spec.target}
    options = {name: getattr(spec, name) for name in ("value", "truncate", "device", "dtype")}
    folder = str(model_folder(spec.target))
    processor = str(model_folder(spec.processor, weights=False)) if spec.processor else None
    threads = config.verifier.threads
    return "hf_clip", options | {"path": folder, "processor": processor, "num_threads": threads}
