"""What a run tells: phases with times, one line that rewrites itself, whole lines elsewhere."""

import contextlib
import io
import os
import pty
import re
import sys
import time

import pytest
from absl import logging

from alphagrpo_jax.runtime import console as console_lib
from alphagrpo_jax.runtime.console import Console
from alphagrpo_jax.runtime.metrics import notify

STEP = {"reward/mean": 0.9, "time/rollout": 1.0, "time/reward_wait": 0.25, "time/update": 2.0}
EVALUATION = {
    "eval/exact_all": 0.5,
    "eval/exact_all/plain": 0.75,
    "eval/exact_all/plain/count": 0.6,
    "eval/reward/mean": 0.8,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal; `screen` is what stands on it in the end."""

    def isatty(self):
        return True

    def screen(self):
        lines = []
        for line in self.getvalue().replace("\r\x1b[K", "\r").split("\n"):
            lines.append(line.rpartition("\r")[2])
        return lines


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_a_phase_is_a_line_with_its_time_on_a_terminal_and_elsewhere(terminal):
    for stream in (terminal, io.StringIO()):
        with Console(stream) as console:
            with console.phase("loading the model"):
                pass
            with console.phase("evaluating the untrained policy"):
                for count in (0, 200, 400):
                    console.count(count, 400)
            with console.phase("evaluating", lasting=False):
                pass
        lines = stream.screen() if stream is terminal else stream.getvalue().split("\n")
        assert re.fullmatch(r"loading the model \.\.\. 0\.\d s", lines[0])
        pattern = r"evaluating the untrained policy: 400 of 400 \.\.\. 0\.\d s"
        assert re.fullmatch(pattern, lines[1])
        assert len(stream.getvalue().split("\n")) == 4 if stream is terminal else len(lines) == 3
    assert "evaluating the untrained policy: 200 of 400" in terminal.getvalue()
    assert "\r" not in stream.getvalue()


def test_compiling_is_told_and_a_failure_too(terminal):
    seconds = iter((1.0, 31.5, 31.5, 31.9))
    with Console(terminal, compile_seconds=lambda: next(seconds)) as console:
        with console.phase("sampling"):
            pass
        with pytest.raises(ValueError, match="bad"), console.phase("loading"):
            raise ValueError("bad")
    lines = terminal.screen()
    assert re.fullmatch(r"sampling \.\.\. 0\.\d s, 30\.5 s of it compiling", lines[0])
    assert re.fullmatch(r"loading \.\.\. stopped after 0\.\d s", lines[1])


def test_a_terminal_has_one_progress_line_and_results_stay(terminal, monkeypatch):
    monkeypatch.setattr(console_lib, "_columns", lambda stream: 40)
    with Console(terminal) as console:
        console.progress(0, 3, EVALUATION)
        for step in (1, 2):
            console.start_step(step, 3)
            console.progress(step, 3, STEP)
        console.progress(3, 3, STEP | EVALUATION)
    lines = terminal.screen()
    assert lines[0] == "untrained policy: exact 0.500 (plain 0.750), reward 0.800"
    assert lines[1].startswith("step 1 of 3, with compiling ... ")
    assert lines[2] == "after step 3: exact 0.500 (plain 0.750), reward 0.800"
    assert lines[3] == "step 3 of 3: reward 0.900, 3.2 s a step"
    assert lines[4:] == [""]
    for step in (1, 2):
        assert f"step {step} of 3: reward 0.900" in terminal.getvalue()
    assert "s left" in terminal.getvalue()


def test_without_a_terminal_steps_are_told_now_and_then(monkeypatch):
    stream, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(console_lib.time, "monotonic", lambda: now[0])
    with Console(stream) as console:
        for step in range(1, 31):
            now[0] += 4.0
            console.progress(step, 30, STEP)
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1]) for line in lines] == [1, 5, 9, 13, 17, 21, 25, 29, 30]
    assert lines[1] == (
        "step 5 of 30: reward 0.900, 1 min 40 s left, "
        "3.2 s a step (rollout 1.0, verifiers 0.2, update 2.0)"
    )


def test_a_long_phase_is_told_before_it_ends(monkeypatch):
    monkeypatch.setattr(console_lib, "PLAIN_SECONDS", 0.05)
    stream = io.StringIO()
    with Console(stream) as console, console.phase("compiling"):
        time.sleep(0.5)
    *running, finished = stream.getvalue().splitlines()
    assert 2 <= len(running) <= 4  # after 0.05, 0.15 and 0.35 s
    assert all(line.startswith("compiling ... ") for line in running)
    assert all(line.endswith(" so far") for line in running)
    assert not finished.endswith(" so far")


def test_messages_of_others_stand_above_the_line(terminal):
    before = sys.stderr
    with Console(terminal) as console:
        console.progress(1, 9, STEP)
        notify("a notice")
        console.progress(2, 9, STEP)
        sys.stderr.write("half a ")
        sys.stderr.write("line")
        console.progress(3, 9, STEP)
    assert sys.stderr is before
    lines = terminal.screen()
    assert lines[:2] == ["a notice", "half a line"]
    assert lines[2].startswith("step 3 of 9: ")


def test_log_messages_stand_above_the_line(terminal, monkeypatch):
    handler = logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "stream", terminal)
    with Console(terminal) as console, console.phase("starting the verifiers"):
        record = logging.get_absl_logger().makeRecord("x", 40, "pool.py", 1, "worker 0", (), None)
        handler.emit(record)
    assert handler.stream is terminal
    *_, message, phase, _ = terminal.screen()
    assert message.endswith("worker 0")
    assert phase.startswith("starting the verifiers ... 0.")


def test_a_bar_of_a_library_is_left_alone(terminal, monkeypatch):
    monkeypatch.setattr(console_lib, "TICK_SECONDS", 0.02)
    with Console(terminal) as console, console.phase("starting the verifiers"):
        for percent in range(0, 101, 50):
            sys.stderr.write(f"\rfetching: {percent:3d}%")
            time.sleep(0.1)
        sys.stderr.write("\n")
        time.sleep(0.1)
    bar, phase, end = terminal.screen()
    assert bar == "fetching: 100%"
    assert phase.startswith("starting the verifiers ... 0.")
    assert end == ""


def test_a_stop_during_a_step_leaves_whole_lines(terminal):
    """The signal's handler writes past the stream, as a signal may not wait for it."""
    with Console(terminal) as console:
        console.progress(1, 9, STEP)
        terminal.write("\nstopping after this step (SIGINT)\n")
        console.progress(2, 9, STEP)
    first, stop, second, end = terminal.screen()
    assert first.startswith("step 1 of 9: ")
    assert stop == "stopping after this step (SIGINT)"
    assert second.startswith("step 2 of 9: ")
    assert end == ""


def test_a_stop_ends_the_first_step(terminal):
    console = Console(terminal)
    with contextlib.suppress(KeyboardInterrupt), console:
        console.start_step(5, 9)
        raise KeyboardInterrupt
    assert terminal.screen()[0].startswith("step 5 of 9, with compiling ... stopped after 0.")


def test_switched_off_it_is_silent(terminal):
    with Console(terminal, enabled=False) as console:
        with console.phase("loading"):
            console.count(1, 2)
        console.start_step(1, 2)
        console.progress(1, 2, STEP | EVALUATION)
        console.message("done")
    assert terminal.getvalue() == ""


def test_nobody_watches_any_more():
    stream = io.StringIO()
    with Console(stream) as console:
        stream.close()
        console.message("into the void")
        with console.phase("loading"):
            pass


def test_a_real_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream, Console(stream) as console, console.phase("loading"):
        pass
    output = ""
    with contextlib.suppress(OSError):  # the end of a terminal's output
        while text := os.read(ours, 10_000).decode():
            output += text
    os.close(ours)
    assert re.search(
        r"^\r\x1b\[Kloading \.\.\. 0\.\d s(\r\x1b\[Kloading \.\.\. 0\.\d s)+\r\n$", output
    )


def test_durations_in_words():
    words = [console_lib.seconds_words(x) for x in (0.04, 99.9, 99.96, 125.4, 3599.9, 3900.0)]
    assert words == ["0.0 s", "99.9 s", "1 min 40 s", "2 min 5 s", "1 h 0 min", "1 h 5 min"]
