"""Several processes on this machine, as on several hosts: the same numbers, and the same end."""

import json
import math
import re
import resource
import shutil
import signal
import sys
import time

import pytest

# Far more than the 30 s in which every process should end: a busy machine decides no test.
END_SECONDS = 60.0
PATIENCE_SECONDS = 900.0
STEPS = 9
FULL = "File too large"
RUN = (
    f"--config.train.steps={STEPS}",
    "--config.eval.every=0",
    "--config.checkpoint.every=1",
    "--config.log.samples=1",
)


@pytest.fixture
def start_processes(start, free_port):
    """start_processes(workdir, count, *arguments, of_rank={}): one process for each rank.

    `of_rank` gives arguments of one rank only, which win.
    """
    started = []

    def start_processes(workdir, count, *arguments, of_rank=None):
        joined = {"COORDINATOR_ADDRESS": f"127.0.0.1:{free_port}", "NUM_PROCESSES": str(count)}
        for rank in range(count):
            flags = (of_rank or {}).get(rank, (f"--workdir={workdir}",))
            started.append(start(workdir, *arguments, *flags, **joined, PROCESS_ID=str(rank)))
        return started[-count:]

    yield start_processes
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def ends(processes, seconds=PATIENCE_SECONDS):
    """Exit codes and outputs."""
    outputs = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], outputs


def check_others_end(processes, victim, cause):
    """All but the victim end in time with 1, and say that it was the victim, and why."""
    began = time.monotonic()
    for rank, process in enumerate(processes):
        if rank == victim:
            continue
        _, output = process.communicate(timeout=END_SECONDS)
        assert time.monotonic() - began < END_SECONDS
        assert process.returncode == 1, output
        last = output[output.rindex("error: ") :]
        assert f"process {victim} (host" in last
        assert re.search(cause, last)
        assert "run the same command again" in last
        assert FULL in last or "free some space" not in last


def single(workdir, count, run_process, *arguments):
    """A run of one process with so many devices; returns its folder."""
    code, errors = run_process(
        workdir, *RUN, f"--config.mesh.data={count}", *arguments, devices=count
    )
    assert code == 0, errors
    return workdir


@pytest.fixture(scope="module")
def whole(world, run_process, rows):
    """Rows of a run without interruption by one process with two devices."""
    audit = f"--config.verifier.audit={world / 'audit'}"
    return rows(single(world / "one_of_2", 2, run_process, audit))


def scored(audit):
    """The samples in a verifier pool's log, as often as they were scored."""
    return [json.loads(line)["sample"] for line in audit.read_text().splitlines()]


@pytest.mark.slow
def test_a_folder_that_not_all_processes_see_is_refused(start_processes, world):
    elsewhere = (f"--workdir={world / 'not_shared_1'}",)
    processes = start_processes(world / "not_shared", 2, of_rank={1: elsewhere})
    codes, outputs = ends(processes)
    assert codes == [1, 1]
    for output in outputs:
        assert "is another one on process 1 of 2" in output
        assert "mount a shared file system" in output
    assert not list((world / "not_shared").glob(".shared_probe*"))


@pytest.mark.slow
def test_processes_compute_what_as_many_devices_do(start_processes, world, rows, whole):
    count = 2
    workdir = world / f"processes_{count}"
    audit = f"--config.verifier.audit={world / 'audit_processes'}"
    codes, outputs = ends(
        start_processes(workdir, count, *RUN, f"--config.mesh.data={count}", audit)
    )
    assert codes == [0] * count, "\n".join(outputs)
    assert rows(workdir) == whole
    shares = [scored(path) for path in sorted(world.glob("audit_processes*"))]
    assert len(shares) == count
    assert all(shares)
    assert sorted(sample for share in shares for sample in share) == sorted(scored(world / "audit"))


def kill(processes, victim):
    """The victim ends without a word."""
    processes[victim].send_signal(signal.SIGKILL)
    check_others_end(processes, victim, "it ended without a word")


