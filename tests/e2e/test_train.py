"""The training command as a user starts, stops and resumes it, on a tiny random model."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import tiny_world

from alphagrpo_jax import export
from alphagrpo_jax.models.bagel_weights import save_model
from alphagrpo_jax.rewards.workers import ledger


@pytest.fixture(scope="module")
def full_run(run, world):
    """A run of four steps without interruption."""
    workdir = world / "whole"
    code, errors = run(workdir)
    assert code == 0, errors
    return workdir


def test_the_run_folder(full_run, rows):
    names = {path.name for path in full_run.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples", "checkpoints", "DONE"} <= names
    assert "report.html" in names
    logged = rows(full_run)
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4]
    assert [("eval/reward/mean" in row) for row in logged] == [True, False, True, False, True]
    assert [("eval_greedy/reward/mean" in row) for row in logged] == [True, *[False] * 3, True]
    assert [("state/digest" in row) for row in logged] == [False, False, True, False, True]
    assert {path.name for path in (full_run / "checkpoints").iterdir()} == {"2", "4"}
    pictures = sorted(path.name for path in (full_run / "samples").glob("*.png"))
    assert pictures == ["step_000000.png", "step_000002.png", "step_000004.png"]
    config = json.loads((full_run / "config.json").read_text())
    assert config["rollout"]["window_range"] == [0, 3]


def test_the_samples_are_explained(full_run, rows):
    for step in (0, 2, 4):
        page = (full_run / "samples" / f"step_{step:06d}.html").read_text()
        captions = json.loads((full_run / "samples" / f"step_{step:06d}.json").read_text())
        assert page.count("data:image/png;base64,") == len(captions) == 2
        page_rewards = [float(number) for number in re.findall(r"reward <b>([0-9.]+)</b>", page)]
        rewards = sorted(caption["reward"] for caption in captions)  # worst first
        assert page_rewards == pytest.approx(rewards, abs=1e-3)  # both are rounded
        assert all(f"Is there {caption['prompt']}?" in page for caption in captions)
    newest = (full_run / "report.html").read_text()
    assert "rt2i, step 4" in newest
    start, end = newest.index("<section>"), newest.index("<h2>Samples</h2>")
    curves = newest[start:end]
    assert newest[:start] + newest[end:].removeprefix("<h2>Samples</h2>\n") == page
    assert curves.count("<svg") == 1  # the tiny world has no exact checker
    last = rows(full_run)[-1]
    assert f"held-out, step 4: {last['eval/reward/mean']:.3f}" in curves
    assert f"in training {last['reward/mean']:.3f}" in curves
    for row in rows(full_run):
        prefix = "" if row["step"] else "eval/"
        tags = {name for name in row if name.startswith(f"{prefix}reward/tag/")}
        assert tags == {f"{prefix}reward/tag/{tag}" for tag in ("Existence", "Texture")}
        assert 0.0 <= row[f"{prefix}question/saturated_fraction"] <= 1.0


def test_first_ratios_are_one_and_rewards_are_those_of_the_verifier(full_run, rows):
    for row in rows(full_run)[1:]:
        assert row["text/ratio_max_dev"] == 0.0
        assert row["image/ratio_max_dev"] == 0.0
        assert row["logp/rollout_update_max_abs_diff"] < 1e-4
        assert row["reward/valid_fraction"] == 1.0
        assert row["update/learning_rate"] == pytest.approx(1e-2)
        assert 0.0 < row["reward/mean"] < 1.0
        assert row["reward/total"] == pytest.approx(row["reward/mean"] + row["reward/format"])


def test_nothing_compiles_after_the_first_step(full_run):
    lines = (full_run / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line)["time/compilations"] for line in lines[1:]]
    assert len(set(counts)) == 1


def test_a_run_starts_from_the_adapter_of_another(run, world, full_run, rows):
    """Its first evaluation is the other's last one."""
    adapter = world / "adapter"
    assert export.main(["--checkpoint", str(full_run), "--out", str(adapter), "--format=peft",
                        f"--model={world / 'model'}"]) == 0  # fmt: skip
    workdir = world / "continues"
    code, errors = run(workdir, f"--config.lora.init_from={adapter}", "--config.train.steps=0")
    assert code == 0, errors
    last, (first,) = rows(full_run)[-1], rows(workdir)
    names = [name for name in first if name.startswith("eval")]
    assert "eval/reward/mean" in names
    assert {name: first[name] for name in names} == {name: last[name] for name in names}
    assert first["eval/reward/mean"] != rows(full_run)[0]["eval/reward/mean"]


