"""The scripts that start judges and a run, against stand-ins of srun, gcloud, xpk and others.

A dry run prints what a real start would run; a real start calls the stand-ins with it.
"""

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

ROOT = pathlib.Path(__file__).parent.parent.parent
JUDGE = ("--judge=vllm", "--judge-model=ORG/MODEL")
ENDPOINT_FIELD = "--config.verifier.endpoints="

# Every stand-in notes its name and arguments; some act as the program would.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, subprocess, sys, time

name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
environment = {{key: os.environ[key] for key in os.environ if key.startswith(
    ("CUDA_VISIBLE", "NUM_PROCESSES", "PROCESS_ID", "COORDINATOR", "HOST", "PORT", "LOGS"))}}
call = {{"name": name, "words": words, "environment": environment}}
if name == "kubectl" and "-f" in words:
    call["input"] = sys.stdin.read()
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(call) + "\\n")
if name == "nvidia-smi":
    print("0\\n1\\n2")
elif name == "scontrol" and words[0] == "show":
    print(words[2].replace(",", "\\n"))
elif name == "srun":
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    node = next((w for w in words if w.startswith("--nodelist=")), "--nodelist=het").split("=")[1]
    os.environ.update(SLURM_PROCID="0", SLURM_LOCALID="3", SLURMD_NODENAME=node.split(",")[0])
    os.execvp(words[first], words[first:])
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
    time.sleep(60)
elif name == "gcloud" and "describe" in words:
    print("ACTIVE" if "queued-resources" in words else "10.0.0.7")
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
    "curl", "gcloud", "kubectl", "nvidia-smi", "python", "sbatch", "scontrol", "sglang", "srun",
    "vllm", "xpk",
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
    found = {run["environment"]["PROCESS_ID"]: run["environment"] for run in runs}
    assert {number: found[number]["CUDA_VISIBLE_DEVICES"] for number in found} == {
        "0": "0",
        "1": "1",
    }
    assert {variables["NUM_PROCESSES"] for variables in found.values()} == {"2"}
    assert {variables["COORDINATOR_ADDRESS"] for variables in found.values()} == {"127.0.0.1:9876"}


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


def test_slurm_tells_the_run_of_the_time_limit(environment, tmp_path, calls):
    assert "#SBATCH --signal=B:TERM@300" in (ROOT / "launch" / "slurm.sh").read_text()
    waits = tmp_path / "waits"
    process = subprocess.Popen(
        ["./launch/slurm.sh"],
        cwd=ROOT,
        env=environment | JOB | {"TRAIN_WAITS": str(waits)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not waits.exists() and process.poll() is None:
        time.sleep(0.02)
    # The batch shell alone gets it; it tells srun, which tells shell and process of every task.
    process.send_signal(signal.SIGTERM)
    tasks = f"/proc/{process.pid}/task/{process.pid}/children"
    (task,) = pathlib.Path(tasks).read_text().split()
    for child in pathlib.Path(f"/proc/{task}/task/{task}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert ["requeue", "17"] in [call["words"] for call in calls("scontrol")]


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
    assert words[:2] == ["JAX_PLATFORMS=tpu", "DISTRIBUTED=1"]
    address = "n-judge.default.svc.cluster.local:8000/v1"
    assert endpoints(words) == (f"http://n-judge-0.{address}", f"http://n-judge-1.{address}")


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
