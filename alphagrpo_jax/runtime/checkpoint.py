"""Saves and restores what a run cannot compute again: state, keys, position in the data."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from alphagrpo_jax.runtime import distributed
from alphagrpo_jax.runtime.distributed import to_host
from alphagrpo_jax.runtime.errors import UserError
from alphagrpo_jax.runtime.sharding import path_name

FOLDER = "checkpoints"
MIN_FREE = 64 << 20  # bytes of free space that any run wants: logs, samples, prompt cache
# A write that fails is a ValueError of tensorstore, "RESOURCE_EXHAUSTED: Error writing ...". Of
# collectives, which fail where another process has ended, it is none of the storage.
_STORAGE_STATUS = re.compile(r"[A-Z]+(?:_[A-Z]+)*: (?!.*(?:[Gg]loo|NCCL))", re.DOTALL)
SHARED_SECONDS = 10.0  # in which a new file shows on all hosts
LOOK_SECONDS = 0.05  # between looks at a save of several processes
ROOM = 4  # checkpoints of free space that a run wants at its start


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read, or continued."""


class Checkpoints:
    """The `checkpoints/` folder of a run. A save is complete or invisible.

    Files are written in the background; at any moment at most one checkpoint is being written.

    Attributes:
      lock: held while a save starts and while its end is awaited; hold it to save from another
        thread than the run's.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int,
        on_failure: Callable[[UserError], None] = lambda error: None,
    ) -> None:
        """Opens the folder.

        Args:
          folder: of the run.
          keep: newest checkpoints that stay.
          on_failure: of several processes, called in that one which cannot write its share, on
            another thread; its argument is what `wait` raises.
        """
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        path = pathlib.Path(folder).absolute() / FOLDER
        self._manager = _Manager(path, options, on_failure)
        self._writing: int | None = None  # step of the save whose end nobody has seen yet
        self.lock = threading.RLock()

    def latest(self) -> int | None:
        """Returns the newest step that is saved, None before the first.

        Raises:
          CheckpointError: see `wait`, which it does first.
        """
        self.wait()
        return self._manager.latest_step()

    def save(
        self, step: int, state: Any, progress: Mapping[str, Any], *, wait: bool = True
    ) -> None:
        """Writes a checkpoint.

        Args:
          step: updates done.
          state: pytree of arrays (typed keys as their data).
          progress: JSON object.
          wait: until it is complete. False: return as soon as the arrays are copied to the host, so
            that an update may take their memory; then `check` and `wait` tell of a failure.
        Raises:
          CheckpointError: it, or the save before it, could not be written; earlier ones are
            untouched.
        """
        with self.lock:
            self.wait()
            # Behind this call a thread turns the object into text: the run changes it meanwhile.
            progress = json.loads(json.dumps(dict(progress)))
            with _explained(step):
                self._manager.writing = step
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state),
                        progress=ocp.args.JsonSave(progress),
                    ),
                    force=True,
                )
            self._writing = step
            if wait:
                self.wait()

    def check(self) -> None:
        """Tells of a save that has failed since; does not wait for one that is under way.

        Raises:
          CheckpointError: it could not be written; earlier ones are untouched.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is under way, if any.

        Raises:
          CheckpointError: it could not be written; earlier ones are untouched.
        """
        with self.lock:
            if self._writing is not None:
                step, self._writing = self._writing, None
                with _explained(step):
                    self._manager.wait_until_finished()

    def progress(self, step: int) -> dict[str, Any]:
        """Reads the JSON object of a checkpoint."""
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return dict(self._restore(step, args)["progress"])

    def state(self, step: int, like: Any) -> Any:
        """Reads the arrays of a checkpoint, in the structure, shapes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._restore(step, args)["state"]

    def close(self) -> None:
        """Waits for the save that is under way, and ends the manager.

        Raises:
          CheckpointError: see `wait`.
        """
        self.wait()
        self._manager.close()

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError, TypeError) as error:  # damage shows as any of these
            raise CheckpointError(
                f"checkpoint {step} cannot be restored ({error}); if it is damaged, delete its "
                "folder: the run then continues from the one before"
            ) from error


