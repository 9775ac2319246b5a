"""Updates of a stored rollout: exactness, micro-batches, gradients, guards."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import policy
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.sampling import contexts as contexts_lib
from alphagrpo_jax.sampling import image as image_lib
from alphagrpo_jax.sampling import trajectory
from alphagrpo_jax.tasks import IMAGE, TASKS, TEXT, THINK, Task
from alphagrpo_jax.training import gradient as gradient_lib
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.training import update_loss
from alphagrpo_jax.training.update_loss import FixedOutputs
from alphagrpo_jax.types import (
    Rollout,
    TextBlock,
    TrainState,
    UpdateBatch,
    join_micro_batches,
    map_rows,
    take_micro_batch,
)  # fmt: skip

ROWS, ONE = 4, jnp.float32(1.0)


class Setting(NamedTuple):
    loaded: object
    spec: update_loss.UpdateSpec
    trainable: dict
    stored: Rollout
    batch: UpdateBatch


def configuration(tmp_path=None):
    config = tiny_world.config(tmp_path or tiny_world.pathlib.Path("unused"))
    config.train.prompts_per_step, config.train.group_size = 2, 2
    config.train.micro_batch = config.rollout.micro_batch = ROWS
    return config_lib.from_config_dict(config)


@pytest.fixture(scope="module")
def setting():
    """A rollout of two prompts by two, under adapters that are not zero."""
    config, loaded = configuration(), tiny_world.model()
    spec = options_lib.update_spec(config, loaded, TASKS["rt2i"])
    trainable = gradient_lib.init_trainable(
        loaded.base, jax.random.key(2), config.lora, config.train
    )
    trainable = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), trainable
    )
    params = gradient_lib.policy_params(loaded.base, trainable, lora_scale=2.0)
    rows = [loaded.tokenizer.wrap(text) for text in tiny_world.WORDS[:2]]
    block = TextBlock(*loaded.tokenizer.batch(rows, config.rollout.prompt_tokens))
    run = jax.jit(
        functools.partial(trajectory.sample_trajectories, loaded.model, spec=spec.rollout)
    )
    numbers = (jax.random.key(5), jnp.int32(0), jnp.int32(1), jnp.float32(1.0))
    stored, _ = run(params, (block,), *numbers)
    advantage = jnp.array([1.0, -0.5, 0.75, -1.25])
    batch = UpdateBatch(stored, advantage, advantage, jnp.array([True, True, True, False]))
    return Setting(loaded, spec, trainable, stored, batch)


def gradient_of(setting, spec, *, trainable=None, batch=None, old=None, base=None):
    """Gradient, metrics and new scores of the whole update, by the spec's micro-batches."""
    base = setting.loaded.base if base is None else base
    trainable = setting.trainable if trainable is None else trainable
    batch = setting.batch if batch is None else batch
    forward = _jitted("forward", setting.loaded.model, spec)
    backward = _jitted("backward", None, spec)
    totals = update_loss.count_normalizers(batch, None, spec=spec)
    summed, scores = None, []
    for micro_batch in range(spec.layout.micro_batches):
        new, residuals = forward(trainable, base, batch.rollout, jnp.int32(micro_batch))
        before = None if old is None else old[micro_batch]
        contribution = backward(
            trainable,
            base,
            residuals,
            new,
            before,
            fixed_outputs(setting, spec, base, trainable, batch, jnp.int32(micro_batch)),
            batch,
            jnp.int32(micro_batch),
            totals,
            ONE,
        )
        summed = contribution if summed is None else gradient_lib.accumulate(*summed, contribution)
        scores.append(new)
    return *summed, scores


def fixed_outputs(setting, spec, base, trainable, batch, micro_batch):
    """Velocities of an average policy, half of the trained one, where the loss needs them."""
    if not spec.loss.matches:
        return FixedOutputs()
    average = jax.tree.map(lambda x: 0.5 * x, trainable)
    compute = _jitted("average_velocities", setting.loaded.model, spec)
    return FixedOutputs(average=compute(average, base, batch.rollout, micro_batch))


