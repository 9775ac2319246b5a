"""The scripts that start judges and a run, against stand-ins of srun, gcloud, xpk and others.

A dry run prints what a real start would run; a real start calls the stand-ins with it.
"""

import importlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from alphagrpo_jax.planning import chips

ROOT = pathlib.Path(__file__).parent.parent.parent
JUDGE = ("--judge=vllm", "--judge-model=ORG/MODEL")
ENDPOINT_FIELD = "--config.verifier.endpoints="

# Every stand-in notes its name and arguments; some act as the program would.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, subprocess, sys, time

name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
environment = {{key: os.environ[key] for key in os.environ if key.startswith(
    ("CUDA_VISIBLE", "NUM_PROCESSES", "PROCESS_ID", "COORDINATOR", "HOST", "PORT", "XLA_"))}}
call = {{"name": name, "words": words, "environment": environment}}
if name == "kubectl" and "-f" in words:
    call["input"] = sys.stdin.read()
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(call) + "\\n")
if name == "nvidia-smi":
    print("0\\n1\\n2")
elif name == "scontrol" and words[:2] == ["show", "job"]:
    print("JobId=" + words[2], "   JobState=" + os.environ.get("JOB_STATE", "RUNNING"), sep="\\n")
elif name == "scontrol" and words[0] == "show":
    print(words[2].replace(",", "\\n"))
elif name == "srun":
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    node = next((w for w in words if w.startswith("--nodelist=")), "--nodelist=het").split("=")[1]
    step = sum('"srun"' in line for line in open(os.environ["CALLS"])) - 1
    os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="3", SLURMD_NODENAME=node.split(",")[0],
                      SLURM_STEP_ID=str(step))
    task = None

    def end(*_):  # srun kills its tasks at once, and says so
        print("srun: forcing job termination", file=sys.stderr)
        if task is not None:
            os.killpg(task.pid, signal.SIGKILL)
        os._exit(143)

    signal.signal(signal.SIGTERM, end)
    time.sleep(float(os.environ.get("SRUN_DELAY", "0")))
    task = subprocess.Popen(words[first:], start_new_session=True)
    job_step = os.environ["SLURM_JOB_ID"] + "." + str(step)
    pathlib.Path(os.environ["CALLS"] + "." + job_step).write_text(str(task.pid))
    sys.exit(task.wait())
elif name == "scancel":
    task = pathlib.Path(os.environ["CALLS"] + "." + words[-1])
    while not task.exists():
        time.sleep(0.01)
    os.killpg(int(task.read_text()), signal.SIGTERM)
elif name == "curl":  # a judge is healthy once it has been started
    port = words[-1].split("/")[2].split(":")[1]
    started = [json.loads(line) for line in open(os.environ["CALLS"])]
    judges = [call for call in started if "MODEL" in " ".join(call["words"])]
    is_up = any(call["environment"].get("PORT") == port for call in judges)
    sys.exit(int(os.environ.get("CURL_CODE", "0")) or 7 * (not is_up))
elif name == "vllm" or "sglang.launch_server" in words:
    print("loading " + "x" * 10, "CUDA out of memory", sep="\\n", flush=True)
    if os.environ.get("JUDGE_ENDS") in ("all", os.environ.get("PORT")):
        sys.exit(1)
    if seconds := float(os.environ.get("JUDGE_END_DELAY", "0")):
        signal.signal(signal.SIGTERM, lambda *_: time.sleep(seconds) or sys.exit(0))
    time.sleep(60)
elif name == "gcloud" and "queued-resources" in words and "describe" in words:
    states = pathlib.Path(os.environ["CALLS"] + ".states")  # one per question; the last one stays
    if not states.exists():
        states.write_text(os.environ.get("SLICE_STATES", "NOT_FOUND ACTIVE"))
    now, *later = states.read_text().split()
    if later:
        states.write_text(" ".join(later))
    print("WARNING: of some kind", file=sys.stderr)
    if now in ("NOT_FOUND", "UNAVAILABLE"):
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) " + now + ": no")
    print(now)
elif name == "gcloud" and "queued-resources" in words:
    sys.exit(int(os.environ.get("CREATE_CODE", "0")) if "create" in words else 0)
elif name == "gcloud" and "describe" in words:
    print("10.0.0.7")
elif name == "gcloud" and "--worker=0" in words:
    sys.exit(int(os.environ.get("CURL_CODE", "0")))
elif name == "kubectl" and words[0] == "rollout":
    sys.exit(int(os.environ.get("CURL_CODE", "0")))
