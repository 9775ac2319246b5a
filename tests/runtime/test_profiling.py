"""The profiler's steps, and the trace that they leave."""

import jax
import jax.numpy as jnp
import pytest

from alphagrpo_jax.runtime.errors import UsageError
from alphagrpo_jax.runtime.profiling import ProfiledSteps, StepProfiler


@pytest.mark.parametrize("text", ["3", "0:1", "3:0", "a:b", "3:1:1", " 3:1", "-1:2"])
def test_what_is_no_start_and_count_is_refused(text):
    with pytest.raises(UsageError, match="expected START:COUNT"):
        ProfiledSteps.parse(text)


@pytest.fixture
def traces(monkeypatch):
    """Calls of the profiler, in order."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 6), ["start at 2", "stop at 4"]),
        (range(3, 6), ["start at 3", "stop at 4"]),  # a resumed run
        (range(1, 3), ["start at 2", "stop at the end"]),
    ],
)
def test_the_chosen_steps_are_traced(tmp_path, traces, steps, expected):
    profiler, calls = StepProfiler(ProfiledSteps.parse("2:2"), tmp_path), []

    def take(where):
        calls.extend(f"{call} at {where}" for call in traces)
        traces.clear()

    for step in steps:
        profiler.begin(step)
        take(step)
    profiler.close()
    take("the end")
    assert calls == expected


def test_steps_that_were_not_done_are_told(tmp_path, traces, capsys):
    profiler = StepProfiler(ProfiledSteps(7, 1), tmp_path)
    profiler.begin(1)
    profiler.close()
    assert traces == []
    assert "--profile=7:1: no trace was written" in capsys.readouterr().err


def test_a_trace_lies_in_the_run_folder(tmp_path):
    profiler = StepProfiler(ProfiledSteps(1, 1), tmp_path)
    profiler.begin(1)
    jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(8)))
    profiler.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