def test_a_finished_run_says_so(run_process, full_run):
    """In a process of its own, which shows exit code 0."""
    before = (full_run / "metrics.jsonl").read_text()
    code, errors = run_process(full_run)
    assert code == 0
    assert "is finished: 4 steps are done" in errors
    assert (full_run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("number", "images", "last"),
    [(signal.SIGINT, 6 + 4, 1), (signal.SIGTERM, 1, None)],
    ids=["in the first step", "in the first evaluation"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    number, images, last, run, world, full_run, rows
):
    workdir = world / f"interrupted_{number.name}"
    (world / "signal.json").write_text(json.dumps([number, images]))
    code, errors = run(workdir, *tiny_world.INTERRUPTS)
    assert code == 75, errors
    assert "the same command continues" in errors
    assert f"stopping after this step ({number.name})" in errors
    assert not (workdir / "DONE").exists()
    assert rows(workdir) == ([] if last is None else rows(full_run)[: last + 1])
    code, errors = run(workdir, *tiny_world.INTERRUPTS)
    assert code == 0, errors
    assert rows(workdir) == rows(full_run)


def test_two_workers_one_slow_and_one_dying_give_the_updates_of_one(run, world, full_run, rows):
    """Who answers, when and in what order changes no bit: the digests of the states are equal."""
    uneven = (
        "--config.verifier.path=tiny_verifiers:DiesOnce",
        "--config.verifier.workers=2",
        "--config.verifier.audit=dies.jsonl",
    )
    code, errors = run(world / "dies", *uneven)
    assert code == 0, errors
    assert (world / "verifier_died").exists()
    audit = [json.loads(line) for line in (world / "dies.jsonl").read_text().splitlines()]
    assert {row["worker"] for row in audit if row["p_yes"]} == {0, 1}
    assert rows(world / "dies") == rows(full_run)
    lines = (world / "dies" / "metrics.jsonl").read_text().splitlines()[1:]
    counted = [
        {name: json.loads(line)[f"time/pool/{name}"] for name in ledger.COUNTERS} for line in lines
    ]
    assert all(row["submitted"] == row["answered"] >= 8 for row in counted)
    assert sum(row["deaths"] for row in counted) == sum(row["retries"] for row in counted) == 1
    untroubled = (full_run / "metrics.jsonl").read_text().splitlines()[1:]
    assert all(json.loads(line)["time/pool/retries"] == 0 for line in untroubled)


def test_a_verifier_that_fails_for_good_costs_nothing_that_is_done(run, world, full_run, rows):
    """It fails in the second step, in the evaluation after it, and in that at the end."""
    workdir, limit = world / "tired", world / "tires_after"
    # Images: 6 in the first evaluation and the last, 3 in the other one, 8 in every update.
    for images, saved, is_pending in (
        (6 + 8 + 2, 1, False),
        (8 + 1, 2, True),
        (3 + 8 + 8 + 1, 4, True),
    ):
        limit.write_text(str(images))
        code, errors = run(workdir, *tiny_world.TIRES)
        assert code == 1, errors
        assert "have no reward" in errors
        assert str(saved) in {path.name for path in (workdir / "checkpoints").iterdir()}
        logged = rows(workdir)
        assert [row["step"] for row in logged] == list(range(saved + 1))
        assert ("eval/pending" in logged[-1]) == is_pending
        assert not (workdir / "DONE").exists()
    limit.unlink()
    code, errors = run(workdir, *tiny_world.TIRES)
    assert code == 0, errors
    assert rows(workdir) == rows(full_run)
    assert (workdir / "DONE").exists()


def test_a_start_that_failed_binds_nobody(run, world, full_run, rows):
    workdir, short = world / "mistyped", "--config.train.steps=0"
    code, errors = run(workdir, short, "--config.verifier.path=tiny_verifiers:Honets")
    assert code == 1
    assert "Honets" in errors
    code, errors = run(workdir, short)
    assert code == 0, errors
    assert rows(workdir) == rows(full_run)[:1]
    assert json.loads((workdir / "config.json").read_text())["verifier"]["path"].endswith("Honest")


def test_samples_without_an_answer_are_left_out(run, world, rows):
    mute = (
        "--config.verifier.path=tiny_verifiers:SometimesMute",
        "--config.verifier.max_attempts=1",
        "--config.reward.max_invalid_fraction=0.9",
    )
    code, errors = run(world / "sometimes", *mute, "--config.train.steps=4")
    assert code == 0, errors
    logged = rows(world / "sometimes")[1:]
    assert min(row["reward/valid_fraction"] for row in logged) < 1.0
    assert all(0.0 < row["reward/mean"] < 1.0 for row in logged)  # never scored 0


@pytest.mark.slow
def test_killed_behind_its_checkpoint_and_resumed_equals_uninterrupted(
    start, run, world, full_run, rows, wait_for_step
):
    """The row of step 3 is written, its checkpoint is not: the step is done again."""
    workdir = world / "killed"
    process = start(workdir)
    wait_for_step(workdir, 3, process)
    process.kill()
    process.communicate()
    code, errors = run(workdir)
    assert code == 0, errors
    assert rows(workdir) == rows(full_run)


def test_more_steps_continue_a_finished_run(run, world, full_run, rows):
    workdir = world / "longer"
    code, errors = run(workdir, "--config.train.steps=2")
    assert code == 0, errors
    assert (workdir / "DONE").exists()
    code, errors = run(workdir, "--config.train.steps=4")
    assert code == 0, errors
    assert rows(workdir)[-1] == rows(full_run)[-1]
    code, errors = run(workdir, "--config.train.steps=3")  # behind the end
    assert code == 0
    assert "is finished: 4 steps are done" in errors


@pytest.mark.slow
def test_more_steps_continue_a_run_that_is_compiled_as_users_do(run_process, world, rows):
    """All other tests compile without optimisation."""
    workdir, optimised = world / "users", {"XLA_FLAGS": ""}
    code, errors = run_process(world / "optimised", **optimised)
    assert code == 0, errors
    for row in rows(world / "optimised")[1:]:
        assert row["text/ratio_max_dev"] == row["image/ratio_max_dev"] == 0.0
        assert row["logp/rollout_update_max_abs_diff"] < 1e-4
    code, errors = run_process(workdir, "--config.train.steps=2", **optimised)
    assert code == 0, errors
    code, errors = run_process(workdir, "--config.train.steps=4", **optimised)
    assert code == 0, errors
    assert rows(workdir)[-1] == rows(world / "optimised")[-1]


def test_no_steps_only_evaluate(run, world, full_run, rows):
    code, errors = run(world / "nothing", "--config.train.steps=0")
    assert code == 0, errors
    assert rows(world / "nothing") == rows(full_run)[:1]
    paths = [full_run / name for name in ("metrics.jsonl", "config.json", "DONE")]
    before = [path.read_text() for path in paths]
    code, errors = run(full_run, "--config.train.steps=0")
    assert code == 0, errors
    assert [path.read_text() for path in paths] == before
    evaluation = json.loads((full_run / "evaluation.json").read_text())
    last = rows(full_run)[-1]
    assert evaluation["eval/reward/mean"] == last["eval/reward/mean"]
    assert evaluation["step"] == 4


PLAIN_IMAGES = (
    "--config.task=t2i",
    "--config.train.trainable=full",
    "--config.train.old_logprob=self",
    "--config.rollout.sampler=cps",
    "--config.loss.image_beta=0.1",
)
SEVERAL_UPDATES = (
    "--config.train.updates_per_batch=2",
    "--config.optimizer.decay_steps=4",
    "--config.train.context_gradient=True",
    "--config.loss.level=token",
    "--config.loss.text_beta=0.1",
    "--config.loss.report_kl=True",
    "--config.verifier.second=tiny_verifiers:Constant",
    "--config.loss.entropy_fraction=0.5",
    "--config.rollout.merge_lora=False",
    "--config.rollout.shared_noise=True",
)


@pytest.mark.slow
def test_plain_images_and_full_weights(run, world, rows):
    short = ("--config.train.steps=2", "--config.optimizer.decay_steps=1")
    code, errors = run(world / "plain", *PLAIN_IMAGES, *short)
    assert code == 0, errors
    assert "the learning rate is 0 from applied update 1 on" in errors
    first, second = rows(world / "plain")[1:]
    rates = [row["update/learning_rate"] for row in (first, second)]
    assert rates == pytest.approx([1e-2, 0.0])
    assert "text/ratio_max_dev" not in first
    assert first["update/old_is_self"] == 1
    assert first["image/kl"] < 1e-9  # rounding: the reference is compiled on its own
    assert second["image/kl"] > 1e-6
    assert second["update/grad_norm"] > 0.0


MATCHING = (
    "--config.task=t2i",
    "--config.loss.text=none",
    "--config.rollout.sampler=ode",
    "--config.optimizer.average_limit=0.5",
    "--config.optimizer.average_rate=0.2",
)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nft", "awm"])
def test_losses_of_velocities_train_and_resume_exactly(algorithm, run, world, rows):
    """The average is part of the checkpoint: without it the second step would differ."""
    flags = (*MATCHING, f"--config.loss.image={algorithm}", "--config.loss.image_beta=0.01")
    flags = (*flags, "--config.optimizer.decay_steps=0", "--config.checkpoint.every=1")
    whole, resumed = world / algorithm, world / f"{algorithm}_resumed"
    for workdir, steps in ((whole, 3), (resumed, 2), (resumed, 3)):
        code, errors = run(workdir, *flags, f"--config.train.steps={steps}")
        assert code == 0, errors
    first, second, third = rows(whole)[1:]
    assert first["image/average_gap"] == 0.0
    assert second["image/average_gap"] > 0.0
    assert first["image/kl"] < 1e-9 < third["image/kl"]
    assert rows(resumed)[3] == third


@pytest.mark.slow
def test_losses_of_velocities_in_mixed_runs_and_of_old_ones_own(run, world, rows):
    """Tasks without images, several updates per batch; then `train.old_logprob=self`."""
    flags = ("--config.loss.image=awm", *MATCHING[2:], "--config.train.steps=1")
    mixed = ("--config.task=mixed", "--config.mixed.tasks=('rt2i', 'ti2t')",
             "--config.mixed.weights=(1.0, 1.0)", "--config.mixed.batches=2",
             "--config.train.updates_per_batch=2")  # fmt: skip
    code, errors = run(world / "awm_mixed", *flags, *mixed)
    assert code == 0, errors
    row = rows(world / "awm_mixed")[1]
    assert row["rt2i/image/average_gap"] > 0.0  # the first of two updates has moved the policy
    assert "ti2t/image/average_gap" not in row
    alone = ("--config.train.old_logprob=self",)
    code, errors = run(world / "awm_self", *flags, *alone)
    assert code == 0, errors
    assert rows(world / "awm_self")[1]["image/ratio_max_dev"] == 0.0


@pytest.mark.slow
def test_remax_of_texts_and_images(run, world, rows):
    flags = ("--config.loss.text=remax", "--config.loss.image=remax")
    code, errors = run(world / "remax", *flags, "--config.train.steps=1")
    assert code == 0, errors
    row = rows(world / "remax")[1]
    assert row["text/ratio_max_dev"] == row["image/ratio_max_dev"] == 0.0
    assert row["update/grad_norm"] > 0.0


@pytest.mark.slow
def test_several_updates_per_batch(run, world, rows):
    code, errors = run(world / "several", *SEVERAL_UPDATES, "--config.train.steps=1")
    assert code == 0, errors
    row = rows(world / "several")[1]
    assert row["text/ratio_max_dev"] == row["image/ratio_max_dev"] == 0.0  # of the first of the two
    assert row["update/learning_rate"] == pytest.approx(0.75e-2)  # of the second of the two
    assert row["text/kl"] > 0.0  # of the second: the first has moved the policy
    assert row["image/kl"] > 0.0  # only reported
    for logged in rows(world / "several"):
        assert logged["eval/second/mean"] == 0.5
        gap = logged["eval/second_minus_reward"]
        assert gap == pytest.approx(0.5 - logged["eval/reward/mean"])


@pytest.mark.slow
def test_the_policy_as_its_own_verifier(run, world, rows):
    tiny_world.write_model(world / "speaks", words=("yes", "no"))
    flags = (
        "--config.model.path=speaks",
        "--config.verifier.kind=self",
        "--config.rollout.prompt_tokens=40",  # the bucket of the questions too
        "--config.verifier.min_mass=0.001",
        "--config.reward.extra_scores=('likelihood',)",
        "--config.reward.extra_weights=(1.0,)",
    )
    code, errors = run(world / "self", *flags, "--config.train.steps=2")
    assert code == 0, errors
    logged = rows(world / "self")
    assert logged[0]["eval/reward/valid_fraction"] == 1.0
    for row in logged[1:]:
        assert row["reward/valid_fraction"] == 1.0
        assert 0.0 < row["reward/mean"] < 1.0
        assert 0.0 < row["reward/score/likelihood"] < 1.0
        assert row["text/ratio_max_dev"] == row["image/ratio_max_dev"] == 0.0
        assert row["update/skipped"] == 0
    lines = (world / "self" / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line)["time/compilations"] for line in lines[1:]]
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.stepz=3"], "stepz"),
        (["--config.loss.level=word"], "loss.level: got 'word'"),
        (["--wrkdir=x"], "wrkdir"),
        (["surplus"], "unexpected arguments"),
        (["--config.mesh.data=2"], "needs 2 devices, but there are 1"),
        (["--config.lora.targets=("], "lora.targets: got '(', expected a regular expression"),
    ],
)
def test_wrong_usage_is_refused_with_two(run, world, arguments, message):
    code, errors = run(world / "refused", *arguments)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_a_mesh_that_does_not_fit_the_devices(run_process, world):
    """In a process of its own: it has two devices, and shows exit code 2."""
    code, errors = run_process(world / "refused", "--config.mesh.tensor=3", devices=2)
    assert code == 2
    assert "mesh data=-1 fsdp=1 tensor=3 needs 3 devices, but there are 2" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.path=nowhere"], "nowhere"),
        (["--config.data.train=nothing.jsonl"], "nothing.jsonl"),
        (["--config.rollout.prompt_tokens=5"], "longer than the prompt bucket of 5"),
        (["--config.data.train=broken.jsonl"], "broken.jsonl:2: "),
        (["--config.model.path=cut"], "ema.safetensors"),
    ],
)
def test_bad_input_fails_with_one_and_a_message(run, world, arguments, message):
    good = (world / "train.jsonl").read_text().splitlines()
    (world / "broken.jsonl").write_text(good[0] + "\n{not json\n")
    shutil.copytree(world / "model", world / "cut", dirs_exist_ok=True)
    weights = (world / "model" / "ema.safetensors").read_bytes()
    (world / "cut" / "ema.safetensors").write_bytes(weights[: len(weights) // 2])
    code, errors = run(world / "refused", *arguments)
    assert code == 1
    assert message in errors
    assert "Traceback" not in errors


def test_a_folder_that_cannot_be_written(run_process, world):
    """In a process of its own, which shows exit code 1."""
    (world / "file").write_text("")
    code, errors = run_process(world / "file" / "run")
    assert code == 1
    assert "cannot be written" in errors


def test_another_configuration_is_refused(run, full_run):
    before = (full_run / "metrics.jsonl").read_text()
    code, errors = run(full_run, "--config.seed=7")
    assert code == 2
    assert "seed: the run has 0, this start 7" in errors
    assert (full_run / "metrics.jsonl").read_text() == before


def test_invalid_rewards_stop_the_run_and_are_never_invented(run, world):
    mute = ("--config.verifier.path=tiny_verifiers:Mute", "--config.verifier.max_attempts=1")
    code, errors = run(world / "mute", *mute)
    assert code == 1
    assert "evaluation of rt2i at step 0: 100% of the samples have no reward, at most 20%" in errors
    assert "no answer" in errors
    assert not (world / "mute" / "metrics.jsonl").exists()  # measured once the verifier is mended


def test_equal_rewards_skip_the_update(run, world, rows):
    constant = "--config.verifier.path=tiny_verifiers:Constant"
    code, errors = run(world / "constant", constant, "--config.train.steps=1")
    assert code == 0, errors
    row = rows(world / "constant")[1]
    assert row["update/skipped"] == 1
    assert row["group/zero_std_fraction"] == 1.0
    assert "loss/total" not in row


def test_a_loss_that_is_not_finite_stops_before_the_update(run, world, tmp_path, rows):
    shutil.copytree(world / "model", tmp_path / "model")
    flags = (f"--config.model.path={tmp_path / 'model'}", "--config.checkpoint.every=1")
    code, errors = run(tmp_path / "run", *flags, "--config.train.steps=1")
    assert code == 0, errors
    before = rows(tmp_path / "run")
    loaded = tiny_world.model()
    # Finite, as NaN is refused when weights are read; the logits overflow.
    head = {"kernel": np.full_like(loaded.base["lm_head"]["kernel"], 3e38)}
    save_model(tmp_path / "model", loaded, base=loaded.base | {"lm_head": head})
    (tmp_path / "run" / "weights.sha256").unlink()  # other weights would be refused by it
    code, errors = run(tmp_path / "run", *flags, "--config.train.steps=3")
    assert code == 1
    assert "step 2: the loss (nan)" in errors
    assert "the update was not applied" in errors
    assert rows(tmp_path / "run") == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
