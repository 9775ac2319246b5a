"""Attention over blocks against a float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np

from alphagrpo_jax.ops.attention import attend


def reference(q, k, v, mask):
    """Plain float64 softmax attention; key head of query head n is n // (N / K)."""
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros((batch, length, heads, width))
    for b in range(batch):
        for n in range(heads):
            scores = q[b, :, n] @ k[b, :, n // group].T / np.sqrt(width)
            scores = np.where(mask[b], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, :, n // group]
    return out.reshape(batch, length, heads * width)


def test_blocks_equal_one_block_and_the_reference():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 6, 4))
    k, v = rng.normal(size=(2, 2, 7, 2, 4))
    mask = rng.random((2, 3, 7)) < 0.6
    mask[..., 4] = True
    f32 = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    by_head = [x.swapaxes(1, 2) for x in f32[1:]]
    one_block = attend(f32[0], by_head[:1], by_head[1:], (jnp.asarray(mask),))
    cuts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    keys, values = ([x[:, :, cut] for cut in cuts] for x in by_head)
    blocks = attend(f32[0], keys, values, [jnp.asarray(mask[..., cut]) for cut in cuts])
    np.testing.assert_allclose(one_block, reference(q, k, v, mask), atol=2e-6)
    np.testing.assert_allclose(blocks, one_block, atol=1e-6)


def test_a_row_without_keys_is_finite_and_gradients_are_too():
    q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 1, 2, 4))
    v = k
    mask = jnp.array([[[False, False], [True, False]]])

    def total(x):
        return attend(x, (k,), (v,), (mask,)).sum()

    assert np.isfinite(jax.grad(total)(q)).all()
    np.testing.assert_allclose(attend(q, (k,), (v,), (mask,))[0, 1], np.ones(4))


def test_rows_that_share_a_block_read_it_as_if_each_had_its_own():
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.normal(size=(6, 3, 4, 8)), jnp.float32)
    keys, values, masks = ([], [], [])
    for rows, slots in ((1, 5), (2, 4), (6, 3)):
        key, value = rng.normal(size=(2, rows, 2, slots, 8))
        keys.append(jnp.asarray(key, jnp.float32))
        values.append(jnp.asarray(value, jnp.float32))
        masks.append(jnp.asarray(rng.random((rows, 1, slots)) < 0.7))

    def spread(blocks):
        return [jnp.repeat(block, 6 // len(block), axis=0) for block in blocks]

    def total(query, keys, values):
        return jnp.sin(attend(query, keys, values, masks)).sum()

    def total_of_copies(query, keys, values):
        return jnp.sin(attend(query, spread(keys), spread(values), spread(masks))).sum()

    arguments = (query, keys, values)
    shared, copied = (
        jax.value_and_grad(function, argnums=(0, 1, 2))(*arguments)
        for function in (total, total_of_copies)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), shared, copied)
