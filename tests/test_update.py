"""Updates of several batches, numerically: two batches of one task are one of twice the size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import rollout, tasks, types, update
from alphagrpo_jax.runtime.metric_reductions import merge_batches
from alphagrpo_jax.training import context, setup
from alphagrpo_jax.training import steps as steps_lib
from alphagrpo_jax.training.optimizer import make_optimizer

ADVANTAGES = np.array([[1.0, -0.5, 0.75, -1.25], [-0.25, 0.5, 1.5, -1.0]], np.float32)
USED = np.array([[True] * 4, [True, True, False, True]])


class World:
    """A run whose optimizer step only shows its gradient."""

    def __init__(self, root, prompts, micro_batch):
        fields = tiny_world.config(root)
        fields.train.prompts_per_step, fields.train.micro_batch = prompts, micro_batch
        fields.loss.level = "token"
        fields.loss.entropy_fraction, fields.loss.text_beta = 0.5, 0.1
        self.config = config_lib.from_config_dict(fields)
        mesh = setup.make_mesh(self.config)
        loaded = setup.load_policy(self.config, mesh)
        data = setup.load_data(self.config, loaded, root / "cache")
        optimizer = make_optimizer(self.config.optimizer)
        state = setup.initial_state(self.config, loaded.base, optimizer, mesh)
        trainable = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape),
            state.trainable,
        )
        self.state = state.replace(trainable=trainable)
        fns = steps_lib.compile_fns(self.config, loaded, state, optimizer, mesh)
        fns = fns._replace(apply_gradient=self.apply)
        self.run = context.make_run(self.config, loaded, data, fns, None, root)

    def apply(self, state, gradient, metrics):
        self.gradient = jax.tree.map(np.asarray, gradient)
        return state, metrics | {"update/finite": 1.0, "update/grad_norm": 0.0}

    def update(self, rollouts, advantages):
        old = [update.old_log_probs(self.run, self.state, sampled) for sampled in rollouts]
        _, metrics = update.step(self.run, self.state, rollouts, old, advantages, 1)
        return self.gradient, metrics.update, metrics.batches


def scored(advantage, used, **options):
    advantage = np.where(used, advantage, 0.0).astype(np.float32)
    return types.BatchAdvantages(types.Advantages(advantage, used, {}), advantage, **options)


def batch(number, rows):
    return types.PromptBatch(number, tasks.TASKS["rt2i"], np.array(rows), None, None)


def cut(sampled):
    """The same with shorter texts, so that tokens and trajectories weigh differently."""
    texts = tuple(
        text.replace(mask=text.mask.at[:, 3:].set(False), scored=text.scored.at[:, 2:].set(False))
        for text in sampled.trajectories.texts
    )
    return sampled._replace(trajectories=sampled.trajectories.replace(texts=texts))


def joined_rows(first, second):
    """The trajectories of two prompts in one rollout, as if both had been in one batch."""

    def join(axis, *arrays):
        return jnp.concatenate(arrays, axis=axis)

    rows = types.map_rows(join, first, second.replace(owner=second.owner + 1))
    pieces = [
        types.map_rows(join, *pair) if pair[0] is not None and pair[0].level == "prompt" else joined
        for joined, *pair in zip(rows.pieces, first.pieces, second.pieces, strict=True)
    ]
    return rows.replace(pieces=tuple(pieces))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Runs of one and of two prompts per batch, and rollouts for both."""
    root = tiny_world.write_all(tmp_path_factory.mktemp("world"))
    single, double = World(root, 1, micro_batch=1), World(root, 2, micro_batch=4)
    params = single.run.sampling_params(single.state)
    first, second = (
        rollout.sample(single.run, params, single.state.key, 1, batch(number, [number]))
        for number in (0, 1)
    )
    second = cut(second)
    trajectories = joined_rows(first.trajectories, second.trajectories)
    joined = types.RolloutBatch(batch(0, [0, 1]), trajectories, [], [], [], {})
    return single, double, (first, second), joined


def test_a_batch_has_one_window_of_stochastic_steps(worlds):
    """Each batch of each update its own, within `window_range`; never one per row."""
    single, _, rollouts, _ = worlds
    windows = [sampled.trajectories.images[0].start for sampled in rollouts]
    params = single.run.sampling_params(single.state)
    for step in range(2, 7):
        sampled = rollout.sample(single.run, params, single.state.key, step, batch(0, [0]))
        windows.append(sampled.trajectories.images[0].start)
    assert all(window.shape == () for window in windows)
    options = single.config.rollout
    low, high = options.window_range
    starts = {int(window) for window in windows}
    assert starts <= set(range(low, high - options.window + 1))
    assert len(starts) > 1


