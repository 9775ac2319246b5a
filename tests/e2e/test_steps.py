"""Whole steps of tasks with images and of several turns, in this process, with a given verifier."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_verifiers
import tiny_world
from PIL import Image

from alphagrpo_jax import advantage, initial_images, prompts, reward, rollout, tasks, types, update
from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax.rewards import scoring
from alphagrpo_jax.rewards.dvreward import dvreward
from alphagrpo_jax.rewards.workers.ledger import VerifierResult as Answered
from alphagrpo_jax.runtime.metric_reductions import is_listed
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.tasks import IMAGE, SYSTEM, TEXT, THINK
from alphagrpo_jax.training import context, setup, update_loss
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import steps as steps_lib
from alphagrpo_jax.training.optimizer import make_optimizer
from alphagrpo_jax.training.update_loss import FixedOutputs
from alphagrpo_jax.types import InitialImageQueue, TextSample

SECOND_LOOK = tasks.Task(
    "second_look",
    (SYSTEM, TEXT, THINK, IMAGE, TEXT, THINK, IMAGE),
    tasks.THINK_SYSTEM_PROMPT,
    texts=("{prompt}", "Look at your image again: is it {prompt}? If not, draw it right."),
    format_reward=True,
)
NAMES = ("srr", "ti2t", "second_look")


class BrightnessPool:
    """A pool that answers at once: P(yes) by brightness, as `tiny_verifiers.Honest` does."""

    def __init__(self):
        self.samples, self.honest = {}, tiny_verifiers.Honest()

    def submit(self, sample_id, image, questions, rated=(), scored=()):
        assert sample_id not in self.samples
        self.samples[sample_id] = (image, tuple(questions))

    def gather(self, ids):
        results = {}
        for sample_id in ids:
            image, questions = self.samples[sample_id]
            answers = tuple(answer.p_yes for answer in self.honest.answer(image, questions))
            results[sample_id] = Answered(answers, True, None, 1, 0, 0.0)
        return results


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    return tiny_world.write_all(tmp_path_factory.mktemp("world"))


# Compiling a task takes half a minute and more; the fast tests train the tasks of the package by
# whole runs.
PARAMS = tuple(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)


@pytest.fixture(scope="module", params=PARAMS)
def step(request, world):
    """Everything about one step of a task, its adapters moved away from zero."""
    tasks.TASKS[SECOND_LOOK.name] = SECOND_LOOK
    try:
        yield one_step(world, request.param)
    finally:
        del tasks.TASKS[SECOND_LOOK.name]


def one_step(world, name):
    fields = tiny_world.config(world)
    fields.task = name
    config = config_lib.from_config_dict(fields)
    mesh = setup.make_mesh(config)
    with jax.set_mesh(mesh):
        loaded = setup.load_policy(config, mesh)
        data = setup.load_data(config, loaded, world / "cache")
        optimizer = make_optimizer(config.optimizer)
        state = setup.initial_state(config, loaded.base, optimizer, mesh)
        trainable = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape),
            state.trainable,
        )
        state = state.replace(trainable=trainable)
        fns = steps_lib.compile_fns(config, loaded, state, optimizer, mesh)
        run = context.make_run(config, loaded, data, fns, BrightnessPool(), world)
        position, params = prompts.start_position(config), run.sampling_params(state)
        initial = initial_images.take(run, params, state.key, 1, position)
        (batch,) = prompts.next_batches(config, data, 1, position, initial)
        sampled = rollout.sample(
            run, params, state.key, 1, batch, on_images=functools.partial(reward.submit_images, run)
        )
        old = update.old_log_probs(run, state, sampled)
        rewards = reward.gather(run, sampled, 1)
        advantages = advantage.of_batch(rewards, config.advantage)
        # A random model's answers may all be wrong, its repairs all worse: fixed advantages then.
        fixed = np.array([[1.0, -0.5, 0.75, -1.25], [-0.25, 0.5, 1.5, -1.0]], np.float32)
        text = advantages.text._replace(advantage=fixed, used=np.ones((2, 4), bool))
        advantages = types.BatchAdvantages(text, fixed)
        (task_update,) = update._group_by_task(run, None, [sampled], [old], [advantages])
        gradient, _ = update._task_gradient(run, state, task_update, jnp.float32(1.0))
        gradient = jax.tree.map(np.asarray, gradient)
        by_log_prob = cotangents(config, loaded, task_update)
        _, metrics = update.step(run, state, [sampled], [old], [advantages], 1)
    return {
        "name": name, "run": run, "batch": batch, "rollout": sampled, "rewards": rewards,
        "gradient": gradient, "by_log_prob": by_log_prob, "learned": metrics.update,
        "metrics": metrics.batches[0],
    }  # fmt: skip


def cotangents(config, loaded, task_update):
    """Derivatives of the loss by the log-probs of the first micro-batch, and its texts."""
    (batch,) = task_update.batches
    task = tasks.TASKS[config.task]
    spec = options_lib.update_spec(config, loaded, task)
    micro_batch = types.take_micro_batch(spec.layout, batch.batch, jnp.int32(0))
    old = batch.old.log_probs[0]
    derivatives = jax.grad(
        lambda new: update_loss.micro_loss(
            new, old, FixedOutputs(), micro_batch, task_update.normalizers, spec=spec
        )[0]
    )(old)
    return jax.tree.map(np.asarray, (derivatives, micro_batch.rollout.texts))


def test_every_metric_of_an_update_is_in_the_table_of_reductions(step):
    names = step["learned"].keys() | step["metrics"].keys()
    update_names = {"update/grad_norm", "update/learning_rate", "update/old_is_self"}
    assert [name for name in names - update_names if not is_listed(name)] == []


def test_the_first_ratios_are_one(step):
    assert step["learned"]["update/skipped"] == 0
    ratios = [value for key, value in step["metrics"].items() if "ratio_max_dev" in key]
    assert ratios
    assert max(ratios) == 0.0
    assert step["metrics"]["logp/rollout_update_max_abs_diff"] < 1e-4


def test_members_of_a_group_share_what_is_given_and_nothing_else(step):
    trajectories, group = step["rollout"].trajectories, step["run"].config.train.group_size
    for block in trajectories.inputs:
        for leaf in jax.tree.leaves(block):
            members = np.asarray(leaf).reshape(2, group, *leaf.shape[1:])
            assert (members == members[:, :1]).all()
    if step["name"] == "srr":
        images = np.asarray(trajectories.inputs[0].pixels).reshape(2, group, 32, 32, 3)
        np.testing.assert_array_equal(images[:, 0], step["batch"].images)
        assert (images[0, 0] != images[1, 0]).any()
        latents = np.asarray(trajectories.images[0].latents)
        assert np.abs(latents[0] - latents[1]).max() > 0.1


def test_gradients_reach_exactly_the_adapters_that_took_part(step):
    """An answer is text alone: the image expert has no part in it."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(step["gradient"])[0]:
        is_gen = "_moe_gen" in jax.tree_util.keystr(path)
        assert (np.abs(leaf).max() > 0) == (not is_gen or step["name"] != "ti2t"), path