@functools.cache
def _jitted(name, model, spec):
    options = {"spec": spec} | ({} if model is None else {"model": model})
    return jax.jit(functools.partial(vars(gradient_lib)[name], **options))


def layout_of(size):
    return RowLayout.make(ROWS, shards=1, micro_batch=size)


def assert_close(first, second, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), first, second)


def test_old_scores_are_the_new_ones_bit_for_bit(setting):
    _, _, scores = gradient_of(setting, setting.spec)
    _, metrics, again = gradient_of(setting, setting.spec, old=scores)
    jax.tree.map(np.testing.assert_array_equal, scores, again)
    assert metrics["text/ratio_max_dev"] == 0.0
    assert metrics["image/ratio_max_dev"] == 0.0
    assert metrics["logp/rollout_update_max_abs_diff"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("level", "sizes"), [("sequence", (1, 3)), ("token", (1, 2, 3))])
def test_the_gradient_does_not_depend_on_the_micro_batch(setting, level, sizes):
    loss = dataclasses.replace(setting.spec.loss, level=level)
    spec = dataclasses.replace(setting.spec, loss=loss)
    expected, metrics, _ = gradient_of(setting, spec)
    for size in sizes:
        cut = dataclasses.replace(spec, layout=layout_of(size))
        gradient, cut_metrics, _ = gradient_of(setting, cut)
        assert_close(gradient, expected, atol=2e-6, rtol=2e-4)
        assert_close(cut_metrics, metrics, atol=2e-6, rtol=2e-4)


def test_invalid_trajectories_do_not_count(setting):
    changed = setting.batch.replace(advantage=setting.batch.advantage.at[3].set(100.0))
    expected, _, _ = gradient_of(setting, setting.spec)
    gradient, _, _ = gradient_of(setting, setting.spec, batch=changed)
    jax.tree.map(np.testing.assert_array_equal, gradient, expected)


def test_gradients_reach_every_adapter_of_both_experts(setting):
    gradient, _, _ = gradient_of(setting, setting.spec)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert float(jnp.abs(leaf).max()) > 0, path


@pytest.mark.slow
def test_steps_that_are_not_trained_are_not_computed(setting):
    """The gradient is that of the same loss over the log-probs of all steps."""
    base, model = setting.loaded.base, setting.loaded.model
    totals = update_loss.count_normalizers(setting.batch, None, spec=setting.spec)
    for untrained in ("text", "image"):
        loss = dataclasses.replace(setting.spec.loss, **{untrained: "none"})
        spec = dataclasses.replace(setting.spec, loss=loss)
        gradient, metrics, (scores,) = gradient_of(setting, spec)
        for name, arrays in vars(scores).items():
            expected = not name.startswith(untrained) and name != "image_velocity"
            assert bool(arrays) == expected, name
        assert 0 < metrics["logp/rollout_update_max_abs_diff"] < 1e-4

        def of_all_steps(trainable, spec=spec):
            params = gradient_lib.policy_params(base, trainable, lora_scale=spec.lora_scale)
            new = gradient_lib.log_probs(model, params, setting.stored, spec=setting.spec)
            old = jax.lax.stop_gradient(new)
            return update_loss.micro_loss(
                new, old, FixedOutputs(), setting.batch, totals, spec=spec
            )[0]

        expected = jax.jit(jax.grad(of_all_steps))(setting.trainable)
        assert_close(gradient, expected, atol=1e-6, rtol=1e-3)


def test_text_alone_does_not_move_the_image_expert(setting):
    loss = dataclasses.replace(setting.spec.loss, image="none")
    gradient, _, _ = gradient_of(setting, dataclasses.replace(setting.spec, loss=loss))
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        is_trained = float(jnp.abs(leaf).max()) > 0
        is_gen = "_moe_gen" in jax.tree_util.keystr(path)
        assert is_trained != is_gen, path


