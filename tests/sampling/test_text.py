"""Sampling texts: against teacher forcing, by hand for the nucleus, and row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_world

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache
from alphagrpo_jax.ops.log_probs import token_log_probs
from alphagrpo_jax.sampling import text

MAX_TOKENS = 6


@pytest.fixture(scope="module")
def tiny():
    return tiny_world.model()


@pytest.fixture(scope="module")
def extend(tiny):
    return jax.jit(functools.partial(policy.extend_text, tiny.model))


@pytest.fixture(scope="module")
def setting(tiny, extend):
    """Parameters, a context of three prompts of different lengths, and the jitted sampler."""
    params = policy.PolicyParams(tiny.base)
    prompts = ("a red circle", "two", "a blue square, please")
    tokens, mask = tiny.tokenizer.batch([tiny.tokenizer.wrap(prompt) for prompt in prompts], 24)
    ctx, _ = extend(params, kv_cache.empty(3), tokens, mask)
    write = functools.partial(text.sample_text, tiny.model, max_tokens=MAX_TOKENS, top_p=0.9)
    return params, ctx, jax.jit(write)


def keys(count=3):
    return jax.random.split(jax.random.key(1), count)


def test_log_probs_and_context_equal_teacher_forcing(tiny, setting, extend):
    params, ctx, write = setting
    sample, after = write(params, ctx, keys(), temperature=jnp.float32(0.7))
    one_pass, hidden = extend(params, ctx, sample.tokens, sample.mask)
    logits = policy.text_logits(tiny.model, params, hidden[:, :-1])
    forced = token_log_probs(logits, sample.tokens, sample.mask, temperature=0.7)
    expected = np.where(sample.scored, forced.log_prob, 0.0)
    np.testing.assert_allclose(sample.log_prob, expected, atol=2e-5)
    np.testing.assert_array_equal(after.rope, one_pass.rope)
    mask = np.asarray(sample.mask)
    np.testing.assert_array_equal(after.segments[-1].valid, mask)
    for name in ("k", "v"):
        got, forced_cache = (
            np.moveaxis(np.asarray(getattr(context.segments[-1], name)), 3, 2)[:, mask]
            for context in (after, one_pass)
        )
        np.testing.assert_allclose(got, forced_cache, atol=2e-5)


def test_shape_of_a_text(tiny, setting):
    params, ctx, write = setting
    sample, _ = write(params, ctx, keys(), temperature=jnp.float32(1.0))
    ids = tiny.config.tokens
    for row in range(3):
        length = int(sample.mask[row].sum())
        tokens = np.asarray(sample.tokens[row])
        assert tokens[0] == ids.im_start
        assert tokens[length - 1] == ids.im_end
        assert ids.im_end not in tokens[1 : length - 1]
        sampled = int(sample.scored[row].sum())
        assert sampled == length - 1 - bool(sample.truncated[row])
        assert (not sample.truncated[row]) or sampled == MAX_TOKENS


def test_greedy_takes_the_likeliest_tokens_whatever_the_key(tiny, setting, extend):
    params, ctx, write = setting
    first, _ = write(params, ctx, keys(), temperature=jnp.float32(0))
    other_keys = jax.random.split(jax.random.key(9), 3)
    second, _ = write(params, ctx, other_keys, temperature=jnp.float32(0))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    _, hidden = extend(params, ctx, first.tokens, first.mask)
    likeliest = np.argmax(policy.text_logits(tiny.model, params, hidden), axis=-1)[:, :-1]
    scored = np.asarray(first.scored)
    np.testing.assert_array_equal(np.asarray(first.tokens)[:, 1:][scored], likeliest[scored])


def test_a_row_depends_on_its_own_context_and_key_only(setting):
    params, ctx, write = setting
    sample, _ = write(params, ctx, keys(), temperature=jnp.float32(1.0))
    order = jnp.array([2, 0, 1])
    permuted, _ = write(
        params, kv_cache.take(ctx, order), keys()[order], temperature=jnp.float32(1.0)
    )
    np.testing.assert_array_equal(permuted.tokens, np.asarray(sample.tokens)[np.asarray(order)])


@pytest.mark.parametrize("ends", [True, False])
def test_the_loop_ends_with_the_rows_or_at_the_limit(tiny, setting, ends):
    """With a head that is zero but for one column, greedy texts may end at once, or never."""
    params, ctx, write = setting
    end = tiny.config.tokens.im_end
    kernel = np.zeros_like(tiny.base["lm_head"]["kernel"])
    width, vocabulary = kernel.shape
    final = {"scale": jnp.zeros(width).at[0].set(1.0)}
    base = params.base | {
        "language_model": params.base["language_model"] | {"norm": final},
        "lm_head": {"kernel": jnp.asarray(kernel)},
    }
    if ends:  # where the first feature is positive the end is likeliest, elsewhere token 0
        kernel[0, end] = 50.0
    sample, after = write(
        policy.PolicyParams(base | {"lm_head": {"kernel": jnp.asarray(kernel)}}),
        ctx,
        keys(),
        temperature=jnp.float32(0),
    )
    at_once = np.asarray(sample.tokens)[:, 1] == end
    length = np.asarray(sample.mask).sum(axis=1)
    assert at_once.any() == ends
    assert (length[at_once] == 2).all()
    assert not np.asarray(sample.truncated)[at_once].any()
    assert (length[np.asarray(sample.truncated)] == MAX_TOKENS + 2).all()
    assert int(after.segments[-1].valid.sum()) == int(sample.mask.sum())
    if not ends:
        assert np.asarray(sample.truncated).all()
        np.testing.assert_allclose(sample.log_prob[:, 0], -np.log(vocabulary), rtol=1e-6)


def test_frequencies_follow_the_distribution():
    probability = np.array([0.5, 0.3, 0.2], np.float32)
    count = 4000
    log_p = jnp.broadcast_to(jnp.log(probability)[None], (count, 3))
    many = jax.random.split(jax.random.key(0), count)
    sample = functools.partial(text.sample_tokens, log_p, many, jnp.int32(0), top_p=1.0)
    tokens = sample(temperature=jnp.float32(1.0))
    share = np.bincount(np.asarray(tokens), minlength=3) / count
    np.testing.assert_allclose(share, probability, atol=4 * np.sqrt(0.25 / count))
    assert int(sample(temperature=jnp.float32(0)).max()) == 0
