"""The model's process: how its end and its errors reach the server."""

import signal
import threading

import model_children
import pytest

from alphagrpo_jax import serve_verifier
from alphagrpo_jax.rewards.verifiers.base import VerifierLoadError
from alphagrpo_jax.rewards.verifiers.serving import model_process
from alphagrpo_jax.rewards.verifiers.serving.model_process import ModelDiedError, ModelProcess
from alphagrpo_jax.runtime import stopping

pytestmark = pytest.mark.torch


@pytest.fixture
def started(monkeypatch):
    processes = []

    def start(function):
        monkeypatch.setattr(model_process, "_serve", function)
        processes.append(ModelProcess("nowhere", {}))
        return processes[0]

    yield start
    for process in processes:
        process.close()


def test_a_process_killed_while_it_loads_is_explained(started):
    with pytest.raises(VerifierLoadError, match=r"ended with code -9 while it loaded .* memory"):
        started(model_children.is_killed).wait()


def test_a_bug_while_it_loads_is_explained(started):
    with pytest.raises(VerifierLoadError, match=r"cannot be loaded: KeyError: 'weights'"):
        started(model_children.has_a_bug).wait()


def test_its_imports_are_safe_from_ctrl_c(started):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    numbers = sorted(map(int, {*before, signal.SIGINT, signal.SIGTERM}))
    process = started(model_children.tells_its_signals)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    with pytest.raises(VerifierLoadError) as caught:
        process.wait()
    assert str(caught.value) == f"blocked: {numbers}"


def test_closing_in_the_middle_of_a_pass_is_no_failure_of_the_model(started):
    process = started(model_children.stalls)
    process.wait()
    outcomes = []

    def ask():
        try:
            process.answer([])
        except ModelDiedError as error:
            outcomes.append((process.closing, str(error)))

    thread = threading.Thread(target=ask)
    thread.start()
    while not process._lock.locked():
        thread.join(0.01)
    process.close()
    thread.join(30)
    assert outcomes == [(True, "the model's process ended with code -9")]


@pytest.mark.parametrize("closing", [True, False])
def test_the_server_ends_by_itself_only_if_its_model_has_died_by_itself(monkeypatch, closing):
    class Dead:
        def answer(self, questions):
            raise ModelDiedError("the model's process ended with code -9")

    class LeftError(Exception):
        pass

    def leave(code):
        raise LeftError(code)

    model = Dead()
    model.closing = closing
    monkeypatch.setattr(stopping, "leave", leave)
    error = serve_verifier.RequestError if closing else LeftError
    with pytest.raises(error):
        serve_verifier.answer_or_leave(model, [])
