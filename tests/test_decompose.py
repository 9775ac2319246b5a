"""The decompose command: against a loopback server, killed and resumed, and its exit codes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import fake_llm
import pytest
from fake_llm import SEMANTIC_CHECKS, FakeModel, verdicts

from alphagrpo_jax import decompose
from alphagrpo_jax.decomposition import check, limits, pipeline, running, schemas, texts
from alphagrpo_jax.decomposition.journal import PROVENANCE
from alphagrpo_jax.rewards.verifiers.chat import endpoints
from alphagrpo_jax.runtime.records import read_jsonl

PROMPTS = [f"word{number} thing" for number in range(12)]
PATIENCE_SECONDS = 60.0  # for a process on a busy machine; no result depends on it


@pytest.fixture(autouse=True)
def signals():
    """The command takes the signals over; the test process gets its own back."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def files(tmp_path: pathlib.Path) -> list[str]:
    source = tmp_path / "prompts.txt"
    source.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return ["--input", str(source), "--output", str(tmp_path / "out.jsonl")]


def served(files: list[str], url: str, *extra: str) -> list[str]:
    return [*files, "--llm", f"openai:{url}", "--model", "fake", "--concurrency", "3", *extra]


def report(files: list[str]) -> dict:
    return json.loads(pathlib.Path(f"{files[3]}.report.json").read_text())


def assert_complete(files: list[str]) -> None:
    """Every prompt has exactly one record, in the order of the input, and the file passes."""
    records = read_jsonl(files[3])
    assert [record.prompt for record in records] == PROMPTS
    assert [record.original_index for record in records] == list(range(len(PROMPTS)))
    assert len({record.id for record in records}) == len(PROMPTS)
    assert [f for f in check.check_file(files[3])[0] if f.severity == "error"] == []


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


def test_through_a_server(files, capsys):
    model = FakeModel()
    with fake_llm.serve(model) as url:
        assert decompose.main(served(files, url)) == 0
        assert len(model.asked) == 7 * len(PROMPTS)
        assert decompose.main(served(files, url)) == 0  # nothing is left to do
        assert len(model.asked) == 7 * len(PROMPTS)
    assert_complete(files)
    record = read_jsonl(files[3])[0]
    assert record.semantic[1].dependency == (0,)
    assert record.extra[PROVENANCE]["by"] == "openai:fake"
    run_report = report(files)
    assert (run_report["written"], run_report["failed"], run_report["not_tried"]) == (12, 0, 0)
    assert run_report["written_by"] == {"openai:fake": 12}
    assert "records of 12 of 12 prompts" in capsys.readouterr().out


class Gate:
    """A hook that lets some prompts through and holds the last stage of all others."""

    def __init__(self, free: int):
        self._free, self._through = free, set()
        self._lock, self.open = threading.Lock(), threading.Event()
        self.held = 0

    def __call__(self, stage, data, number):
        if stage != "quality_validation":
            return
        with self._lock:
            if data["prompt"] in self._through or len(self._through) < self._free:
                self._through.add(data["prompt"])
                return
            self.held += 1
        self.open.wait(PATIENCE_SECONDS)
        return


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "alphagrpo_jax.decompose", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(files: list[str]) -> list[bytes]:
    path = pathlib.Path(files[3])
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


@pytest.mark.parametrize("torn", [0, 40], ids=["whole lines", "line cut short"])
def test_killed_in_the_middle_and_resumed(files, torn):
    """kill -9 with 5 prompts written and 3 under way: nothing is lost, doubled or asked again."""
    gate = Gate(free=5)
    model = FakeModel(gate)
    with fake_llm.serve(model) as url:
        process = start(served(files, url))
        wait_for(lambda: len(lines_of(files)) == 5 and gate.held == 3)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        written = [json.loads(line) for line in lines_of(files)]
        lost = []
        if torn:  # the kill came while the fifth line was being written
            content = pathlib.Path(files[3]).read_bytes()
            pathlib.Path(files[3]).write_bytes(content[:-torn])
            lost = [written.pop()["prompt"]]
        gate.open.set()
        before = len(model.asked)
        assert decompose.main(served(files, url)) == 0
    again = {prompt for _, prompt in model.asked[before:]}
    assert again == set(PROMPTS) - {record["prompt"] for record in written}
    assert set(lost) <= again
    assert_complete(files)
    final = {record.prompt: record.to_json() for record in read_jsonl(files[3])}
    for record in written:
        assert final[record["prompt"]] == record
    assert report(files)["written"] == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly_and_the_same_command_continues(files, number):
    gate = Gate(free=5)
    model = FakeModel(gate)
    with fake_llm.serve(model) as url:
        process = start(served(files, url))
        wait_for(lambda: len(lines_of(files)) == 5 and gate.held == 3)
        process.send_signal(number)
        wait_for(lambda: process.stderr.readline().startswith("stopping"))
        gate.open.set()  # the three under way are finished, since no further request is needed
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 75, err
        assert "Traceback" not in err
        assert "4 not tried" in out
        assert report(files)["not_tried"] == 4
        assert len(lines_of(files)) == 8
        assert decompose.main(served(files, url)) == 0
    assert_complete(files)
    assert len(model.asked) == 7 * len(PROMPTS)