def test_every_step_is_trained(step):
    plan = tasks.plan(tasks.TASKS[step["name"]].events)
    assert len(step["rollout"].texts) == len(plan.text_steps)
    assert len(step["rollout"].trajectories.images) == len(plan.image_steps)
    log_prob_gradient, samples = step["by_log_prob"]
    assert len(log_prob_gradient.text_log_prob) == len(plan.text_steps)
    for text_gradient, sample in zip(log_prob_gradient.text_log_prob, samples, strict=True):
        assert (text_gradient != 0.0)[sample.scored].all()
        assert not text_gradient[~sample.scored].any()
    assert len(log_prob_gradient.image_log_prob) == len(plan.image_steps)
    for image_gradient in log_prob_gradient.image_log_prob:
        assert (image_gradient != 0.0).all()
    assert step["rewards"].valid.all()


def test_every_text_counts_in_the_metrics(step):
    samples = step["rollout"].trajectories.texts
    lengths = [np.asarray(sample.scored).sum(axis=1).mean() for sample in samples]
    cut = [np.asarray(sample.truncated).mean() for sample in samples]
    metrics = step["rollout"].metrics
    assert metrics["text/length"] == pytest.approx(np.mean(lengths))
    assert metrics["text/truncated_fraction"] == pytest.approx(np.mean(cut))


