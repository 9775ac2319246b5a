"""Adapters: where they sit, how they start, what merging adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alphagrpo_jax.models import lora

BASE = {
    "language_model": {
        "layers": {
            "self_attn": {
                "q_proj": {"kernel": jnp.ones((3, 4, 6)), "bias": jnp.zeros((3, 6))},
                "o_proj_moe_gen": {"kernel": jnp.ones((3, 6, 4))},
                "q_norm": {"scale": jnp.ones((3, 2))},
            },
            "mlp_moe_gen": {"down_proj": {"kernel": jnp.ones((3, 8, 4))}},
        }
    },
    "lm_head": {"kernel": jnp.ones((4, 9))},
}


def test_adapters_sit_at_the_projections_of_both_experts():
    tree = lora.init(jax.random.key(0), BASE, lora.TARGETS, 2)
    layers = tree["language_model"]["layers"]
    assert set(tree) == {"language_model"}
    assert set(layers["self_attn"]) == {"q_proj", "o_proj_moe_gen"}
    assert layers["self_attn"]["q_proj"]["a"].shape == (3, 4, 2)
    assert layers["mlp_moe_gen"]["down_proj"]["b"].shape == (3, 2, 4)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert sizes == 3 * 2 * ((4 + 6) + (6 + 4) + (8 + 4))
    assert not np.any(layers["self_attn"]["q_proj"]["b"])


def test_a_is_normal_with_deviation_one_over_rank():
    base = {"x": {"kernel": jnp.zeros((400, 3))}}
    a = lora.init(jax.random.key(1), base, "x", 50)["x"]["a"]
    assert float(a.std()) == pytest.approx(1 / 50, rel=0.02)
    assert a.dtype == jnp.float32


def test_merge_adds_the_scaled_product_in_float32():
    tree = lora.init(jax.random.key(0), BASE, r".*q_proj", 2)
    pair = tree["language_model"]["layers"]["self_attn"]["q_proj"]
    pair["b"] = jnp.full((3, 2, 6), 0.5)
    merged = lora.merge(BASE, tree, 3.0)
    got = merged["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    a = np.asarray(pair["a"], np.float64)
    np.testing.assert_allclose(got, 1 + 3 * a @ np.full((3, 2, 6), 0.5), rtol=1e-5)
    assert merged["lm_head"]["kernel"] is BASE["lm_head"]["kernel"]


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"'nothing' match none of the 4 kernels"):
        lora.init(jax.random.key(0), BASE, "nothing", 2)