def test_a_second_ctrl_c_abandons_requests_that_stall(files):
    gate = Gate(free=5)
    with fake_llm.serve(FakeModel(gate)) as url:
        process = start(served(files, url, "--timeout-seconds", "600"))
        wait_for(lambda: len(lines_of(files)) == 5 and gate.held == 3)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: process.stderr.readline().startswith("stopping"))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        gate.open.set()
        assert process.returncode == 75, err
        assert "Traceback" not in err
        assert "7 not tried" in out
        assert len(lines_of(files)) == 5
        assert decompose.main(served(files, url)) == 0
    assert_complete(files)


def test_a_stop_gives_up_prompts_that_need_further_requests(files):
    received = threading.Event()

    class Flag(decompose.StopFlag):
        def _handle(self, number, frame):
            super()._handle(number, frame)
            received.set()

    def hook(stage, data, number):
        if stage == "questions" and not received.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            assert received.wait(PATIENCE_SECONDS)

    model = FakeModel(hook)
    with fake_llm.serve(model) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompose, "StopFlag", Flag)
        assert decompose.main(served(files, url)) == 75
    assert {stage for stage, _ in model.asked} <= {"tuples", "questions"}
    assert lines_of(files) == []
    assert report(files)["not_tried"] == 12


def test_repaired_invalid_and_failed_prompts_are_reported(files, capsys):
    def hook(stage, data, number):
        prompt = data["prompt"]
        if prompt == PROMPTS[1] and stage == "tags" and number == 1:
            return "tags? which tags?"
        if prompt == PROMPTS[2] and stage == "validation":
            return verdicts(data, *SEMANTIC_CHECKS, wrong={2: "requested"})
        if prompt == PROMPTS[3] and stage == "questions":
            return "OK"
        if prompt == PROMPTS[4] and stage == "validation" and number == 1:
            return verdicts(data, *SEMANTIC_CHECKS, wrong={1: "necessary"})
        return None

    with fake_llm.serve(FakeModel(hook)) as url:
        arguments = served(files, url, "--attempts", "2")
        assert decompose.main(arguments) == 1
        error = capsys.readouterr().err
        assert "error: 1 prompts failed, at most 0 allowed" in error
        assert decompose.main([*arguments, "--allow-failures", "1"]) == 0
    run_report = report(files)
    assert (run_report["written"], run_report["failed"], run_report["not_tried"]) == (11, 1, 0)
    assert (run_report["repaired"], run_report["repairs_by_stage"]) == (1, {"tags": 1})
    assert run_report["decomposed_again"] == 2
    assert run_report["failed_by_stage"] == {"questions": 1}
    (failed,) = run_report["failed_prompts"]
    assert (failed["line"], failed["prompt"], failed["stage"]) == (4, PROMPTS[3], "questions")
    assert "begins with 'OK'" in failed["reason"]
    (partial,) = run_report["partly_invalid"]
    assert partial["line"] == 3
    assert partial["faults"][0]["fault"] == "not asked for by the prompt (as told)"
    out = capsys.readouterr().out
    assert "failed, by stage: questions 1" in out
    assert "line 4: questions: no usable reply" in out
    record = next(r for r in read_jsonl(files[3]) if r.prompt == PROMPTS[2])
    assert [question.is_valid for question in record.semantic] == [True, False]
    assert PROMPTS[3] not in {r.prompt for r in read_jsonl(files[3])}


def test_failed_prompts_are_tried_again_by_the_same_command(files):
    broken = [True]
    model = FakeModel(
        lambda stage, data, _: "OK" if broken[0] and data["prompt"] == PROMPTS[7] else None
    )
    with fake_llm.serve(model) as url:
        assert decompose.main(served(files, url, "--attempts", "1")) == 1
        broken.clear()
        broken.append(False)
        before = len(model.asked)
        assert decompose.main(served(files, url, "--attempts", "1")) == 0
        assert {prompt for _, prompt in model.asked[before:]} == {PROMPTS[7]}
    assert_complete(files)  # sorted, although the last one came late
    assert report(files)["failed"] == 0