def test_a_cut_answer_counts_though_no_think_text_was_cut():
    def sample(truncated):
        scored = np.ones((4, 3), bool)
        return TextSample(None, None, scored, None, np.array(truncated))

    samples = [sample([False] * 4), sample([True, True, False, False])]
    texts = [["a", "a", "a", "b"], ["c", "d", "d", "d"]]  # two groups of two in each step
    metrics = rollout._text_metrics(samples, texts, 2)
    assert metrics == {
        "text/length": 3.0,
        "text/truncated_fraction": 0.25,
        "text/repeated_fraction": 0.5,
    }


def test_the_worst_initial_image_is_repaired(step):
    if step["name"] != "srr":
        assert step["batch"].initial is None
        return
    run, batch = step["run"], step["batch"]
    samples = {
        key: run.verifier.samples[key] for key in run.verifier.samples if key[0] == "initial"
    }
    assert len(samples) == 12  # six prompts with two images each
    for index, row in enumerate(batch.rows):
        record = run.tasks["srr"].data.train.records[row]
        images = [
            image
            for image, questions in samples.values()
            if questions == tuple(record.question_texts)
        ]
        rewards = [dvreward(*record.split(
            [answer.p_yes for answer in run.verifier.honest.answer(image, record.question_texts)]
        )).reward for image in images]  # fmt: skip
        assert batch.initial.reward[index] == pytest.approx(min(rewards))
        np.testing.assert_array_equal(batch.images[index], images[int(np.argmin(rewards))])


class NoFns:
    """Compiled functions of a run that samples nothing."""

    initial = eval_initial = None
    tasks = {"srr": None}  # noqa: RUF012


def test_own_initial_images_are_those_of_the_files(world):
    fields = tiny_world.config(world)
    fields.task, fields.srr.source = "srr", "record"
    fields.data.train = fields.data.heldout = str(world / "edits.jsonl")
    config = config_lib.from_config_dict(fields)
    loaded = tiny_world.model()
    data = setup.load_data(config, loaded, world / "cache")
    run = context.make_run(config, loaded, data, NoFns(), BrightnessPool(), world)
    position, prompts_seen = prompts.start_position(config), set()
    for step in (1, 2, 3):
        initial = initial_images.take(run, None, jax.random.key(0), step, position)
        (batch,) = prompts.next_batches(config, data, step, position, initial)
        for index, row in enumerate(batch.rows):
            prompts_seen.add(int(row))
            with Image.open(world / f"edit_{row}.png") as image:
                np.testing.assert_array_equal(batch.images[index], np.asarray(image))
            record = data["srr"].train.records[row]
            answers = run.verifier.honest.answer(batch.images[index], record.question_texts)
            expected = dvreward(*record.split([answer.p_yes for answer in answers])).reward
            assert batch.initial.reward[index] == pytest.approx(expected)
    assert prompts_seen == set(range(6))
    assert run.verifier.samples.keys() == {("initial", 0, number) for number in range(6)}


def refining(mode, texts, pool=None, isolate=True):
    """A run without a model whose group of four wrote `texts` about an image of reward 0.5."""
    config = tiny_world.config(pathlib.Path("unused"))
    config.task, config.srr.reflection_format, config.reward.isolate = "srr", mode, isolate
    config.advantage.std, config.srr.rectification = "none", "none"
    config.train.prompts_per_step, config.reward.max_invalid_fraction = 1, 0.5
    config.train.micro_batch = config.rollout.micro_batch = 4
    parsed = config_lib.from_config_dict(config)
    numbers = (np.zeros(1, int), np.zeros((1, 2, 2, 3), np.uint8))
    initial = InitialImageQueue(np.array(1), *numbers, np.array([0.5]))
    batch = types.PromptBatch(0, tasks.TASKS["srr"], np.zeros(1, int), numbers[1], initial)
    records = [parse_record(tiny_world.record("a red circle"))] * 4
    ids = [(1, 0, number) for number in range(4)]
    sampled = types.RolloutBatch(batch, None, records, ids, [texts], {})
    return run_without_model(parsed, pool), sampled


def run_without_model(config, pool=None):
    data, fns = dict.fromkeys(config.tasks), NoFns()
    return context.make_run(config, None, data, fns, pool, None)


class FixedPool:
    """A pool with fixed answers by sample."""

    def __init__(self, answers):
        self.answers = answers

    def gather(self, ids):
        results = {}
        for sample_id in ids:
            answers = self.answers[sample_id]
            failure = None if answers else "server away"
            results[sample_id] = Answered(answers, answers is not None, failure, 1, 0, 0.0)
        return results


