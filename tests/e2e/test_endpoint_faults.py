"""Training with a verifier behind an endpoint that misbehaves: it goes on, or says why it stops."""

import ast
import json

import bad_server
import numpy as np
import pytest
from bad_server import BadServer

KEY = "sk-train-0123456789abcdef"
IMPATIENT = {"max_attempts": 2, "attempt_seconds": 3.0, "question_seconds": 2.0}
FAULTS = ("500", "reset", "truncated", "nan", "no logprobs", "neither", "other request", "echo")
FAULTS += ("400",)


@pytest.fixture
def server(world, request):
    with BadServer(world, request.node.name) as server:
        yield server


@pytest.fixture
def train(run, world, server):
    """train(name, **verifier): two steps with the server.

    Returns the exit code, everything printed, the run's folder, the rows of the audit log.
    """

    def train(name, **verifier):
        fields = {
            "verifier.kind": "openai",
            "verifier.endpoints": repr((server.url,)),
            "verifier.model": bad_server.MODEL,
            "verifier.api_key_env": "TRAIN_KEY",
            "verifier.workers": 2,
            "verifier.attempt_seconds": 10.0,
            "verifier.question_seconds": 5.0,
            "verifier.max_attempts": 6,
            "verifier.audit": f"{name}.audit.jsonl",
            "train.steps": 2,
        } | {f"verifier.{field}": value for field, value in verifier.items()}
        flags = (f"--config.{field}={value}" for field, value in fields.items())
        code, printed = run(world / name, *flags, TRAIN_KEY=KEY)
        audit = (world / f"{name}.audit.jsonl").read_text().splitlines()
        return code, printed, world / name, list(map(json.loads, audit))

    return train


def check_audit(audit, *servers):
    """Every number that the pool got was given by a server for that image and question."""
    given = {}
    for row in (row for server in servers for row in server.log()):
        if row["p_yes"] is not None:
            given[row["image"], row["question"]] = row["p_yes"]
    numbers = 0
    for row in audit:
        assert (row["p_yes"] is None) != (row["failure"] is None)
        if row["p_yes"] is not None:
            answers = [given[row["image"], question] for question in row["questions"]]
            assert row["p_yes"] == pytest.approx(answers, abs=1e-9)
            assert row["mass"] == pytest.approx([0.9] * len(answers), abs=1e-6)
            numbers += len(answers)
    assert numbers > 0


def check_rewards(audit, rows):
    """Every mean reward of a row is that of the log's numbers, each sample counted once."""
    rewards = {}  # by where the samples are from
    sizes = {}
    for row in audit:
        sample = ast.literal_eval(row["sample"])
        if row["p_yes"] is not None:
            yes = np.array(row["p_yes"])  # two questions of meaning, one of quality
            sample_rewards = rewards.setdefault(sample[:-1], [])
            sample_rewards.append(np.sqrt(yes[:2].mean() * yes[2]))
            sizes.setdefault(sample[:-1], []).append(sample[-1])
    for row in rows[1:]:
        assert sorted(sizes[row["step"], 0]) == list(range(8))
        assert row["reward/mean"] == pytest.approx(np.mean(rewards[row["step"], 0]), abs=1e-12)
    for prefix in ("eval", "eval_greedy"):
        reported = [row[f"{prefix}/reward/mean"] for row in rows if f"{prefix}/reward/mean" in row]
        expected = np.reshape(rewards[(prefix,)], (len(reported), -1)).mean(axis=1)
        assert sizes[(prefix,)]
        assert reported == pytest.approx(expected, abs=1e-12)


def check_no_key(world, workdir, printed):
    files = [path for path in (*workdir.rglob("*"), *world.glob("*.jsonl")) if path.is_file()]
    assert len(files) > 3
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in printed


@pytest.mark.slow
def test_a_flaky_endpoint_costs_no_sample(train, world, server):
    server.behave(*FAULTS, every=9)
    code, printed, workdir, audit = train("flaky")
    assert code == 0, printed
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["reward/valid_fraction"] == 1.0 for row in rows[1:])
    assert all(0.0 < row["reward/mean"] < 1.0 for row in rows[1:])
    faults = {row["fault"] for row in server.log()}
    assert faults == {None, *FAULTS}
    check_audit(audit, server)
    check_rewards(audit, rows)
    check_no_key(world, workdir, printed)


def test_an_endpoint_that_dies_stops_the_run_with_a_message(train, world, server):
    server.behave("die", after=30)
    code, printed, workdir, audit = train("dead", **IMPATIENT)
    assert code == 1, printed
    assert "of the samples have no reward, at most 20% are allowed" in printed
    assert "reward.max_invalid_fraction" in printed
    assert server.url in printed
    assert "Traceback" not in printed
    check_audit(audit, server)
    check_no_key(world, workdir, printed)


@pytest.mark.slow
def test_a_judge_that_talks_nonsense_beside_one_that_thinks_costs_no_sample(
    train, world, server, tmp_path
):
    """Read behind its thinking, one endpoint answers; the other has a wrong template."""
    server.behave("think", "think parsed", "think cut", "500", "think", "reset")
    with BadServer(tmp_path, "nonsense") as nonsense:
        nonsense.behave("think for ever")
        code, printed, workdir, audit = train(
            "nonsense",
            endpoints=repr((server.url, nonsense.url)),
            read="after_thinking",
            max_tokens=64,
        )
        asked = len(nonsense.log())
        assert not any(row["p_yes"] for row in nonsense.log())
    assert code == 0, printed
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["reward/valid_fraction"] == 1.0 for row in rows[1:])
    assert all(row["reward/answer_mass"] == pytest.approx(0.9) for row in rows[1:])
    assert rows[1]["time/pool/answered"] > 8  # the first evaluation counts too
    assert {row["max_tokens"] for row in server.log()} == {64}
    assert 0 < asked < len(server.log()) / 2
    check_audit(audit, server)
    check_rewards(audit, rows)