def test_a_dead_model_stops_the_run(files, capsys):
    model = FakeModel(lambda *_: "HTTP 401")
    with fake_llm.serve(model) as url:
        assert decompose.main(served(files, url)) == 1
    error = capsys.readouterr().err
    assert f"was away for {running.MAX_SILENT} prompts in a row" in error
    assert "HTTP status 401: told so" in error
    assert len(model.asked) <= running.MAX_SILENT + 3  # those under way
    assert report(files)["not_tried"] >= 12 - running.MAX_SILENT - 3


def test_prompts_that_the_model_refuses_for_good_do_not_hold_up_the_others(files):
    """Interrupted behind six of them, the same command does all the rest."""
    refused, cut = PROMPTS[:6], PROMPTS[6]
    accepted = PROMPTS[7:]

    def hook(stage, data, number):
        if data["prompt"] in refused:
            return "HTTP 400"
        return "CUT" if data["prompt"] == cut else None

    gate = Gate(free=1)
    model = FakeModel(lambda *call: hook(*call) or gate(*call))
    with fake_llm.serve(model) as url:
        process = start(served(files, url))
        wait_for(lambda: len(lines_of(files)) == 1 and gate.held >= 1)
        process.kill()
        process.communicate()
        gate.open.set()
        assert decompose.main(served(files, url, "--allow-failures", "7")) == 0
    assert [record.prompt for record in read_jsonl(files[3])] == accepted
    run_report = report(files)
    assert (run_report["written"], run_report["failed"], run_report["not_tried"]) == (5, 7, 0)
    assert run_report["failed_by_kind"] == {"refused": 6, "cut": 1}
    kinds = {
        failure["prompt"]: (failure["kind"], failure["reason"])
        for failure in run_report["failed_prompts"]
    }
    assert kinds[cut][0] == "cut"
    assert "raise --max-tokens" in kinds[cut][1]
    for prompt in refused:
        assert kinds[prompt][0] == "refused"
        assert "HTTP status 400: told so" in kinds[prompt][1]


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_server_that_fails_at_everything_is_silence(files, status, monkeypatch):
    monkeypatch.setattr(limits, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(endpoints, "LONGEST_REST", 0.0)
    with fake_llm.serve(FakeModel(lambda *_: f"HTTP {status}")) as url:
        assert decompose.main(served(files, url)) == 1
    run_report = report(files)
    assert set(run_report["failed_by_kind"]) == {"silent"}
    assert run_report["not_tried"] > 0


@pytest.mark.parametrize("flag", [True, False])
def test_servers_decode_by_the_schema_if_asked_to(files, flag):
    model = FakeModel()
    with fake_llm.serve(model) as url:
        assert decompose.main(served(files, url, *(["--json-schema"] if flag else []))) == 0
    if not flag:
        assert set(model.formats) == {None}
        return
    sent = [form["json_schema"]["schema"] for form in model.formats]
    assert len(sent) == 7 * len(PROMPTS)
    for stage in texts.STAGES:
        assert sent.count(schemas.json_schema(stage.form)) >= len(PROMPTS)


def test_busy_replies_pass_unnoticed(files):
    model = FakeModel(
        lambda stage, data, number: (
            "HTTP 503" if (stage, data["prompt"], number) == ("tags", PROMPTS[0], 1) else None
        )
    )
    with fake_llm.serve(model) as url:
        assert decompose.main(served(files, url)) == 0
    assert_complete(files)
    assert report(files)["repaired"] == 0


def test_the_key_is_sent_and_never_shown(files, monkeypatch, capsys):
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("TEST_DECOMPOSE_KEY", key)
    flags = ["--api-key-env", "TEST_DECOMPOSE_KEY"]
    with fake_llm.serve(FakeModel(), key=key) as url:
        assert decompose.main(served(files, url, *flags)) == 0
    with fake_llm.serve(FakeModel(lambda *_: key), key=key) as url:  # a model that tells it
        other_files = [*files[:3], f"{files[3]}.other"]
        assert decompose.main(served(other_files, url, *flags, "--attempts", "1")) == 1
    captured = capsys.readouterr()
    written = [path.read_text() for path in pathlib.Path(files[3]).parent.iterdir()]
    for text in (captured.out, captured.err, *written):
        assert key not in text


def test_a_full_disk_ends_the_run_with_whole_records(files, capsys, monkeypatch):
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(file)

    model = FakeModel()
    with fake_llm.serve(model) as url:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            assert decompose.main(served(files, url)) == 1
        assert "No space left on device" in capsys.readouterr().err
        written = lines_of(files)
        assert len(written) == 3  # one of the syncs was the folder's
        assert all(json.loads(line)["prompt"] in PROMPTS for line in written)
        assert len(model.asked) < 7 * len(PROMPTS)  # the rest was not decomposed for nothing
        assert decompose.main(served(files, url)) == 0
    assert_complete(files)


def test_two_runs_on_one_output_do_not_mix(files, capsys):
    gate = Gate(free=0)
    with fake_llm.serve(FakeModel(gate)) as url:
        process = start(served(files, url))
        wait_for(lambda: gate.held == 3)
        assert decompose.main(served(files, url)) == 1
        assert "another process is writing this output" in capsys.readouterr().err
        gate.open.set()
        process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0
    assert_complete(files)


def test_the_grammar_needs_no_model(tmp_path, capsys):
    source, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    source.write_text("two red circles\na photo of a cat\na blue square above a cross\n")
    arguments = ["--input", str(source), "--output", str(out), "--llm", "shapes"]
    assert decompose.main(arguments) == 1
    captured = capsys.readouterr()
    assert "line 2: grammar: got 'a photo of a cat'" in captured.out
    assert decompose.main([*arguments, "--allow-failures", "1"]) == 0
    records = read_jsonl(out)
    assert [record.prompt for record in records] == [
        "two red circles",
        "a blue square above a cross",
    ]
    assert records[0].semantic[0].tag == "Count"
    assert "facts" in records[0].extra
    assert decompose.main(["--check", str(out)]) == 0


def test_check_lists_findings_and_fails_on_errors(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text('{"prompt": "a cat"}\n\n')
    assert decompose.main(["--check", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{path}:1: error: field 'semantic_questions' is missing" in out
    assert f"{path}:2: warning: blank line" in out
    assert "0 records, 1 errors, 1 warnings" in out


def test_bad_inputs_are_one_message(tmp_path, capsys):
    source = tmp_path / "p.txt"
    cases = [(None, "cannot read the prompts"), (b"", "got no prompts"), (b"B\xe4r\n", "not UTF-8")]
    for content, message in cases:
        if content is not None:
            source.write_bytes(content)
        assert decompose.main(["--input", str(source), "--output", str(tmp_path / "o")]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    source.write_text("two red circles\n")
    assert decompose.main(["--input", str(source), "--output", str(tmp_path)]) == 1
    assert "cannot write the output" in capsys.readouterr().err
    assert decompose.main(["--input", str(source), "--output", str(tmp_path / "o")]) == 0
    source.write_text("two red squares\n")
    assert decompose.main(["--input", str(source), "--output", str(tmp_path / "o")]) == 1
    assert "begun with another input" in capsys.readouterr().err


def test_a_bug_in_decomposing_keeps_its_traceback(files, monkeypatch, capsys):
    def broken(*_):
        return dict(zip([1, 2], [1], strict=True))

    monkeypatch.setattr(pipeline, "find_cycle", broken)
    with fake_llm.serve(FakeModel()) as url, pytest.raises(ValueError, match="zip") as caught:
        decompose.main(served(files, url))
    assert caught.traceback[-1].name == "broken"
    assert "error: " not in capsys.readouterr().err
    assert lines_of(files) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "x"], "--input and --output are needed"),
        (["--check", "x", "--output", "y"], "--check stands alone"),
        (["--concurrency", "0"], "must be at least 1"),
        (["--requests-per-minute", "-1"], "must not be negative"),
        (["--timeout-seconds", "0"], "must be positive"),
        (["--json-schema"], "needs --llm openai"),
        (["--llm", "openai:http://127.0.0.1:1/v1"], "needs --model"),
    ],
)
def test_wrong_usage_ends_with_code_2(flags, message, capsys):
    complete = (
        flags if flags[0] in ("--input", "--check") else ["--input", "i", "--output", "o", *flags]
    )
    with pytest.raises(SystemExit) as stop:
        decompose.main(complete)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ("gpt", "expected openai:URL"),
        ("openai:", "expected openai:URL"),
        ("openai:ftp://x", "http(s)://HOST"),
    ],
)
def test_unknown_models_end_with_code_2(files, llm, message, capsys):
    assert decompose.main([*files, "--llm", llm, "--model", "m"]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_explained(files, tmp_path, capsys):
    assert decompose.main([*files, "--llm", f"hf:{tmp_path}"]) == 1
    assert "has no config.json" in capsys.readouterr().err
