"""Joins processes, merges arrays that lie on several hosts, lets all processes stop together."""

import contextlib
import os
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its store has no public name
from jax.experimental import multihost_utils

from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.stopping import StoppedError, StopRequest

STOP_KEY = "alphagrpo_jax/stop"  # in the store that all processes share


def initialize() -> None:
    """Joins the other processes if the environment asks for it.

    `COORDINATOR_ADDRESS`, `NUM_PROCESSES` and `PROCESS_ID` name them; `DISTRIBUTED=1` leaves it to
    JAX to find them (TPU pods, Slurm). Without these variables there is one process.

    Raises:
      InputError: `COORDINATOR_ADDRESS` without the other two.
    """
    address = os.environ.get("COORDINATOR_ADDRESS")
    if address is None:
        if os.environ.get("DISTRIBUTED") == "1":
            jax.distributed.initialize()
        return
    try:
        count, number = int(os.environ["NUM_PROCESSES"]), int(os.environ["PROCESS_ID"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"COORDINATOR_ADDRESS={address} is set, but NUM_PROCESSES and PROCESS_ID are not "
            f"both numbers ({error}); set all three or none"
        ) from error
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=count, process_id=number)


def is_joined() -> bool:
    """Tells if this process has joined others by `initialize`."""
    return jax_distributed.global_state.client is not None


def process_number() -> int:
    """Returns the number of this process among those that have joined, without a device."""
    return jax_distributed.global_state.process_id


def coordinator_host() -> str:
    """Returns the name or address under which all processes have reached process 0."""
    return str(jax_distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")


def publish(key: str, value: str) -> None:
    """Writes a value into the store that all processes share; RuntimeError: it is gone."""
    client = jax_distributed.global_state.client
    assert client is not None  # this process has joined
    client.key_value_set(key, value)


def published(key: str, seconds: float) -> str:
    """Waits so long for a value of the store; RuntimeError: it did not come."""
    client = jax_distributed.global_state.client
    assert client is not None  # this process has joined
    return client.blocking_key_value_get(key, int(1000 * seconds))


def is_primary() -> bool:
    """Tells if this process is the one that writes logs."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """Copies a pytree of device arrays to numpy arrays, complete on every host."""

    def leaf_to_host(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(leaf_to_host, tree)


def is_own(rows: np.ndarray) -> np.ndarray:
    """Tells which rows of a batch this process scores, bool[N] for row numbers int64[N]."""
    return rows % jax.process_count() == jax.process_index()


def own_rows(count: int) -> np.ndarray:
    """Returns the numbers of the rows that this process scores of a batch of `count`, int64."""
    return np.flatnonzero(is_own(np.arange(count)))


def merge_rows(values: np.ndarray, count: int) -> np.ndarray:
    """Puts rows that the processes computed for `own_rows` together, on every process.

    Args:
      values: float[len(own_rows(count)), ...].
      count: rows of the batch.
    """
    if jax.process_count() == 1:
        return values
    most = -(-count // jax.process_count())  # shares differ by one row at most
    filled = np.full((most, *values.shape[1:]), np.nan, values.dtype)
    filled[: len(values)] = values
    stacked = all_gather(filled)  # [processes, most, ...]
    return np.moveaxis(stacked, 0, 1).reshape(-1, *values.shape[1:])[:count]


def all_gather(values: np.ndarray) -> np.ndarray:
    """Gathers equally shaped arrays of all processes, [processes, ...], bit for bit."""
    # As bytes: JAX would round float64 to float32 on the way.
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    stacked = np.asarray(multihost_utils.process_allgather(data))
    return stacked.reshape(-1).view(values.dtype).reshape(-1, *values.shape)


def total(values: np.ndarray) -> np.ndarray:
    """Sums float64[N] over the processes, on every process."""
    if jax.process_count() == 1:
        return values
    return all_gather(values).sum(axis=0)


def primary_says(flag: bool) -> bool:  # noqa: FBT001
    """Returns the flag of the process that writes logs, on every process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.array([flag]))[0])


def any_process(flag: bool) -> bool:  # noqa: FBT001
    """Tells if the flag is set on any process, so that all take the same branch."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))


def check_stop(stop: StopRequest) -> None:
    """Ends the work that calls it, on all processes, once a stop is overdue on any.

    Raises:
      StoppedError: it is.
    """
    if any_process(stop.overdue):
        raise StoppedError


def announce_stop() -> None:
    """Tells the other processes that this one was told to stop; called from any thread."""
    client = jax_distributed.global_state.client
    if client is not None:
        with contextlib.suppress(RuntimeError):  # the store is gone: so is the run
            client.key_value_set(STOP_KEY, "1", allow_overwrite=True)


def stop_announced() -> bool:
    """Returns whether a process was told to stop; called from any thread."""
    client = jax_distributed.global_state.client
    if client is None:
        return False
    try:
        return bool(client.key_value_try_get(STOP_KEY))
    except RuntimeError:  # nobody has told, or the store is gone
        return False


def must_stop(requested: bool, step: int) -> bool:  # noqa: FBT001
    """Tells if all processes stop behind this step: one was told to, or its machine will be taken.

    JAX's preemption service agrees with the cluster on a step; every process asks at every step. A
    machine that is taken by SIGTERM needs none of it, see `stopping`.

    Args:
      requested: this process was told to stop.
      step: updates done.
    """
    if jax_distributed.global_state.preemption_sync_manager is not None:
        requested |= multihost_utils.reached_preemption_sync_point(step)
    return any_process(requested)
