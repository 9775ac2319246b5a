"""Opens the verifiers of a run: a pool of processes or the policy itself, and a second pool."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import jax
import numpy as np

from alphagrpo_jax.config import Config, ConfigError
from alphagrpo_jax.models.bagel_weights import LoadedModel
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.rewards.scoring import VerifierPool
from alphagrpo_jax.rewards.verifiers.chat.endpoints import checked_urls
from alphagrpo_jax.rewards.workers.combined import CombinedPool
from alphagrpo_jax.rewards.workers.in_process import InProcessPool
from alphagrpo_jax.rewards.workers.pool import Pool
from alphagrpo_jax.rewards.workers.worker import Factory
from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.console import SILENT, Console
from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.runtime.paths import model_folder
from alphagrpo_jax.runtime.stopping import NEVER, StoppedError, StopRequest
from alphagrpo_jax.training.scorers import audit_path, with_scorers
from alphagrpo_jax.training.self_verifier import PolicyVerifier

JAX_FRACTION = 0.75  # of a card's memory, which JAX takes by itself


def make_pool(config: Config, stop: StopRequest = NEVER) -> Pool | CombinedPool:
    """Starts the workers of the verifier and of scorers in the background.

    Args:
      config: the run's.
      stop: ends waits for them once it is overdue.
    Raises:
      ConfigError: see `verifier_factories`.
      MissingFileError: a scorer's folder is missing.
      OSError: an audit log cannot be opened.
    """
    pool = with_scorers(config, make_verifier_pool(config, stop), stop=stop)
    assert not isinstance(pool, InProcessPool)  # it has workers
    return pool


def make_verifier_pool(config: Config, stop: StopRequest = NEVER) -> Pool:
    """Starts the verifier's workers in the background.

    Args:
      config, stop: see `make_pool`.
    Raises:
      ConfigError, OSError: see `make_pool`.
    """
    return Pool(
        verifier_factories(config),
        config.verifier,
        capacity=max(1024, 2 * config.trajectories),
        audit_path=audit_path(config.verifier.audit),
        stop=stop,
    )


def verifier_factories(config: Config) -> list[Factory]:
    """Lists the pool's members: local processes, and one client of all endpoints if there are any.

    Raises:
      ConfigError: an endpoint that is no base URL, or one twice; or the policy is the verifier.
    """
    verifier = config.verifier
    if verifier.kind == "self":
        raise ConfigError(
            "verifier.kind=self: the policy judges its own images in training only; give a "
            "verifier of another kind here"
        )
    if verifier.endpoints:
        try:
            checked_urls(verifier.endpoints)
        except UsageError as error:
            raise ConfigError(f"verifier.endpoints: {error}") from error
    if verifier.kind == "openai":
        return [_endpoint_factory(config)]
    local: Factory = ("callable", {"target": verifier.path})
    if verifier.kind != "callable":
        options = {
            "path": str(model_folder(verifier.path)),
            "device": verifier.device,
            "dtype": verifier.dtype,
            "num_threads": verifier.threads,
            "top_k": verifier.top_k or None,
            "text_fallback": verifier.text_fallback,
            "instruction": verifier.instruction,
            "min_mass": verifier.min_mass,
            "read": verifier.read,
            "max_tokens": verifier.max_tokens,
        }
        local = ("hf", options)
    local_members: list[Factory] = [local] * verifier.workers
    if not verifier.endpoints:
        return local_members
    # A server that fails hands its sample to a process soon, even while the run starts.
    fast_handover = {"outage_attempts": 2, "must_serve": False}
    kind, options = _endpoint_factory(config)
    return [*local_members, (kind, {**options, **fast_handover})]


def _endpoint_factory(config: Config) -> Factory:
    """Describes the client of the endpoints."""
    verifier = config.verifier
    options = {
        "endpoints": verifier.endpoints,
        "model": verifier.model,
        "api_key_env": verifier.api_key_env,
        "concurrency": verifier.concurrency,
        "question_seconds": verifier.question_seconds,
        "top_logprobs": verifier.top_logprobs,
        "text_fallback": verifier.text_fallback,
        "instruction": verifier.instruction,
        "min_mass": verifier.min_mass,
        "read": verifier.read,
        "max_tokens": verifier.max_tokens,
        "extra_body": verifier.extra_body,
    }
    return "openai", options


@contextlib.contextmanager
def open_verifiers(
    config: Config,
    loaded: LoadedModel,
    console: Console = SILENT,
    stop: StopRequest = NEVER,
) -> Iterator[tuple[VerifierPool, VerifierPool | None]]:
    """Opens the verifier of the training, and the one that only evaluations ask, if any.

    Both are ready when the block begins.

    Args:
      config: the run's.
      loaded: the pretrained model, which may be the verifier.
      console: shows for how long the verifiers are being started.
      stop: ends waits for them once it is overdue.
    Raises:
      ConfigError: wrong endpoints, a policy that cannot be a verifier, or one on a card of JAX's.
      FileNotFoundError: a verifier's folder is missing.
      PoolError: a verifier cannot be started.
      StoppedError: a stop has ended the wait for them on some process.
    """
    if config.verifier.kind == "hf":
        check_device(config.verifier.device)
    with contextlib.ExitStack() as stack:
        with console.phase("starting the verifiers"), stop.at_once():
            second = None
            if config.verifier.second:
                second = stack.enter_context(_second_pool(config, stop))
            if config.verifier.kind == "self":
                policy = PolicyVerifier(
                    loaded,
                    question_tokens=config.rollout.prompt_tokens,
                    min_mass=config.verifier.min_mass,
                    stop=stop,
                )
                first: VerifierPool = with_scorers(config, InProcessPool(policy), stop=stop)
            else:
                first = make_pool(config, stop)
            if not isinstance(first, InProcessPool):
                stack.enter_context(first)
            with contextlib.suppress(StoppedError):  # all processes leave together, by the check
                for pool in (first, second):
                    if pool is not None and not isinstance(pool, InProcessPool):
                        pool.wait_ready()
            distributed.check_stop(stop)
        yield first, second


def check_device(device: str) -> None:
    """Refuses to put a verifier on a card whose memory JAX has taken for the run.

    At its first use JAX takes most of the memory of every card that it sees, and a verifier of
    another process finds none left. Whoever has set how much JAX takes knows what is left.

    Args:
      device: of the verifier, as torch calls it.
    Raises:
      ConfigError: it cannot have that device.
    """
    kind, _, number = device.partition(":")
    platform = jax.default_backend()
    if kind == "cuda" and platform == "tpu":
        raise ConfigError(
            f"verifier.device={device!r}: a TPU host has no GPU; run the verifier on a machine "
            "with one (launch/tpu.sh starts it) and set verifier.kind=openai, or use "
            "verifier.device=cpu"
        )
    if kind not in ("cuda", "auto") or platform != "gpu" or _is_memory_left():
        return
    cards = {card.local_hardware_id for card in jax.local_devices()}
    if number.isdigit() and int(number) not in cards:
        return
    raise ConfigError(
        f"verifier.device={device!r}: JAX has taken the memory of the cards {sorted(cards)} for "
        "the run, expected a card of the verifier's own: start it as a server on another card "
        "(launch/gpus.sh --judge=ours --judge-cards=LIST) and set verifier.kind=openai; or hide "
        "the card from JAX (JAX_CUDA_VISIBLE_DEVICES=0,1 and verifier.device=cuda:2); or, if both "
        "fit, set XLA_PYTHON_CLIENT_MEM_FRACTION to the share that JAX may take"
    )


def _is_memory_left() -> bool:
    """Tells if the environment has JAX take less of a card than by itself."""
    preallocates = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower()
    try:
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", JAX_FRACTION))
    except ValueError:  # JAX refuses it
        fraction = JAX_FRACTION
    return (
        preallocates in ("false", "0")
        or fraction < JAX_FRACTION
        or os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") in ("platform", "cuda_async")
    )


def follow(verifier: VerifierPool, params: PolicyParams) -> None:
    """Points a policy that is its own verifier at its current weights; others stay as they are."""
    pool = verifier.verifier if isinstance(verifier, CombinedPool) else verifier
    if isinstance(pool, InProcessPool) and isinstance(pool.verifier, PolicyVerifier):
        pool.verifier.follow(params)


def _second_pool(config: Config, stop: StopRequest) -> Pool:
    """Starts one process with the second verifier."""
    first = config.verifier
    scheme, _, urls = first.second.partition(":")
    if scheme == "openai":
        changes = {"kind": "openai", "path": "", "endpoints": tuple(urls.split(","))}
    else:
        kind = "callable" if first.kind == "callable" else "hf"
        changes = {"kind": kind, "path": first.second, "endpoints": ()}
    second = dataclasses.replace(first, **changes, workers=1, audit="")
    return make_verifier_pool(dataclasses.replace(config, verifier=second), stop)


class PoolCounts:
    """Counters of the training's pools since the last row, failures included, as metrics.

    Under `time/`, since faults differ from run to run while rewards do not.
    """

    def __init__(self, verifier: VerifierPool) -> None:
        """Counts from the pool's start on, so that the first row counts what went before it too.

        A verifier in this process has no counters.
        """
        self._pool = verifier if isinstance(verifier, Pool | CombinedPool) else None
        self._before: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Returns `time/pool/NAME` per counter (see `Pool.counters`), summed over all processes.

        Those of a scorer are `time/pool/SCORER/NAME`.
        """
        if self._pool is None:
            return {}
        now = self._pool.counters()
        counts = [now[name] - self._before.get(name, 0) for name in now]
        counts = distributed.total(np.array(counts))
        self._before = now
        return {f"time/pool/{name}": float(value) for name, value in zip(now, counts, strict=True)}
