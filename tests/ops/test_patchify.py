"""Order of tokens and of the features in a token."""

import numpy as np
import pytest

from alphagrpo_jax.ops.patchify import patchify, unpatchify


def test_tokens_are_row_major_with_features_row_column_channel():
    x = np.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    tokens = patchify(x, 2)
    assert tokens.shape == (1, 6, 8)
    np.testing.assert_array_equal(tokens[0, 4], x[0, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, 2, (2, 3)), x)


def test_sides_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"5 x 6 .* patches of 2; resize"):
        patchify(np.zeros((1, 5, 6, 3)), 2)
