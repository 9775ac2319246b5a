"""Sampling from a vocabulary: against sorting, by hand, and by the distribution function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax.ops import categorical


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.4, [True, False, False, False]),
        (0.5, [True, False, False, False]),
        (0.51, [True, True, False, False]),
        (0.8, [True, True, True, False]),
        (1.0, [True, True, True, True]),
    ],
)
def test_nucleus_by_hand(top_p, expected):
    probability = np.array([[0.5, 0.25, 0.15, 0.1]], np.float32)
    got = categorical.nucleus(jnp.log(probability), top_p=top_p)
    assert got[0].tolist() == expected
    shuffled = categorical.nucleus(jnp.log(probability[:, ::-1]), top_p=top_p)
    assert shuffled[0].tolist() == expected[::-1]


def by_sorting(log_p, top_p):
    """Tokens that those strictly likelier leave below `top_p`, in float64."""
    p = np.exp(np.asarray(log_p, np.float64))
    likelier = np.where(p[:, None, :] > p[:, :, None], p[:, None, :], 0.0).sum(axis=-1)
    return likelier < top_p, likelier


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_the_nucleus_is_that_of_sorting(top_p, sharpness):
    logits = sharpness * jax.random.normal(jax.random.key(1), (16, 300))
    logits = jnp.round(logits * 4) / 4  # with ties
    log_p = jax.nn.log_softmax(logits.at[:, 7].set(-jnp.inf))
    expected, likelier = by_sorting(log_p, top_p)
    got = np.asarray(jax.jit(categorical.nucleus, static_argnames="top_p")(log_p, top_p=top_p))
    decided = np.abs(likelier - top_p) > 1e-5  # elsewhere the rounding of a sum decides
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(got[decided], expected[decided])
    assert got[np.arange(16), np.asarray(log_p).argmax(axis=1)].all()


@pytest.mark.parametrize("vocabulary", [1, 3, 127, 128, 129, 1000])
def test_samples_invert_the_distribution_function(vocabulary):
    rows = 64
    log_p = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(2), (rows, vocabulary)))
    if vocabulary > 2:
        log_p = log_p.at[:, [0, vocabulary - 1]].set(-jnp.inf)
    uniform = jnp.concatenate(
        [jnp.array([0.0, 1 - 2.0**-24]), jax.random.uniform(jax.random.key(3), (rows - 2,))]
    )
    tokens = np.asarray(jax.jit(categorical.sample)(log_p, uniform))
    p = np.exp(np.asarray(log_p, np.float64))
    assert (p[np.arange(rows), tokens] > 0).all()
    cumulative = p.cumsum(axis=1) / p.sum(axis=1, keepdims=True)
    after = cumulative[np.arange(rows), tokens]
    before = after - p[np.arange(rows), tokens] / p.sum(axis=1)
    assert (before <= np.asarray(uniform) + 1e-6).all()
    assert (after >= np.asarray(uniform) - 1e-6).all()


@pytest.mark.parametrize("vocabulary", [151_936, 152_001, 152_064])
def test_tokens_without_mass_are_never_sampled(vocabulary):
    """Running sums over BAGEL's vocabulary are rounded; uniforms lie around every rise."""
    rows, likely = 512, 40
    rng = np.random.default_rng(vocabulary)
    token_ids = np.sort(rng.choice(vocabulary, likely, replace=False))
    p = rng.dirichlet(np.full(likely, 0.3)).astype(np.float32)
    log_p = np.full(vocabulary, -np.inf, np.float32)
    log_p[token_ids] = np.log(p)
    rises = np.cumsum(p / p.sum(dtype=np.float64))
    steps = np.arange(-6, 6) * 2.0**-25
    near = (rises[:, None] + steps).ravel()
    edges = np.array([0.0, 1 - 2.0**-23, 1 - 2.0**-24])
    uniform = np.concatenate([edges, near[(near >= 0) & (near < 1)]]).astype(np.float32)
    uniform = np.minimum(np.resize(uniform, rows), np.float32(1 - 2.0**-24))
    got = jax.jit(categorical.sample)(
        jnp.broadcast_to(jnp.asarray(log_p), (rows, vocabulary)), jnp.asarray(uniform)
    )
    assert set(np.asarray(got).tolist()) <= set(token_ids.tolist())


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_without_mass_the_token_is_one_of_the_vocabulary(value):
    tokens = categorical.sample(jnp.full((4, 130), value), jnp.linspace(0.0, 0.9, 4))
    assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < 130)).all()


def test_frequencies_of_a_long_vocabulary():
    count, vocabulary = 20_000, 500
    log_p = jnp.log(jnp.arange(1.0, vocabulary + 1))[None]
    uniform = jax.random.uniform(jax.random.key(4), (count,))
    tokens = categorical.sample(jnp.broadcast_to(log_p, (count, vocabulary)), uniform)
    expected = np.arange(1, vocabulary + 1) / np.arange(1, vocabulary + 1).sum()
    share = np.bincount(np.asarray(tokens), minlength=vocabulary) / count
    by_tens = np.abs((share - expected).reshape(-1, 10).sum(axis=1))
    assert by_tens.max() < 5 * np.sqrt(0.04 / count)


def test_the_vocabulary_is_not_sorted():
    log_p = jax.ShapeDtypeStruct((4, 1000), jnp.float32)
    text = jax.jit(categorical.nucleus, static_argnames="top_p").lower(log_p, top_p=0.9).as_text()
    assert "sort" not in text
