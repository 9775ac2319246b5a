"""Log-probs by blocks of positions: the same numbers, without the logits of a whole text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax.ops.log_probs import by_blocks, target_log_probs

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 37, 8, 11


def text_log_probs(kernel, hidden, targets, positions):
    def of_block(hidden, targets):
        return target_log_probs(hidden @ kernel, targets, temperature=0.7)

    return by_blocks(of_block, hidden, targets, positions=positions)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (WIDTH, VOCABULARY))
    hidden = jax.random.normal(keys[1], (ROWS, LENGTH, WIDTH))
    return kernel, hidden, jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCABULARY)


@pytest.mark.parametrize("positions", [1, 8, 36])
def test_blocks_give_the_numbers_and_gradients_of_the_whole(arrays, positions):
    def loss(kernel, hidden, positions):
        log_prob, entropy = text_log_probs(kernel, hidden, arrays[2], positions)
        weights = jnp.arange(LENGTH, dtype=jnp.float32)[None]
        return jnp.sum(weights * (log_prob + 0.3 * entropy)), (log_prob, entropy)

    compute = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    expected, got = (compute(*arrays[:2], size) for size in (LENGTH, positions))
    for first, second in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(second, first, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("positions", "is_whole"), [(LENGTH, True), (8, False)])
def test_no_array_holds_the_logits_of_a_whole_text(arrays, positions, is_whole):
    """Looked up in the program of both passes, loops included."""
    function = functools.partial(text_log_probs, positions=positions)
    gradient = jax.grad(lambda *arguments: function(*arguments)[0].sum(), argnums=(0, 1))
    program = str(jax.make_jaxpr(gradient)(*arrays))
    assert (f"f32[{ROWS},{LENGTH},{VOCABULARY}]" in program) == is_whole
    assert f"f32[{ROWS},{positions},{VOCABULARY}]" in program