class _Manager(ocp.CheckpointManager):
    """Tells at once of a write that has failed in this process of several.

    Orbax tells of it once all processes have written, and they wait for this one.

    Attributes:
      writing: step of the newest save.
    """

    def __init__(
        self,
        path: pathlib.Path,
        options: ocp.CheckpointManagerOptions,
        on_failure: Callable[[UserError], None],
    ) -> None:
        self.writing = 0
        self._on_failure = on_failure
        self._failed, self._failure = threading.Event(), None
        super().__init__(path, options=options)

    def _wait_for_checkpointers(self) -> None:
        """Waits for the files of a save, on the thread that completes it."""
        try:
            with _explained(self.writing):
                super()._wait_for_checkpointers()
        except Exception as error:
            self._keep(error)
            raise

    def _finalize(self, step: int, steps_to_remove: list[int]) -> None:
        """Completes a save, on a thread of its own."""
        try:
            super()._finalize(step, steps_to_remove)
        except Exception as error:
            self._keep(error)
            raise

    def _keep(self, error: Exception) -> None:
        """Keeps the first failure among several processes; alone, the next save may succeed."""
        if jax.process_count() == 1 or self._failure is not None:
            return
        self._failure = error
        self._failed.set()
        if isinstance(error, UserError) and not _is_of_collective(error):
            self._on_failure(error)

    def wait_until_finished(self) -> None:
        """Waits for the save that is under way, or until it has failed in this process."""
        while self._failure is None and self.is_saving_in_progress():
            if jax.process_count() == 1:
                break
            self._failed.wait(LOOK_SECONDS)
        if self._failure is not None:
            raise self._failure
        super().wait_until_finished()


def _is_of_collective(error: BaseException) -> bool:
    """Tells if an error comes from waiting for other processes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, jax.errors.JaxRuntimeError)


@contextlib.contextmanager
def _explained(step: int) -> Iterator[None]:
    """Turns errors of a write into a `CheckpointError`; bugs stay what they are."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not _STORAGE_STATUS.match(str(error)):
            raise
        raise CheckpointError(
            f"step {step}: the checkpoint could not be written ({error}); free some space, "
            "then run the same command again: it continues from the checkpoint before"
        ) from error


def digest(state: Any, progress: Mapping[str, Any]) -> str:
    """Computes the sha256 over the bytes of a checkpoint's payload, arrays sorted by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(to_host(state))
    total = hashlib.sha256()
    for path, leaf in sorted((path_name(path), leaf) for path, leaf in flat):
        total.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    total.update(json.dumps(dict(progress), sort_keys=True).encode())
    return total.hexdigest()


def check_writable(folder: str | os.PathLike, *, state_bytes: int) -> None:
    """Makes the run folder and makes sure that it takes files and has room for checkpoints.

    Raises:
      CheckpointError: it cannot be made or written, or the disk is full.
    """
    folder = pathlib.Path(folder)
    probe = folder / f".write_probe_{uuid.uuid4().hex}"  # every process of every host has its own
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"\0" * (1 << 20))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"the run folder {folder} cannot be written ({error}); choose another --workdir or "
            "free some space"
        ) from error
    free = shutil.disk_usage(folder).free
    wanted = MIN_FREE + ROOM * state_bytes
    if free < wanted:
        raise CheckpointError(
            f"{folder} has {free / 1e6:.0f} MB free, expected at least {wanted / 1e6:.0f} MB (logs "
            f"and {ROOM} checkpoints of {state_bytes / 1e6:.0f} MB); free some space or choose "
            "another --workdir"
        )


def check_shared(folder: str | os.PathLike) -> None:
    """Makes sure that all processes see the same run folder; all of them call it.

    A checkpoint is written by all processes together, and a host with a folder of its own would
    write its part to where no other finds it.

    Raises:
      CheckpointError: some do not see what process 0 writes, on every process.
    """
    if jax.process_count() == 1:
        return
    token = distributed.all_gather(np.frombuffer(uuid.uuid4().bytes, np.uint8))[0]
    probe = pathlib.Path(folder) / f".shared_probe_{token.tobytes().hex()}"
    if distributed.is_primary():
        probe.touch()
    distributed.all_gather(np.zeros(1, np.uint8))  # it is there
    sees = distributed.all_gather(np.array([_appears(probe)], np.uint8))[:, 0]
    if distributed.is_primary():
        probe.unlink(missing_ok=True)
    if not sees.all():
        blind = ", ".join(map(str, np.flatnonzero(sees == 0)))
        raise CheckpointError(
            f"the run folder {pathlib.Path(folder).absolute()} of process 0 is another one on "
            f"process {blind} of {len(sees)}: a file that process 0 wrote into it was not there "
            f"after {SHARED_SECONDS:g} s; expected one folder that all hosts see: mount a shared "
            "file system on all of them and name a --workdir on it"
        )


def _appears(path: pathlib.Path) -> bool:
    """Waits until a file shows; a network file system may take seconds."""
    end = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # asks the server again
    return True
