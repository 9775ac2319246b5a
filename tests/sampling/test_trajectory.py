"""Rollouts: the same trajectories however they are cut, and what a group shares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import policy
from alphagrpo_jax.models import lora
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime.rows import RowLayout
from alphagrpo_jax.sampling import contexts as contexts_lib
from alphagrpo_jax.sampling import trajectory
from alphagrpo_jax.tasks import TASKS
from alphagrpo_jax.training import options as options_lib
from alphagrpo_jax.types import TextBlock, join_micro_batches


@pytest.fixture(scope="module")
def setting():
    """The model, the spec of groups of two, and two prompts."""
    config = tiny_world.config(tiny_world.pathlib.Path("unused"))
    config.train.group_size = config.train.prompts_per_step = config.rollout.micro_batch = 2
    config.train.micro_batch = 2
    parsed = config_lib.from_config_dict(config)
    loaded = tiny_world.model()
    rows = [loaded.tokenizer.wrap(text) for text in tiny_world.WORDS[:2]]
    block = TextBlock(*loaded.tokenizer.batch(rows, parsed.rollout.prompt_tokens))
    return loaded, options_lib.rollout_spec(parsed, loaded, TASKS["rt2i"]), block


@pytest.fixture(scope="module")
def run(setting):
    loaded = setting[0]
    jitted = jax.jit(
        functools.partial(trajectory.sample_trajectories, loaded.model), static_argnames="spec"
    )

    def run(block, *, first=0, start=1, spec=setting[1]):
        numbers = (jax.random.key(5), jnp.int32(first), jnp.int32(start), jnp.float32(1.0))
        return jitted(PolicyParams(loaded.base), (block,), *numbers, spec=spec)

    return run


@pytest.fixture(scope="module")
def sampled(run, setting):
    return run(setting[2])


def test_what_comes_out(setting, sampled):
    trajectories, images = sampled
    assert images.shape == (4, tiny_world.SIDE, tiny_world.SIDE, 3)
    assert images.dtype == np.uint8
    assert trajectories.texts[0].tokens.shape == (4, 5 + 2)
    assert trajectories.images[0].before.shape == (4, 2, 4, setting[0].config.latent_width)
    np.testing.assert_array_equal(
        trajectories.images[0].after[:, 0], trajectories.images[0].before[:, 1]
    )
    assert [piece.advance.shape[0] for piece in trajectories.pieces] == [1, 2, 4]
    prompt = np.asarray(trajectories.inputs[0].tokens)
    np.testing.assert_array_equal(prompt[0], prompt[1])
    assert (prompt[1] != prompt[2]).any()


def test_members_of_a_group_differ(sampled):
    trajectories, _ = sampled
    latents = np.asarray(trajectories.images[0].latents)
    assert np.abs(latents[0] - latents[1]).max() > 0.1


def test_cut_into_calls_gives_the_same_trajectories(setting, run, sampled):
    block, micro_batches = setting[2], []
    for number in range(2):
        prompt = TextBlock(block.tokens[number : number + 1], block.mask[number : number + 1])
        micro_batch, _ = run(prompt, first=2 * number)
        micro_batches.append(micro_batch)
    layout = RowLayout.make(4, shards=1, micro_batch=2)
    joined = join_micro_batches(layout, micro_batches)
    np.testing.assert_array_equal(joined.texts[0].tokens, sampled[0].texts[0].tokens)
    assert jax.tree.structure(joined) == jax.tree.structure(sampled[0])
    by_row = [
        (rollout.texts, rollout.images, rollout.pieces[2]) for rollout in (joined, sampled[0])
    ]
    for got, expected in zip(*map(jax.tree.leaves, by_row), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_noise_may_be_shared_within_a_group(setting, run, sampled):
    options = dataclasses.replace(
        setting[1].options, shared_noise=True, window=1, window_range=(0, 1)
    )
    trajectories, _ = run(
        setting[2], start=0, spec=dataclasses.replace(setting[1], options=options)
    )
    before = np.asarray(trajectories.images[0].before[:, 0])
    np.testing.assert_array_equal(before[0], before[1])
    assert np.abs(before[1] - before[2]).max() > 0.1


def test_merged_adapters_draw_as_adapters_do(setting, run, sampled):
    loaded, spec, block = setting

    adapters = lora.init(jax.random.key(0), loaded.base, lora.TARGETS, rank=2)
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)
    params = PolicyParams(loaded.base, adapters, 2.0)
    merged = trajectory.merged_params(params, merge_lora=True)
    assert merged.lora is None
    assert trajectory.merged_params(params, merge_lora=False) is params
    fill = jax.jit(functools.partial(trajectory.prefill, loaded.model, spec=spec))
    first, second = (fill(weights, (block,)) for weights in (params, merged))
    for leaf, merged_leaf in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(leaf, merged_leaf, atol=2e-5)


def test_pixels_are_truncated(setting):
    loaded = setting[0]
    latents = jax.random.normal(jax.random.key(0), (1, 4, loaded.config.latent_width))
    params = PolicyParams(loaded.base)
    decode = functools.partial(contexts_lib.pixels, loaded.model, grid=(2, 2))
    images = jax.jit(decode)(params, latents)

    floats = jax.jit(functools.partial(policy.decode_latents, loaded.model, grid=(2, 2)))
    exact = (np.asarray(floats(params, latents), np.float64) / 2 + 0.5) * 255
    assert (np.abs(np.asarray(images) - (exact - 0.5)) <= 0.5 + 1e-3).all()
