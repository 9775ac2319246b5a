"""Masks under padding, and the scores of a text."""

import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.ops.log_probs import token_log_probs
from alphagrpo_jax.ops.masked import causal_mask


def test_causal_mask_hides_padding():
    mask = causal_mask(jnp.array([[True, True, False]]))
    np.testing.assert_array_equal(mask[0], [[1, 0, 0], [1, 1, 0], [1, 1, 0]])


def test_scores_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]]))
    tokens, mask = jnp.array([[0, 1, 2]]), jnp.array([[True, True, False]])
    scores = token_log_probs(logits, tokens, mask, temperature=1.0)
    np.testing.assert_allclose(scores.log_prob, [[np.log(0.25), 0.0]], rtol=1e-6)
    np.testing.assert_allclose(scores.entropy, [[1.5 * np.log(2), 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(scores.mask, [[True, False]])
    # temperature 0.5 squares the probabilities: 1/4, 1/16, 1/16 -> 2/3, 1/6, 1/6
    scores = token_log_probs(logits, tokens, mask, temperature=0.5)
    np.testing.assert_allclose(scores.log_prob[0, 0], np.log(1 / 6), rtol=1e-5)