def test_a_reflection_is_well_formed_if_every_verdict_is_yes():
    verdicts = [(0.9, 0.9, 0.9), (0.9, 0.9, 0.4), None, (0.51, 0.6, 0.7)]
    answers = {(1, 0, number): (0.64, 0.64, 0.64) for number in range(4)}
    answers |= {(1, 0, number, "reflection"): verdict for number, verdict in enumerate(verdicts)}
    run, sampled = refining("verifier", ["<think> a </think>"] * 4, pool=FixedPool(answers))
    reflection = reward.reflection_scores(run, sampled)
    np.testing.assert_array_equal(reflection, [1.0, 0.0, np.nan, 1.0])
    rewards = reward.collect(run, sampled, reflection, 1)
    assert rewards.valid.tolist() == [True, True, False, True]
    np.testing.assert_allclose(rewards.reward, [0.64, 0.64, np.nan, 0.64])
    assert rewards.failures == {"no verdict on the reflection": 1}
    assert rewards.reasons[2] == "no verdict on the reflection"
    shaped = reward.gather(run, sampled, 1)
    advantages = advantage.of_batch(shaped, run.config.advantage)
    # Text: reward + 0.5 (format + reflection) / 2; the image's reward is alone.
    expected = [[1 / 12, -1 / 6, 0.0, 1 / 12]]
    np.testing.assert_allclose(advantages.text.advantage, expected, atol=1e-6)
    np.testing.assert_allclose(advantages.image, np.zeros((1, 4)), atol=1e-6)
    assert shaped.metrics["reward/reflection"] == pytest.approx(2 / 3)


def test_reflections_by_rule():
    good = "<think> the cross is blue. make the cross red. red cross top left </think>"
    run, sampled = refining("rule", [good, *["<think> red cross </think>"] * 3])
    reflection = reward.reflection_scores(run, sampled)
    assert reflection.tolist() == [1.0, 0.0, 0.0, 0.0]
    rewards = dataclasses.replace(rewards_of([0.6] * 4), format=np.ones(4))
    shaped = reward.shape(run, sampled, rewards, reflection)
    advantages = advantage.of_batch(shaped, run.config.advantage)
    np.testing.assert_allclose(advantages.text.advantage[0], [0.1875, -0.0625, -0.0625, -0.0625])
    assert not advantages.image.any()
    # Without `isolate` it is a metric alone.
    run, _ = refining("rule", [], isolate=False)
    shaped = reward.shape(run, sampled, rewards, reflection)
    np.testing.assert_array_equal(shaped.text, [[0.6] * 4])
    assert shaped.metrics["reward/reflection"] == 0.25
    run, sampled = refining("none", [good] * 4)
    assert reward.reflection_scores(run, sampled) is None


@pytest.mark.parametrize(
    ("baseline", "image", "text"),
    [
        ("initial", [0.05, -0.05, -0.05, -0.05], [0.325, -0.025, -0.275, -0.025]),
        # 0.55 is the larger; all differences are 0.05, and so is their root mean square
        ("anchor", [1.0, -1.0, -1.0, -1.0], [0.325, -0.025, -0.275, -0.025]),
    ],
)
def test_repairs_are_compared_with_the_initial_image(baseline, image, text):
    """Texts too, unless they have a reward of their own: then with the mean of their group."""
    config = tiny_world.config(pathlib.Path("unused"))
    config.task, config.advantage.baseline, config.advantage.std = "srr", baseline, "none"
    config.srr.rectification, config.train.prompts_per_step = "none", 1
    config.rollout.micro_batch = config.train.micro_batch = 4
    numbers = (np.zeros(1, int), np.zeros((1, 2, 2, 3), np.uint8))
    initial = InitialImageQueue(np.array(1), *numbers, np.array([0.55]))
    batch = types.PromptBatch(0, tasks.TASKS["srr"], np.zeros(1, int), None, initial)
    sampled = types.RolloutBatch(batch, None, [], [], [["<think> a </think>"] * 4], {})
    formats = np.array([1.0, 0.5, 0.0, 0.5])
    rewards = dataclasses.replace(rewards_of([0.6, 0.5, 0.5, 0.5]), format=formats)
    for isolate in (False, True):
        config.reward.isolate = isolate
        parsed = config_lib.from_config_dict(config)
        shaped = reward.shape(run_without_model(parsed), sampled, rewards)
        advantages = advantage.of_batch(shaped, parsed.advantage)
        np.testing.assert_allclose(advantages.image[0], image, atol=1e-5)
        expected = text if isolate else image
        np.testing.assert_allclose(advantages.text.advantage[0], expected, atol=1e-5)