def test_gradient_against_finite_differences(setting):
    gradient, _, old = gradient_of(setting, setting.spec)
    key = jax.random.key(8)
    leaves, structure = jax.tree.flatten(setting.trainable)
    keys = jax.random.split(key, len(leaves))
    direction = structure.unflatten(
        [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )
    # The image clip of 1e-5 would bind at any finite step.
    loss = dataclasses.replace(setting.spec.loss, image_clip=0.9)
    open_clip = dataclasses.replace(setting.spec, loss=loss)
    step = 1e-3
    losses = []
    for distance in (step, -step):
        offset = jax.tree.map(functools.partial(jnp.multiply, distance), direction)
        shifted = jax.tree.map(jnp.add, setting.trainable, offset)
        _, metrics, _ = gradient_of(setting, open_clip, trainable=shifted, old=old)
        losses.append(float(metrics["loss/total"]))
    slope = (losses[0] - losses[1]) / (2 * step)
    expected = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert slope == pytest.approx(expected, rel=2e-2)


@pytest.mark.slow
def test_context_gradient_gives_the_same_scores_and_another_gradient(setting):
    flowing = dataclasses.replace(setting.spec, rebuild_contexts=True)
    detached, _, scores = gradient_of(setting, setting.spec)
    gradient, _, again = gradient_of(setting, flowing)
    assert_close(again, scores, atol=2e-5)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, detached))
    assert float(distance) > 0.05 * float(optax.tree.norm(detached))


def test_rebuilt_contexts_are_the_stored_ones(setting):
    params = gradient_lib.policy_params(setting.loaded.base, setting.trainable, lora_scale=2.0)
    rollout_spec = setting.spec.rollout
    pieces = jax.jit(
        functools.partial(
            contexts_lib.rebuild,
            setting.loaded.model,
            plan=rollout_spec.plan,
            system_tokens=rollout_spec.system_tokens,
            grid=rollout_spec.grid,
        )
    )(params, setting.stored)
    for stored, rebuilt in zip(setting.stored.pieces, pieces, strict=True):
        if stored.level == "prompt":
            by_prompt = map_rows(lambda axis, x: jnp.take(x, setting.stored.owner, axis), stored)
            stored = dataclasses.replace(by_prompt, level="trajectory")
        np.testing.assert_array_equal(stored.advance, rebuilt.advance)
        (stored_cache,), (rebuilt_cache,) = stored.segments, rebuilt.segments
        np.testing.assert_array_equal(stored_cache.valid, rebuilt_cache.valid)
        mask = np.asarray(stored_cache.valid)
        for name in ("k", "v"):
            pair = (
                np.moveaxis(np.asarray(vars(cache)[name]), 2, 3)[:, mask]
                for cache in (stored_cache, rebuilt_cache)
            )
            np.testing.assert_allclose(*pair, atol=2e-5)


def test_kl_to_the_reference_grows_with_the_adapters(setting):
    loss = dataclasses.replace(setting.spec.loss, text_beta=0.1, image_beta=0.1)
    spec = dataclasses.replace(setting.spec, loss=loss)
    reference = jax.jit(
        functools.partial(gradient_lib.reference_log_probs, model=setting.loaded.model, spec=spec)
    )(setting.loaded.base, setting.stored, jnp.int32(0))
    zero = jax.tree.map(jnp.zeros_like, setting.trainable)
    values = []
    for trainable in (zero, setting.trainable):
        forward = _jitted("forward", setting.loaded.model, spec)
        new, _ = forward(trainable, setting.loaded.base, setting.stored, jnp.int32(0))
        totals = update_loss.count_normalizers(setting.batch, None, spec=spec)
        _, metrics = update_loss.micro_loss(
            new, new, FixedOutputs(reference), setting.batch, totals, spec=spec
        )
        values.append((float(metrics["text/kl"]), float(metrics["image/kl"])))
    # The stored contexts are those of the adapters, hence not exactly zero.
    assert values[0][0] < values[1][0]
    assert values[0][1] < values[1][1]