def fill(processes, victim):
    """The victim can write nothing more, as on a full disk; it says so as well."""
    resource.prlimit(processes[victim].pid, resource.RLIMIT_FSIZE, (0, 0))
    # Process 0 writes other files too, and one of them may be the first that fails.
    cause = f"the checkpoint could not be written .*{FULL}" if victim else FULL
    check_others_end(processes, victim, cause)
    (code,), (output,) = ends([processes[victim]], END_SECONDS)
    assert code == 1, output
    last = output[output.rindex("error: ") :]
    assert re.search(cause, last)
    assert "of the run has failed" not in last


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no limits of another process")
def test_all_end_where_one_fails_and_the_run_continues(
    start_processes, world, rows, whole, wait_for_step
):
    """Either process, killed or without space, one failure after the other in the same run."""
    workdir = world / "failing"
    failures = ((kill, 0), (fill, 1), (kill, 1), (fill, 0))
    for fail, victim in failures:
        # A failing run may write a row or two more than are waited for.
        done = rows(workdir)[-1]["step"] if (workdir / "metrics.jsonl").exists() else 0
        assert done + 1 < STEPS
        processes = start_processes(workdir, 2, *RUN, "--config.mesh.data=2")
        wait_for_step(workdir, done + 1, processes[victim])
        fail(processes, victim)
    codes, outputs = ends(start_processes(workdir, 2, *RUN, "--config.mesh.data=2"))
    assert set(codes) == {0}, "\n".join(outputs)
    assert rows(workdir) == whole


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_where_one_has_no_verifier(victim, start_processes, world):
    workdir = world / f"no_verifier_{victim}"
    missing = (f"--workdir={workdir}", "--config.verifier.path=tiny_verifiers:Missing")
    processes = start_processes(workdir, 2, *RUN, "--config.mesh.data=2", of_rank={victim: missing})
    check_others_end(processes, victim, "Missing")
    assert ends(processes)[0][victim] in (1, 2)


@pytest.mark.slow
def test_a_run_continues_on_other_numbers_of_processes_and_devices(
    start_processes, run_process, world, rows
):
    """On 1, 2 and 4 processes, as on as many devices of one; then on 8 devices and on 1.

    To the bit, but for sums over four processes, which Gloo adds up in another order.
    """
    workdir, twin = world / "layouts", world / "layouts_of_devices"
    for step, count in enumerate((1, 2, 4), start=1):
        arguments = (*RUN, f"--config.train.steps={step}", f"--config.mesh.data={count}")
        codes, outputs = ends(start_processes(workdir, count, *arguments))
        assert set(codes) == {0}, "\n".join(outputs)
        if step == 1:
            shutil.copytree(workdir, twin)
            continue
        notices = [output.count("notice: the run goes on with other values") for output in outputs]
        assert notices == [1] + [0] * (count - 1)
        assert f"mesh.data: the run has {count // 2}, this start {count}" in outputs[0]
        code, errors = run_process(twin, *arguments, devices=count)
        assert code == 0, errors
    by_processes, by_devices = rows(workdir), rows(twin)
    assert [row["step"] for row in by_processes] == [0, 1, 2, 3]
    assert by_processes[:3] == by_devices[:3]
    row, expected = by_processes[3], by_devices[3]
    assert row.keys() == expected.keys()
    for name in row.keys() - {"state/digest"}:
        # Losses and ratios are means over the rows of all processes: Gloo adds them up, too.
        behind_the_sum = name.startswith(("eval", "loss/", "text/", "image/", "update/"))
        tolerance = 1e-3 if behind_the_sum else 0.0
        assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 100), name
    for step, mesh in ((4, (2, 2, 2)), (5, (1, 1, 1))):
        axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
        flags = (f"--config.mesh.{axis}={size}" for axis, size in axes)
        code, errors = run_process(
            workdir, *RUN, f"--config.train.steps={step}", *flags, devices=math.prod(mesh)
        )
        assert code == 0, errors
    continued = rows(workdir)
    assert continued[:4] == by_processes
    assert [row["step"] for row in continued] == [0, 1, 2, 3, 4, 5]
    for row in (*continued[1:], *by_devices[1:]):
        assert row["text/ratio_max_dev"] <= 1e-6
        assert row["image/ratio_max_dev"] <= 1e-6
        assert row["update/grad_norm"] > 0