def rewards_of(values):
    count = len(values)
    nothing, valid = np.zeros(count), ~np.isnan(values)
    return scoring.Rewards(np.array(values), nothing, nothing, np.ones(count), valid, {})


def test_nothing_improved_means_no_advantages():
    config = config_lib.from_config_dict(tiny_world.config(pathlib.Path("unused")))
    config = dataclasses.replace(config, task="srr")
    numbers = (np.zeros(2, int), np.zeros((2, 2, 2, 3), np.uint8))
    initial = InitialImageQueue(np.array(2), *numbers, np.array([0.6, 0.9]))
    batch = types.PromptBatch(0, tasks.TASKS["srr"], np.zeros(2, int), None, initial)
    sampled = types.RolloutBatch(batch, None, [], [], [["<think> a </think>"] * 8], {})
    run = run_without_model(config)
    worse = rewards_of([0.6, 0.5, 0.1, 0.2, 0.9, 0.8, 0.3, 0.4])
    shaped = reward.shape(run, sampled, worse)
    advantages = advantage.of_batch(shaped, config.advantage)
    assert advantages.text.all_zero
    assert not advantages.image.any()
    assert advantages.left_out
    assert shaped.metrics["srr/improved_fraction"] == 0.0
    better = rewards_of([0.7, 0.5, 0.1, 0.2, 0.9, 0.8, 0.3, np.nan])
    shaped = reward.shape(run, sampled, better)
    advantages = advantage.of_batch(shaped, config.advantage)
    assert not advantages.left_out
    text = advantages.text.advantage
    assert text[0, 0] > 0 > text[0, 1]
    assert text[0, 1] == text[0, 2] == text[0, 3]  # all rectified to 0.6, the initial reward
    assert not text[1].any()  # rectified to 0.9, all of them
    assert shaped.metrics["srr/improved_fraction"] == pytest.approx(1 / 7)
    # The rectified reward alone: no format term, though all think texts are well formed.
    assert shaped.metrics["reward/total"] == pytest.approx((0.7 + 0.6 * 3 + 0.9 * 3) / 7)


def test_without_rectification_nothing_is_left_out():
    config = tiny_world.config(pathlib.Path("unused"))
    config.task, config.srr.rectification, config.advantage.std = "srr", "none", "none"
    config.train.prompts_per_step = 1
    config.rollout.micro_batch = config.train.micro_batch = 4
    parsed = config_lib.from_config_dict(config)
    numbers = (np.zeros(1, int), np.zeros((1, 2, 2, 3), np.uint8))
    initial = InitialImageQueue(np.array(1), *numbers, np.array([0.9]))
    batch = types.PromptBatch(0, tasks.TASKS["srr"], np.zeros(1, int), None, initial)
    sampled = types.RolloutBatch(batch, None, [], [], [["<think> a </think>"] * 4], {})
    shaped = reward.shape(run_without_model(parsed), sampled, rewards_of([0.8, 0.2, 0.4, 0.6]))
    advantages = advantage.of_batch(shaped, parsed.advantage)
    assert shaped.metrics["srr/improved_fraction"] == 0.0
    assert not advantages.left_out
    for values in (advantages.text.advantage, advantages.image):
        np.testing.assert_allclose(values, [[0.3, -0.3, -0.1, 0.1]], atol=1e-6)


def test_tasks_are_drawn_by_weight_and_by_the_step_alone():
    config = tiny_world.config(pathlib.Path("unused"))
    config.task, config.mixed.tasks, config.mixed.batches = "mixed", ("rt2i", "ti2t"), 2
    config.mixed.weights = (3.0, 1.0)
    parsed = config_lib.from_config_dict(config)
    names = [task.name for at in range(1, 2001) for task in prompts.tasks_at(parsed, at)]
    assert names.count("rt2i") / len(names) == pytest.approx(0.75, abs=0.03)
    again = [task.name for task in prompts.tasks_at(parsed, 7)]
    assert again == names[12:14]