def test_full_training_replaces_part_of_the_base(setting):
    base = setting.loaded.base
    config = configuration()
    train_options = dataclasses.replace(
        config.train, trainable="full", full_targets=r"language_model/layers/.*"
    )
    chosen = gradient_lib.init_trainable(base, jax.random.key(0), config.lora, train_options)
    assert set(chosen) == {"language_model"}
    doubled = jax.tree.map(lambda x: 2 * x, chosen)
    params = gradient_lib.policy_params(base, doubled, lora_scale=None)
    kernel = "language_model", "layers", "self_attn", "q_proj", "kernel"
    after, before = params.base, base
    for name in kernel:
        after, before = after[name], before[name]
    np.testing.assert_array_equal(after, 2 * before)
    assert params.base["lm_head"]["kernel"] is base["lm_head"]["kernel"]
    nothing = dataclasses.replace(train_options, full_targets="nothing")
    with pytest.raises(ValueError, match="matches none of"):
        gradient_lib.init_trainable(base, jax.random.key(0), config.lora, nothing)


def test_a_gradient_that_is_not_finite_changes_nothing():
    optimizer = optax.adamw(0.1)
    trainable = {"a": jnp.ones(3)}
    state = TrainState(trainable, optimizer.init(trainable), jax.random.key(0))
    apply = functools.partial(gradient_lib.apply_gradient, optimizer=optimizer)
    for gradient, loss in (([jnp.nan, 1, 1], 0.0), ([1.0, 1, 1], jnp.inf)):
        metrics = {"loss/total": jnp.float32(loss)}
        after, metrics = apply(state, {"a": jnp.array(gradient)}, metrics)
        assert metrics["update/finite"] == 0
        jax.tree.map(np.testing.assert_array_equal, after.trainable, state.trainable)
        jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    after, metrics = apply(state, {"a": jnp.ones(3)}, {"loss/total": jnp.float32(1)})
    assert metrics["update/finite"] == 1
    np.testing.assert_allclose(after.trainable["a"], 0.9 - 1e-5, rtol=1e-6)


def test_only_the_most_uncertain_tokens_are_trained(setting):
    loss = dataclasses.replace(setting.spec.loss, entropy_fraction=0.5)
    spec = dataclasses.replace(setting.spec, loss=loss)
    _, _, scores = gradient_of(setting, setting.spec)
    (entropy,) = update_loss.join_entropy(scores, layout=setting.spec.layout)
    totals = update_loss.count_normalizers(setting.batch, (entropy,), spec=spec)
    mask = np.asarray(setting.stored.texts[0].scored) & np.asarray(setting.batch.valid)[:, None]
    values = np.sort(np.asarray(entropy)[mask])
    uncertain = values[values >= np.quantile(values, 0.5)]
    assert totals.tokens.tolist() == [len(values)]
    assert totals.selected_tokens.tolist() == [len(uncertain)]
    assert totals.entropy_threshold.tolist() == [uncertain[0]]


@pytest.mark.parametrize("mean", ["all", "kept"])
def test_the_loss_of_uncertain_tokens_is_averaged_as_configured(setting, mean):
    """At ratio 1 the derivative by a trained token is -A over the number of all, or of such."""
    loss = dataclasses.replace(
        setting.spec.loss, entropy_fraction=0.5, entropy_mean=mean, level="token", image="none"
    )
    spec = dataclasses.replace(setting.spec, loss=loss)
    _, _, (old,) = gradient_of(setting, setting.spec)
    totals = update_loss.count_normalizers(setting.batch, old.text_entropy, spec=spec)

    def run(new):
        return update_loss.micro_loss(new, old, FixedOutputs(), setting.batch, totals, spec=spec)

    derivatives, metrics = jax.grad(run, has_aux=True)(old)
    valid = np.asarray(setting.batch.valid)[:, None]
    scored = np.asarray(setting.stored.texts[0].scored) & valid
    entropy = np.asarray(old.text_entropy[0])
    trained = scored & (entropy >= np.quantile(entropy[scored], 0.5))
    assert 0 < trained.sum() < scored.sum()
    counted = scored if mean == "all" else trained
    advantage = np.asarray(setting.batch.advantage)[:, None]
    expected = np.where(trained, -advantage, 0.0) / counted.sum()
    np.testing.assert_allclose(derivatives.text_log_prob[0], expected, rtol=1e-5)
    assert metrics["text/entropy"] == pytest.approx(entropy[counted].mean(), rel=1e-5)


