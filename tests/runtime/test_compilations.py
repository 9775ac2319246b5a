"""Compiled programs are kept in the run's folder, found again, and counted."""

import json
import pathlib

import pytest

from alphagrpo_jax.runtime import compilations

PROGRAM = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from alphagrpo_jax.runtime.compilations import CompileCounter, use_cache

jax.jit(lambda x: x - 1)(jnp.ones(2))  # opens the cache, if there is one, before the choice
counter, folder = CompileCounter(), use_cache(sys.argv[1], pathlib.Path(sys.argv[2]))
jax.jit(lambda x: jnp.linalg.svd(x @ x.T)[0].sum())(jnp.ones((7, 7)))
files = len(list(folder.iterdir())) if folder and folder.exists() else 0
print(json.dumps([str(folder), files, counter.count, counter.hits, counter.saved_seconds]))
print(counter.words(folder), file=sys.stderr)
"""


@pytest.fixture
def start(run_python, tmp_path):
    """start(setting, **environment): what a process found, and its words."""

    def start(setting, **environment):
        environment = {
            "JAX_COMPILATION_CACHE_DIR": "",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        }
        result = run_python("-c", PROGRAM, setting, str(tmp_path / "run"), **environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout), result.stderr

    return start


def test_the_next_start_takes_programs_from_the_run_folder(start, tmp_path):
    (folder, files, count, hits, _), words = start("")
    assert pathlib.Path(folder) == tmp_path / "run" / "compiled"
    assert files > 0
    assert hits == 0
    assert f", 0 from {folder}, which saved 0 s" in words
    (_, _, again, hits, saved), words = start("")
    assert hits == again == count
    assert saved != 0  # of a small program it may be less than reading takes
    assert "s: 0 compiled, " in words


def test_a_folder_none_and_the_environment(start, tmp_path):
    (folder, files, *_), _ = start(str(tmp_path / "shared"))
    assert pathlib.Path(folder) == tmp_path / "shared"
    assert files > 0
    (folder, *_), words = start("none")
    assert folder == "None"
    assert "none kept (cache.dir=none)" in words
    wins = tmp_path / "environment"
    (folder, files, *_), _ = start("none", JAX_COMPILATION_CACHE_DIR=str(wins))
    assert pathlib.Path(folder) == wins
    assert files > 0
    assert not (tmp_path / "run" / compilations.FOLDER).exists()