elif name == "python":
    if os.environ.get("TRAIN_WAITS"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        pathlib.Path(os.environ["TRAIN_WAITS"]).touch()
        time.sleep(60)
    sys.exit(int(os.environ.get("TRAIN_CODE", "0")))
"""
NAMES = (
    "curl", "gcloud", "kubectl", "nvidia-smi", "python", "sbatch", "scancel", "scontrol", "sglang",
    "srun", "vllm", "xpk",
)  # fmt: skip


@pytest.fixture
def environment(tmp_path):
    """Variables of a start in which nothing but stand-ins is called."""
    folder, venv = tmp_path / "programs", tmp_path / "venv"
    folder.mkdir()
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").touch()
    (venv / "installed").write_text(".[tests]\n")
    for name in NAMES:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return kept | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls.jsonl"),
        "VENV": str(venv),
        "EXTRAS": "",
        "LOGS": str(tmp_path / "logs"),
        "POLL_SECONDS": "0.1",
    }


@pytest.fixture
def calls(tmp_path):
    """calls(name): arguments of every call of a stand-in, with what it was given beside them."""

    def calls(name):
        path = tmp_path / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call["name"] == name]

    return calls


@pytest.fixture
def launch(environment):
    """launch(script, *arguments, **variables): the finished process."""

    def launch(script, *arguments, **variables):
        return subprocess.run(
            [f"./launch/{script}", *arguments],
            cwd=ROOT,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return launch


def train_words(call) -> list[str]:
    """Arguments of the training command."""
    assert call["words"][:2] == ["-m", "alphagrpo_jax.train"]
    return call["words"][2:]


def endpoints(words) -> tuple[str, ...]:
    """The endpoints that a run is given."""
    (field,) = [word for word in words if word.startswith(ENDPOINT_FIELD)]
    return eval(field.removeprefix(ENDPOINT_FIELD))


def printed_commands(text: str) -> list[list[str]]:
    """Commands of a dry run, as a shell reads them, with neither comments nor redirections."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [shlex.split(line.partition(" > ")[0].removesuffix(" &")) for line in lines]


STARTS = {
    "gpus.sh": (*JUDGE, "--judge-cards=2"),
    "slurm.sh": (*JUDGE, "--judge-nodes=1"),
    "tpu.sh": (*JUDGE, "--name=pod", "--zone=z", "--create=v5p-128", "--judge-vms=vm"),
    "gke.sh": (*JUDGE, "--name=n", "--cluster=c", "--zone=z", "--project=p", "--tpu-type=v5p-128",
               "--image=i", "--judge-accelerator=nvidia-h100-80gb"),
}  # fmt: skip


@pytest.mark.parametrize("script", STARTS)
def test_a_dry_run_prints_commands_and_calls_nothing(launch, calls, script):
    result = launch(script, "--dry-run", *STARTS[script], "--config=configs/srr.py")
    assert result.returncode == 0, result.stderr
    assert "--config=configs/srr.py" in result.stdout
    assert "ORG/MODEL" in result.stdout
    assert ENDPOINT_FIELD in result.stdout
    assert not [name for name in NAMES if name != "nvidia-smi" and calls(name)]


@pytest.mark.parametrize("script", STARTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--judge=other",), "expected ours, vllm or sglang"),
     (("--judge-model=",), "needs --judge-model"),
     (("--judge-seconds=soon",), "expected whole seconds")],
)  # fmt: skip
def test_wrong_flags_are_refused_before_anything_starts(launch, calls, script, arguments, message):
    result = launch(script, *STARTS[script], *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert not [name for name in NAMES if calls(name)]


def test_one_machine_gives_judges_their_cards_and_the_run_the_others(launch, calls):
    result = launch("gpus.sh", *JUDGE, "--judge-cards=0,2", "--config.seed=3")
    assert result.returncode == 0, result.stderr
    cards = {call["environment"]["PORT"]: call["environment"] for call in calls("vllm")}
    assert {port: cards[port]["CUDA_VISIBLE_DEVICES"] for port in cards} == {
        "8000": "0",
        "8001": "2",
    }
    assert {port: cards[port]["HOST"] for port in cards} == dict.fromkeys(cards, "127.0.0.1")
    (train,) = calls("python")
    assert train["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    words = train_words(train)
    assert words[0] == "--config=configs/grpo.py"  # what changes its fields stands behind it
    assert words[-1] == "--config.seed=3"
    assert endpoints(words) == ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1")
    assert {"--config.verifier.kind=openai", "--config.verifier.model=ORG/MODEL"} <= set(words)


def test_a_judge_over_several_cards_and_a_process_per_card(launch, calls):
    result = launch(
        "gpus.sh", "--judge=sglang", "--judge-model=MODEL", "--judge-cards=4+5", "--cards=0,1",
        "--per-card", '--judge-args=--mem-fraction-static 0.8',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # `python -m sglang.launch_server`: the judge is one of the calls of python.
    by_module = {call["words"][1]: call for call in calls("python")}
    judge = by_module["sglang.launch_server"]
    assert judge["environment"]["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert judge["words"][-4:] == ["--tp", "2", "--mem-fraction-static", "0.8"]
    runs = [call for call in calls("python") if call["words"][1] == "alphagrpo_jax.train"]
    by_process = {run["environment"]["PROCESS_ID"]: run["environment"] for run in runs}
    assert {number: by_process[number]["CUDA_VISIBLE_DEVICES"] for number in by_process} == {
        "0": "0",
        "1": "1",
    }
    assert {variables["NUM_PROCESSES"] for variables in by_process.values()} == {"2"}
    assert {variables["COORDINATOR_ADDRESS"] for variables in by_process.values()} == {
        "127.0.0.1:9876"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((*JUDGE, "--judge-cards=1", "--cards=0,1"), "card 1 is in --cards=0,1 and in"),
     ((*JUDGE, "--judge-cards=0,1,2"), "the judges have all cards"),
     (JUDGE, "needs --judge-cards"),
     (("--judge-cards=0",), "needs --judge=SERVER")],
)  # fmt: skip
def test_a_card_is_a_judges_or_the_runs(launch, calls, arguments, message):
    result = launch("gpus.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert calls("python") == []


@pytest.mark.parametrize(("variables", "fraction"), [({}, "0.92"), (
    {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".8"}, ".8")], ids=["default", "given"])  # fmt: skip
@pytest.mark.parametrize("script", ["gpus.sh", "slurm.sh"])
def test_jax_takes_of_a_card_what_plans_count_on(launch, calls, script, variables, fraction):
    result = launch(script, *STARTS[script], **JOB, **variables)
    assert result.returncode == 0, result.stderr
    (train,) = calls("python")
    assert train["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == fraction
    judges = [call["environment"].get("XLA_PYTHON_CLIENT_MEM_FRACTION") for call in calls("vllm")]
    assert set(judges) == {variables.get("XLA_PYTHON_CLIENT_MEM_FRACTION")}


def test_launchers_and_plans_agree_on_the_share_of_a_card():
    for script in ("gpus.sh", "slurm.sh"):
        text = (ROOT / "launch" / script).read_text()
        name = chips.GPU_FRACTION_VARIABLE
        assert f"{name}=${{{name}:-{chips.GPU_FRACTION}}}" in text


ARGUMENTS = [
    ("", []),
    (' --x {"a":1}  -y', ["--x", '{"a":1}', "-y"]),
    ("""--mm '{"image": 2}' --z='a  b' ''""", ["--mm", '{"image": 2}', "--z=a  b", ""]),
    ("--glob * $(touch no) `x` $HOME", ["--glob", "*", "$(touch", "no)", "`x`", "$HOME"]),
]


@pytest.mark.parametrize(("text", "words"), ARGUMENTS)
def test_arguments_of_judges_may_have_blanks(launch, calls, text, words):
    """On this machine, on nodes of a job and in the manifest of pods, all split alike."""
    for script, variables in (("gpus.sh", {}), ("slurm.sh", JOB | {"FIRST_PORT": "8100"})):
        result = launch(script, *STARTS[script], f"--judge-args={text}", "--gpus=1", **variables)
        assert result.returncode == 0, result.stderr
    expected = ["--limit-mm-per-prompt", '{"image": 1}', *words]
    for call in calls("vllm"):
        assert call["words"][-len(expected) :] == expected
    assert len(calls("vllm")) == 2
    assert launch("gke.sh", *STARTS["gke.sh"], f"--judge-args={text}").returncode == 0
    judges, _ = yaml.safe_load_all(calls("kubectl")[0]["input"])
    (container,) = judges["spec"]["template"]["spec"]["containers"]
    assert container["command"][10:] == ["--tensor-parallel-size", "1", *words]


@pytest.mark.parametrize(
    ("text", "message"),
    [("--x 'a b", "single quotes do not match"), ('--x "a b"', "expected single quotes around")],
)
@pytest.mark.parametrize("script", STARTS)
def test_arguments_of_judges_with_wrong_quotes_are_refused(launch, calls, script, text, message):
    result = launch(script, *STARTS[script], f"--judge-args={text}")
    assert result.returncode == 2
    assert message in result.stderr
    assert not [name for name in NAMES if calls(name)]


def test_judges_that_run_already_are_handed_over(launch, calls):
    result = launch("gpus.sh", "--endpoints=http://a:1/v1,http://b:2/v1")
    assert result.returncode == 0, result.stderr
    words = train_words(calls("python")[0])
    assert endpoints(words) == ("http://a:1/v1", "http://b:2/v1")
    assert not [word for word in words if word.startswith("--config.verifier.model")]


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"JUDGE_ENDS": "all"}, "has ended before it was healthy"),
     ({}, "was not healthy within 5 s (--judge-seconds)")],
    ids=["ends", "hangs"],
)  # fmt: skip
def test_a_judge_that_is_not_healthy_ends_the_start_with_its_log(launch, calls, variables, message):
    result = launch(
        "gpus.sh", *JUDGE, "--judge-cards=2", "--judge-seconds=5", CURL_CODE="7", **variables
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert "CUDA out of memory" in result.stderr
    assert calls("python") == []


def test_the_end_of_any_judge_ends_the_start(launch, calls):
    """Not only of the one whose turn it is to be waited for."""
    result = launch("gpus.sh", *JUDGE, "--judge-cards=1,2", CURL_CODE="7", JUDGE_ENDS="8001")
    assert result.returncode == 1
    assert "http://127.0.0.1:8001/v1 has ended before it was healthy" in result.stderr
    assert calls("python") == []
    assert not running("serve ORG/MODEL --host 127.0.0.1")


def test_judges_are_started_beside_those_that_run_already(launch, calls):
    result = launch("gpus.sh", *JUDGE, "--judge-cards=2", "--endpoints=http://a:1/v1")
    assert result.returncode == 0, result.stderr
    words = train_words(calls("python")[0])
    assert endpoints(words) == ("http://a:1/v1", "http://127.0.0.1:8000/v1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ["gpus.sh", "slurm.sh"])
def test_a_signal_during_the_wait_ends_the_judges(environment, tmp_path, script, number, calls):
    process = subprocess.Popen(
        [f"./launch/{script}", *STARTS[script]],
        cwd=ROOT,
        env=environment | JOB | {"CURL_CODE": "7"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not calls("vllm") and process.poll() is None:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) != 0
    assert calls("python") == []
    for _ in range(600):
        if not running("serve ORG/MODEL --host"):
            break
        time.sleep(0.05)
    assert not running("serve ORG/MODEL --host")


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_the_runs_and_judges_end(launch, calls, code):
    result = launch("gpus.sh", *JUDGE, "--judge-cards=2", TRAIN_CODE=str(code))
    assert result.returncode == code
    assert len(calls("vllm")) == 1
    assert not running("serve ORG/MODEL --host 127.0.0.1")


@pytest.mark.parametrize(
    ("variables", "least", "most"),
    [
        ({"JUDGE_END_DELAY": "1"}, 1, 30),
        ({"JUDGE_END_DELAY": "50", "JUDGE_END_SECONDS": "1"}, 0, 40),
    ],
    ids=["slow to end", "killed"],
)
def test_the_end_waits_for_judges_and_kills_those_that_stay(launch, variables, least, most):
    began = time.monotonic()
    result = launch("gpus.sh", *JUDGE, "--judge-cards=2", **variables)
    assert result.returncode == 0, result.stderr
    assert not running("serve ORG/MODEL --host 127.0.0.1")
    assert least <= time.monotonic() - began < most


@pytest.mark.parametrize("seconds", ["1.5", "soon", "-1"])
def test_seconds_that_are_no_number_are_refused_before_judges_start(launch, calls, seconds):
    result = launch("gpus.sh", *JUDGE, "--judge-cards=2", JUDGE_END_SECONDS=seconds)
    assert result.returncode == 2
    assert f"JUDGE_END_SECONDS={seconds}, expected whole seconds" in result.stderr
    assert calls("vllm") == []


def running(words: str) -> list[str]:
    """Command lines of processes that contain some words."""
    lines = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it has just ended
    return [line for line in lines if words in line and str(os.getpid()) not in line]


def test_a_stop_is_handed_on_to_the_run(environment, tmp_path):
    waits = tmp_path / "waits"
    process = subprocess.Popen(
        ["./launch/gpus.sh", "--cards=0"],
        cwd=ROOT,
        env=environment | {"TRAIN_WAITS": str(waits)},
        stderr=subprocess.DEVNULL,
    )
    while not waits.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1,n2,n3"}


def test_slurm_submits_one_job_for_run_and_judges(launch, calls):
    arguments = (
        "--nodes=7",
        "--judge-nodes=1",
        *JUDGE,
        "--cpus=96",
        "--sbatch=--time=9:00:00 -p a",
    )
    result = launch("slurm.sh", *arguments, "--workdir=w")
    assert result.returncode == 0, result.stderr
    (call,) = calls("sbatch")
    assert call["words"] == [
        "--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=1", "--cpus-per-task=96",
        "--time=9:00:00", "-p", "a", "launch/slurm.sh", *arguments, "--workdir=w",
    ]  # fmt: skip
    assert calls("srun") == []


def test_slurm_submits_a_heterogeneous_job(launch, calls):
    arguments = ("--judge-nodes=1", *JUDGE, "--per-card", "--sbatch=-p a", "--judge-sbatch=-p b")
    result = launch("slurm.sh", *arguments)
    assert result.returncode == 0, result.stderr
    assert calls("sbatch")[0]["words"] == [
        "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=8", "-p", "a",
        ":", "--nodes=1", "--gpus-per-node=8", "--ntasks-per-node=1", "--cpus-per-task=64",
        "-p", "b", "launch/slurm.sh", *arguments,
    ]  # fmt: skip


def test_slurm_splits_the_nodes_of_a_job(launch, calls):
    arguments = ("--judge-nodes=1", *JUDGE, "--judge-gpus=4")
    result = launch("slurm.sh", *arguments, **JOB)
    assert result.returncode == 0, result.stderr
    judges, run = calls("srun")
    assert {"--nodelist=n3", "--nodes=1", "--cpus-per-task=64"} <= set(judges["words"])
    servers = {call["environment"]["CUDA_VISIBLE_DEVICES"]: call for call in calls("vllm")}
    assert set(servers) == {"0,1,2,3", "4,5,6,7"}
    assert all(call["words"][-2:] == ["--tensor-parallel-size", "4"] for call in servers.values())
    assert {call["environment"]["HOST"] for call in servers.values()} == {"0.0.0.0"}
    assert {"--nodelist=n1,n2", "--nodes=2", "--ntasks=2", "--cpus-per-task=64"} <= set(
        run["words"]
    )
    (train,) = calls("python")
    assert train["environment"]["COORDINATOR_ADDRESS"] == "n1:9876"
    assert train["environment"]["NUM_PROCESSES"] == "2"
    assert train["environment"]["PROCESS_ID"] == "0"
    assert endpoints(train_words(train)) == ("http://n3:8000/v1", "http://n3:8001/v1")
    assert not [call for call in calls("scontrol") if call["words"][0] == "requeue"]


def test_judges_of_a_slurm_job_that_end_end_the_job(launch, calls):
    """One of them is enough: the others of its node end with it, and nobody waits for minutes."""
    result = launch(
        "slurm.sh", "--judge-nodes=1", *JUDGE, "--gpus=2", **JOB, CURL_CODE="7", JUDGE_ENDS="8001"
    )
    assert result.returncode == 1
    assert "has ended before it was healthy" in result.stderr
    assert "CUDA out of memory" in result.stderr
    assert len(calls("vllm")) == 2
    assert len(calls("srun")) == 1


def test_slurm_uses_the_parts_of_a_heterogeneous_job(launch, calls):
    variables = {
        "SLURM_HET_SIZE": "2",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n1,n2",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "g1",
    }
    result = launch("slurm.sh", "--judge-nodes=1", "--per-card", *JUDGE, **JOB, **variables)
    assert result.returncode == 0, result.stderr
    judges, run = calls("srun")
    assert "--het-group=1" in judges["words"]
    assert {"--het-group=0", "--ntasks=16", "--ntasks-per-node=8"} <= set(run["words"])
    (train,) = calls("python")
    assert train["environment"]["NUM_PROCESSES"] == "16"
    assert train["environment"]["CUDA_VISIBLE_DEVICES"] == "3"  # of the task's number on its node
    assert len(endpoints(train_words(train))) == 8


@pytest.mark.parametrize(("code", "is_requeued"), [(75, True), (0, False), (1, False)])
def test_slurm_requeues_a_stopped_run_and_no_other(launch, calls, code, is_requeued):
    result = launch("slurm.sh", **JOB, TRAIN_CODE=str(code))
    assert result.returncode == code, result.stderr
    requeues = [call["words"] for call in calls("scontrol") if call["words"][0] == "requeue"]
    assert requeues == ([["requeue", "17"]] if is_requeued else [])


def test_slurm_requeues_no_job_that_was_canceled(launch, calls):
    result = launch("slurm.sh", **JOB, TRAIN_CODE="75", JOB_STATE="COMPLETING")
    assert result.returncode == 75
    assert "does not go into the queue again" in result.stderr
    assert not [call for call in calls("scontrol") if call["words"][0] == "requeue"]


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize(("arguments", "step"), [((), 0), (("--judge-nodes=1", *JUDGE), 1)])
def test_slurm_tells_the_run_of_the_time_limit(
    environment, tmp_path, calls, arguments, step, is_early
):
    """The step of the run and no other is told, also where its tasks do not run yet.

    srun must not be told: it kills its tasks.
    """
    assert "#SBATCH --signal=B:TERM@300" in (ROOT / "launch" / "slurm.sh").read_text()
    waits = tmp_path / "waits"

    def has_begun():
        return len(calls("srun")) > step if is_early else waits.exists()

    process = subprocess.Popen(
        ["./launch/slurm.sh", "--gpus=1", *arguments],
        cwd=ROOT,
        env=environment
        | JOB
        | {"TRAIN_WAITS": str(waits), "SRUN_DELAY": "0.5" if is_early else "0"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not has_begun() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # the batch shell alone gets it
    assert process.wait(timeout=60) == 75
    assert [call["words"] for call in calls("scancel")] == [["--signal=TERM", f"17.{step}"]]
    assert ["requeue", "17"] in [call["words"] for call in calls("scontrol")]
    assert not list((tmp_path / "logs").glob("step_*"))


def test_slurm_leaves_a_node_to_the_run(launch):
    result = launch("slurm.sh", "--judge-nodes=3", *JUDGE, **JOB)
    assert result.returncode == 2
    assert "the job has 3 nodes, and the judges have 3" in result.stderr


def test_a_pod_is_asked_for_and_gets_its_judges(launch, calls):
    result = launch(
        "tpu.sh", *STARTS["tpu.sh"], "--project=p", "--spot", "--judge-cards=0,1", "--workdir=w x"
    )
    assert result.returncode == 0, result.stderr
    words = [call["words"] for call in calls("gcloud")]
    where = ["--zone=z", "--project=p"]
    assert words.pop(0)[:5] == ["compute", "tpus", "queued-resources", "describe", "pod"]
    assert words[0] == [
        "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", *where,
        "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--spot",
    ]  # fmt: skip
    assert words[1][:5] == ["compute", "tpus", "queued-resources", "describe", "pod"]
    assert words[2][:5] == ["compute", "ssh", "vm", *where]
    command = words[2][-1]
    assert "./launch/node_judges.sh --judge=vllm --judge-model=ORG/MODEL" in command
    assert "--judge-cards=0,1" in command
    waits = [call for call in words if "--worker=0" in call]
    assert ["8000/health" in waits[0][-1], "8001/health" in waits[1][-1]] == [True, True]
    run, end = words[-2:]
    assert end[:3] == ["compute", "ssh", "vm"]
    assert "kill" in end[-1]
    assert run[:4] == ["compute", "tpus", "tpu-vm", "ssh"]
    assert "--worker=all" in run
    remote = shlex.split(run[-1].removeprefix("--command=").partition(" && ")[2])
    assert remote[0] == "./launch/tpu_pod.sh"
    assert endpoints(remote) == ("http://10.0.0.7:8000/v1", "http://10.0.0.7:8001/v1")
    assert remote[-1] == "--workdir=w x"


def slice_calls(calls) -> list[str]:
    """What a start did with the queued resource, and whether a run began."""
    words = [call["words"] for call in calls("gcloud")]
    runs = ["run" for call in words if "--worker=all" in call]
    return [call[3] for call in words if "queued-resources" in call] + runs


CREATED = ["create", "describe", "run"]


@pytest.mark.parametrize(
    ("states", "expected"),
    [("ACTIVE", ["describe", "run"]),
     ("PROVISIONING ACTIVE", ["describe", "describe", "run"]),
     ("NOT_FOUND ACTIVE", ["describe", *CREATED]),
     ("SUSPENDED ACTIVE", ["describe", "delete", *CREATED]),
     ("FAILED ACTIVE", ["describe", "delete", *CREATED]),
     ("SUSPENDING SUSPENDED ACTIVE", ["describe", "describe", "delete", *CREATED]),
     ("UNAVAILABLE UNAVAILABLE ACTIVE", ["describe", "describe", "describe", "run"])],
)  # fmt: skip
def test_the_same_command_continues_on_a_slice_of_any_state(launch, calls, states, expected):
    result = launch(
        "tpu.sh", "--name=pod", "--zone=z", "--create=v5p-128", "--spot", SLICE_STATES=states
    )
    assert result.returncode == 0, result.stderr
    assert slice_calls(calls) == expected


@pytest.mark.parametrize(
    ("states", "message"),
    [("NOT_FOUND FAILED", "the queued resource pod is FAILED"),
     ("SUSPENDED SUSPENDED", "the queued resource pod is SUSPENDED"),
     ("UNAVAILABLE", "the state of the queued resource pod is not known"),
     ("NOT_FOUND PROVISIONING UNAVAILABLE", "the state of the queued resource pod is not known")],
)  # fmt: skip
def test_a_slice_that_does_not_come_ends_the_start(launch, calls, states, message):
    result = launch("tpu.sh", *STARTS["tpu.sh"], SLICE_STATES=states)
    assert result.returncode == 2
    assert message in result.stderr
    assert slice_calls(calls).count("create") == (states != "UNAVAILABLE")
    assert "run" not in slice_calls(calls)
    if "UNAVAILABLE" in states:
        assert result.stderr.count("UNAVAILABLE: no") == 5


def test_a_slice_that_is_refused_ends_the_start(launch, calls):
    assert launch("tpu.sh", *STARTS["tpu.sh"], CREATE_CODE="3").returncode == 3
    assert slice_calls(calls) == ["describe", "create"]


def test_hosts_of_a_slice_are_set_up_before_judges_and_run(launch, calls):
    result = launch("tpu.sh", *STARTS["tpu.sh"], "--setup=git clone A && mount B")
    assert result.returncode == 0, result.stderr
    words = [call["words"] for call in calls("gcloud")]
    setup, run = [number for number, call in enumerate(words) if "--worker=all" in call]
    assert words[setup][-1] == "--command=git clone A && mount B"
    assert setup < min(number for number, call in enumerate(words) if call[1:3] == ["ssh", "vm"])
    assert "tpu_pod.sh" in words[run][-1]


def test_judges_of_a_pod_that_are_not_healthy_end_the_start(launch, calls):
    result = launch("tpu.sh", *STARTS["tpu.sh"], CURL_CODE="1")
    assert result.returncode == 1
    assert "on vm was not healthy within 1200 s" in result.stderr
    words = [call["words"] for call in calls("gcloud")]
    assert "tail -n 20" in words[-2][-1]
    assert "kill" in words[-1][-1]
    assert not [call for call in words if "--worker=all" in call]


def test_judges_of_a_vm_start_and_end_by_what_the_pod_script_sends(launch, calls, tmp_path):
    script = tmp_path / "alphagrpo_jax" / "launch" / "node_judges.sh"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/bash\necho $$\nsleep 60 & touch {tmp_path}/up; wait\n")
    script.chmod(0o755)
    launch("tpu.sh", *STARTS["tpu.sh"])
    ssh = [call["words"][-1] for call in calls("gcloud") if call["words"][1:3] == ["ssh", "vm"]]
    start, end = (word.removeprefix("--command=") for word in ssh)
    subprocess.run(["bash", "-c", start], cwd=tmp_path, check=True, timeout=60)
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    logs = tmp_path / "alphagrpo_jax" / "runs" / "logs"
    pid = int((logs / "judges.pid").read_text())
    assert int((logs / "judges.log").read_text()) == pid
    subprocess.run(["bash", "-c", end], cwd=tmp_path, check=True, timeout=60)
    for _ in range(600):
        if not pathlib.Path(f"/proc/{pid}/cmdline").exists():
            break
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_gke_gets_judges_with_an_address_each_and_one_workload(launch, calls):
    result = launch("gke.sh", *STARTS["gke.sh"], "--judges=2", '--judge-args=--x {"a":1}')
    assert result.returncode == 0, result.stderr
    judges, service = yaml.safe_load_all(calls("kubectl")[0]["input"])
    assert judges["spec"]["replicas"] == 2
    pod = judges["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    command = pod["containers"][0]["command"]
    assert command[:3] == ["vllm", "serve", "ORG/MODEL"]
    assert command[-2:] == ["--x", '{"a":1}']
    assert service["spec"]["clusterIP"] == "None"
    (workload,) = calls("xpk")
    assert workload["words"][:2] == ["workload", "create"]
    assert {
        "--workload=n", "--cluster=c", "--zone=z", "--project=p", "--tpu-type=v5p-128",
        "--num-slices=1", "--docker-image=i", "--max-restarts=100", "--restart-on-exit-codes=75",
    } <= set(workload["words"])  # fmt: skip
    (remote,) = [word for word in workload["words"] if word.startswith("--command=")]
    words = shlex.split(remote.removeprefix("--command="))
    # The shell that calls it must not stand between SIGTERM and the run.
    assert words[:5] == ["exec", "env", "JAX_PLATFORMS=tpu", "DISTRIBUTED=1", "python"]
    address = "n-judge.default.svc.cluster.local:8000/v1"
    assert endpoints(words) == (f"http://n-judge-0.{address}", f"http://n-judge-1.{address}")


def test_judges_of_gke_over_several_cards_have_shared_memory(launch, calls):
    assert launch("gke.sh", *STARTS["gke.sh"], "--judge-gpus=4").returncode == 0
    judges, _ = yaml.safe_load_all(calls("kubectl")[0]["input"])
    pod = judges["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert "--tensor-parallel-size 4" in " ".join(container["command"])
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == "/dev/shm"
    assert pod["volumes"] == [{"name": mount["name"], "emptyDir": {"medium": "Memory"}}]


def test_judges_of_gke_are_served_as_by_the_script_of_one_machine(launch, calls):
    launch("gke.sh", *STARTS["gke.sh"])
    judges, _ = yaml.safe_load_all(calls("kubectl")[0]["input"])
    (container,) = judges["spec"]["template"]["spec"]["containers"]
    launch("verifiers.sh", "vllm", "ORG/MODEL", HOST="0.0.0.0", JUDGE_ENDS="all")
    (call,) = calls("vllm")
    assert container["command"] == ["vllm", *call["words"], "--tensor-parallel-size", "1"]


@pytest.mark.parametrize("name", ["bagel_7b_rt2i", "bagel_7b_srr"])
def test_large_configurations_name_the_judge_as_it_is_served(name):
    """vLLM and SGLang serve a model by the name they are started with, that of the hub."""
    config = importlib.import_module(f"configs.{name}").get_config()
    assert config.verifier.kind == "openai"
    served = re.findall(r"--judge-model=(\S+)", (ROOT / "docs" / "launching.md").read_text())
    assert config.verifier.model in served


def test_judges_of_gke_that_are_not_healthy_end_the_start(launch, calls):
    result = launch("gke.sh", *STARTS["gke.sh"], CURL_CODE="1")
    assert result.returncode == 1
    assert "the judges were not healthy within 1200 s" in result.stderr
    assert [call["words"][0] for call in calls("kubectl")[-2:]] == ["logs", "delete"]
    assert calls("xpk") == []


def test_a_dry_run_prints_what_a_real_start_calls(launch, calls):
    arguments = (*JUDGE, "--judge-cards=2", "--config.seed=3")
    judge, run = printed_commands(launch("gpus.sh", "--dry-run", *arguments).stdout)
    assert launch("gpus.sh", *arguments).returncode == 0
    (train,) = calls("python")
    assert run[-len(train["words"]) :] == train["words"]
    assert run[:2] == [
        "env",
        f"CUDA_VISIBLE_DEVICES={train['environment']['CUDA_VISIBLE_DEVICES']}",
    ]
    assert judge[:2] == ["env", "PORT=8000"]
    assert judge[4:] == ["./launch/verifiers.sh", "vllm", "ORG/MODEL"]


def shown_dry_runs() -> list[tuple[str, str]]:
    """Commands and outputs of the manual's dry runs."""
    text = (ROOT / "docs" / "launching.md").read_text()
    return re.findall(
        r"```bash\n(\./launch/\S+ --dry-run.*?)```\n\n```text\n(.*?)```", text, re.DOTALL
    )


def test_the_manual_shows_what_dry_runs_print(environment):
    shown = shown_dry_runs()
    assert {command.split()[0] for command, _ in shown} == {f"./launch/{name}" for name in STARTS}
    variables = {key: value for key, value in environment.items() if key != "LOGS"}
    for command, output in shown:
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert result.stdout == output, command