@pytest.mark.parametrize("zero", [False, True])
def test_two_batches_of_a_task_are_one_of_twice_the_size(worlds, zero):
    """Also if the second one's rewards are all alike: its trajectories are valid."""
    single, double, rollouts, joined = worlds
    advantage = ADVANTAGES * np.array([[1.0], [0.0 if zero else 1.0]], np.float32)
    advantages = [scored(advantage[i : i + 1], USED[i : i + 1]) for i in (0, 1)]
    gradient, update_metrics, batch_metrics = single.update(rollouts, advantages)
    expected, once, (metrics,) = double.update([joined], [scored(advantage, USED)])
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        expected_leaf = dict(jax.tree_util.tree_flatten_with_path(expected)[0])[path]
        np.testing.assert_allclose(
            leaf, expected_leaf, rtol=1e-3, atol=2e-5 * np.abs(expected_leaf).max()
        )
    assert update_metrics["loss/total"] == pytest.approx(once["loss/total"], rel=1e-5)
    merged = merge_batches(batch_metrics, ["rt2i"] * 2, by_task=False)
    for name in ("loss/text", "loss/image", "text/entropy", "text/kl", "update/skipped"):
        assert merged[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-7), name


def test_a_batch_that_is_left_out_counts_nowhere(worlds):
    single, _, rollouts, _ = worlds
    first = scored(ADVANTAGES[:1], USED[:1])
    nothing = scored(np.zeros((1, 4), np.float32), USED[:1], left_out=True)
    gradient, update_metrics, batch_metrics = single.update(rollouts, [first, nothing])
    expected, once, _ = single.update(rollouts[:1], [first])
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)
    assert update_metrics["loss/total"] == once["loss/total"]
    assert batch_metrics[1] == {"update/skipped": 1}
    assert batch_metrics[0]["update/skipped"] == 0


def test_batches_without_any_advantage_skip_the_update(worlds):
    single, _, rollouts, _ = worlds
    nothing = scored(np.zeros((1, 4), np.float32), USED[:1])
    _, update_metrics, batch_metrics = single.update(rollouts, [nothing, nothing])
    assert update_metrics == {"update/skipped": 1}
    assert batch_metrics == [{"update/skipped": 1}] * 2


@pytest.mark.parametrize("updates", [1, 2])
def test_kept_residuals_give_the_same_bits_with_a_forward_pass_less(worlds, monkeypatch, updates):
    single, _, rollouts, _ = worlds
    advantages = [scored(ADVANTAGES[i : i + 1], USED[i : i + 1]) for i in (0, 1)]
    passes, micro_batches = {}, 2 * 4
    results = {}
    for keep in (False, True):
        calls = []
        train = dataclasses.replace(
            single.config.train, keep_residuals=keep, updates_per_batch=updates
        )
        run = single.run._replace(config=dataclasses.replace(single.config, train=train))
        fns = run.tasks["rt2i"].fns

        def forward(*arguments, inner=fns.forward, calls=calls):
            calls.append(1)
            return inner(*arguments)

        tasks_fns = {"rt2i": run.tasks["rt2i"]._replace(fns=fns._replace(forward=forward))}
        run = run._replace(tasks=tasks_fns)
        old = [update.old_log_probs(run, single.state, sampled) for sampled in rollouts]
        assert all((x is not None) == keep for entry in old for x in entry.residuals)
        _, metrics = update.step(run, single.state, rollouts, old, advantages, 1)
        assert all(x is None for entry in old for x in entry.residuals)  # their memory is free
        results[keep], passes[keep] = (single.gradient, metrics), len(calls)
    assert passes == {False: micro_batches * (1 + updates), True: micro_batches * updates}
    jax.tree.map(np.testing.assert_array_equal, *results.values())


def test_residuals_that_no_update_takes_are_freed(worlds):
    single, _, rollouts, _ = worlds
    train = dataclasses.replace(single.config.train, keep_residuals=True)
    run = single.run._replace(config=dataclasses.replace(single.config, train=train))
    old = update.old_log_probs(run, single.state, rollouts[0])
    nothing = scored(np.zeros((1, 4), np.float32), USED[:1])
    update.step(run, single.state, rollouts[:1], [old], [nothing], 1)
    assert old.residuals == [None] * 4