@pytest.mark.parametrize(("image_loss", "factors"), [("grpo", (2, 1)), ("none", None)])
def test_a_text_counts_as_all_images_that_follow_it(setting, monkeypatch, image_loss, factors):
    """The counts that the loss gets, for two turns whose losses are empty here."""
    turns = Task("turns", (TEXT, THINK, IMAGE, TEXT, THINK, IMAGE), texts=("{prompt}", "Again."))
    spec = options_lib.update_spec(configuration(), setting.loaded, turns)
    spec = dataclasses.replace(spec, loss=dataclasses.replace(spec.loss, image=image_loss))
    window = spec.rollout.options.window
    got = {}
    monkeypatch.setattr(
        update_loss.loss, "grpo_loss", lambda *_, **options: got.update(options) or (0.0, {})
    )
    (old,) = gradient_of(setting, setting.spec)[2]
    twice = jax.tree.map(lambda steps: steps * 2, old, is_leaf=lambda x: isinstance(x, tuple))
    stored = setting.stored.replace(
        texts=setting.stored.texts * 2, images=setting.stored.images * 2
    )
    batch = setting.batch.replace(rollout=stored)
    totals = update_loss.count_normalizers(batch, None, spec=spec)
    update_loss.micro_loss(twice, twice, FixedOutputs(), batch, totals, spec=spec)
    assert window > 1
    expected = tuple(factor * window for factor in factors) if factors else (1, 1)
    assert got["text_counts"] == expected


def test_micro_batches_hold_every_row_and_repeat_where_they_run_out(setting):
    tokens = np.asarray(setting.stored.texts[0].tokens)
    keys = np.asarray(setting.stored.pieces[2].segments[0].k)
    layout = layout_of(3)
    for number, rows in ((0, [0, 1, 2]), (1, [1, 2, 3])):
        micro_batch = take_micro_batch(layout, setting.stored, jnp.int32(number))
        np.testing.assert_array_equal(micro_batch.texts[0].tokens, tokens[rows])
        np.testing.assert_array_equal(micro_batch.pieces[2].segments[0].k, keys[:, rows])
        np.testing.assert_array_equal(micro_batch.owner, np.array([0, 0, 1, 1])[rows])
        assert micro_batch.pieces[0].advance.shape == (1,)  # of all prompts
        assert micro_batch.pieces[1].advance.shape == (2,)  # one per prompt
        np.testing.assert_array_equal(layout.rows_of(number)[0], rows)
    micro_batches = [take_micro_batch(layout, setting.stored, jnp.int32(n)) for n in range(2)]
    joined = join_micro_batches(layout, micro_batches)
    jax.tree.map(np.testing.assert_array_equal, joined, setting.stored)


@pytest.fixture(scope="module", params=["nft", "awm"])
def matching(request, setting):
    """A setting whose images are noised again, for a loss that matches velocities."""
    rollout = dataclasses.replace(setting.spec.rollout.options, sampler="ode")
    spec = dataclasses.replace(
        setting.spec,
        rollout=dataclasses.replace(setting.spec.rollout, options=rollout),
        loss=dataclasses.replace(setting.spec.loss, image=request.param),
    )
    levels = jnp.asarray(image_lib.noise_levels(rollout))
    keys = jax.random.split(jax.random.key(11), ROWS)
    (sample,) = setting.stored.images
    noised = image_lib.noised_again(
        sample.latents, keys, sample.start, count=rollout.window, options=rollout
    )
    assert set(np.asarray(noised.sigma).ravel()) <= set(np.asarray(levels))
    stored = setting.stored.replace(images=(noised,))
    return setting._replace(spec=spec, stored=stored, batch=setting.batch.replace(rollout=stored))


@pytest.mark.slow
def test_losses_of_velocities_do_not_depend_on_the_micro_batch_or_on_passes(matching):
    """By one micro-batch and by two; both levels in one pass and one after the other."""
    expected, metrics, _ = gradient_of(matching, matching.spec)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    norm = float(optax.tree.norm(expected))
    assert norm > 0
    in_turn = dataclasses.replace(
        matching.spec.passes,
        image_steps_at_once=not matching.spec.passes.image_steps_at_once,
    )
    for spec in (
        dataclasses.replace(matching.spec, layout=layout_of(3)),
        dataclasses.replace(matching.spec, passes=in_turn),
    ):
        gradient, again, _ = gradient_of(matching, spec)
        assert_close(gradient, expected, atol=1e-5 * norm)
        assert_close(again, metrics, rtol=1e-4, atol=1e-6)


