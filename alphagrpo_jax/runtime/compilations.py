"""Keeps compiled programs from one start of a run to the next, and counts compilations."""

import os
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compiled"  # inside the run's folder
OFF = "none"
VARIABLE, FOLDER_OPTION = "JAX_COMPILATION_CACHE_DIR", "jax_compilation_cache_dir"
LEAST_SECONDS = 0.1  # of compiling, below which a program is compiled again rather than kept

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
HIT_EVENT = "/jax/compilation_cache/cache_hits"
SAVED_EVENT = "/jax/compilation_cache/compile_time_saved_sec"


def use_cache(setting: str, workdir: pathlib.Path) -> pathlib.Path | None:
    """Makes JAX keep the programs that it compiles, and take them from there.

    `JAX_COMPILATION_CACHE_DIR` wins over `setting`, as do JAX's other variables of its cache.

    Args:
      setting: of the configuration: "" for the run's folder, "none", or a folder.
      workdir: the run's folder.
    Returns:
      The folder; None if nothing is kept.
    """
    if folder := os.environ.get(VARIABLE):
        return pathlib.Path(folder)
    folder = workdir / FOLDER if setting == "" else pathlib.Path(setting).expanduser()
    path = None if setting == OFF else folder.absolute()
    if getattr(jax.config, FOLDER_OPTION) != (path and str(path)):
        jax.config.update(FOLDER_OPTION, path and str(path))
        compilation_cache.reset_cache()  # what was compiled before has opened the former one
    if path and "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return path


class CompileCounter:
    """Counts compilations of this process and their seconds.

    Attributes:
      count: programs that were needed, whether compiled or taken from the cache.
      hits: those that came from the cache.
      seconds: that all of them took.
      saved_seconds: that the programs of the cache had taken to compile, more than to read.
    """

    def __init__(self) -> None:
        self.count = self.hits = 0
        self.seconds = self.saved_seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._listen_to_hits)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs
        elif event == SAVED_EVENT:
            self.saved_seconds += duration_secs

    def _listen_to_hits(self, event: str, **_: str | int) -> None:
        self.hits += event == HIT_EVENT

    def metrics(self) -> dict[str, float]:
        """Returns the counts since the start, as metrics."""
        return {
            "time/compilations": self.count,
            "time/compilations_cached": self.hits,
            "time/compile_seconds": self.seconds,
            "time/compile_seconds_saved": self.saved_seconds,
        }

    def words(self, folder: pathlib.Path | None) -> str:
        """Says what was compiled so far, and what a cache has saved.

        Args:
          folder: see `use_cache`.
        """
        words = (
            f"{self.count} programs took {self.seconds:.0f} s: {self.count - self.hits} compiled"
        )
        if folder is None:
            return f"{words}, none kept (cache.dir={OFF})"
        saved = max(0.0, self.saved_seconds)
        return f"{words}, {self.hits} from {folder}, which saved {saved:.0f} s"