def test_velocities_are_those_of_the_policy_at_the_noised_latents(matching):
    """Read from the stored contexts one level at a time, by the policy's own function."""
    spec, loaded = matching.spec, matching.loaded
    forward = _jitted("forward", loaded.model, spec)
    new, _ = forward(matching.trainable, loaded.base, matching.stored, jnp.int32(0))
    assert new.image_log_prob == new.image_mean == ()
    params = gradient_lib.policy_params(loaded.base, matching.trainable, lora_scale=2.0)
    (sample,), (step,) = matching.stored.images, spec.plan.image_steps
    ctx = contexts_lib.guidance_contexts(matching.stored.pieces, step, matching.stored.owner).gen
    weight = sample.sigma[..., None, None]
    noised = (1 - weight) * sample.latents[:, None] + weight * sample.after
    for level in range(spec.rollout.options.window):
        expected = policy.velocity(
            loaded.model, params, ctx, noised[:, level], sample.sigma[:, level], spec.rollout.grid
        )
        np.testing.assert_allclose(new.image_velocity[0][:, level], expected, atol=2e-4)


def test_a_loss_of_velocities_needs_those_of_the_average(matching):
    forward = _jitted("forward", matching.loaded.model, matching.spec)
    new, _ = forward(matching.trainable, matching.loaded.base, matching.stored, jnp.int32(0))
    totals = update_loss.count_normalizers(matching.batch, None, spec=matching.spec)
    arguments = (new, new, FixedOutputs(), matching.batch, totals)
    with pytest.raises(ValueError, match="no velocities of the average policy"):
        update_loss.micro_loss(*arguments, spec=matching.spec)


def test_one_function_for_both_passes_gives_the_gradient_of_two(setting):
    expected, metrics, _ = gradient_of(setting, setting.spec)
    totals = update_loss.count_normalizers(setting.batch, None, spec=setting.spec)
    fused = _jitted("gradient", setting.loaded.model, setting.spec)
    arguments = (
        setting.trainable,
        setting.loaded.base,
        FixedOutputs(),
        setting.batch,
        jnp.int32(0),
        totals,
    )
    gradient, fused_metrics = fused(*arguments, ONE)
    assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert_close(fused_metrics, metrics, atol=1e-6, rtol=1e-4)
    assert fused_metrics["text/ratio_max_dev"] == fused_metrics["image/ratio_max_dev"] == 0.0


@pytest.mark.parametrize(
    "changes",
    [{"merge_lora": False}, {"image_steps_at_once": False}, {"text_chunk": 0}, {"text_chunk": 3}],
    ids=str,
)
def test_ways_to_compute_an_update_give_one_gradient(setting, changes):
    expected, metrics, _ = gradient_of(setting, setting.spec)
    passes = dataclasses.replace(setting.spec.passes, **changes)
    other = dataclasses.replace(setting.spec, passes=passes)
    assert other != setting.spec
    gradient, other_metrics, _ = gradient_of(setting, other)
    assert_close(gradient, expected, atol=2e-6, rtol=1e-3)
    assert_close(other_metrics, metrics, atol=2e-6, rtol=2e-4)


def test_residuals_hold_no_weights(setting):
    model = setting.loaded.model.clone(remat="full")
    passes = dataclasses.replace(setting.spec.passes, merge_lora=False)
    forward = _jitted("forward", model, dataclasses.replace(setting.spec, passes=passes))
    _, residuals = forward(setting.trainable, setting.loaded.base, setting.stored, jnp.int32(0))
    matrices = {
        x.shape for x in jax.tree.leaves(setting.loaded.base["language_model"]) if x.ndim == 3
    }
    held = [x.shape for x in residuals.arrays if x.shape in matrices]
    assert not held
    assert sum(index is not None for index in residuals.inputs) > 10
