"""Invariants of the policy functions on a small random model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from default_options import guidance as guided

from alphagrpo_jax import policy
from alphagrpo_jax.models import kv_cache, lora
from alphagrpo_jax.models.bagel import Bagel
from alphagrpo_jax.models.bagel_config import BagelConfig
from alphagrpo_jax.models.kv_cache import GuidanceContexts
from alphagrpo_jax.models.mot import Tokens
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime.tokenizer import SpecialTokens
from alphagrpo_jax.sampling.text import text_log_probs

TOKENS = SpecialTokens(im_start=40, im_end=41, vision_start=42, vision_end=43)
CONFIG = BagelConfig.from_dicts(
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 44,
    },
    {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 24,
    },
    {"ch": 32, "ch_mult": [1, 1], "downsample": 2, "num_res_blocks": 1, "z_channels": 4},
    {"latent_patch_size": 2, "max_latent_size": 8, "vit_max_num_patch_per_side": 6},
    tokens=TOKENS,
)
MODEL = Bagel(CONFIG)
GRID = (2, 3)  # not square: rows and columns cannot be mixed up
TEXT = np.array([[40, 1, 2, 3, 41], [40, 5, 41, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)

extend_text = jax.jit(policy.extend_text, static_argnums=0)
extend_vae = jax.jit(policy.extend_vae, static_argnums=(0, 4))
extend_vit = jax.jit(policy.extend_vit, static_argnums=(0, 4))
velocity = jax.jit(policy.velocity, static_argnums=(0, 5))


@pytest.fixture(scope="module")
def params() -> PolicyParams:
    """Random weights; the velocity head too, which starts at zero in pretraining."""
    base = policy.init_base(MODEL, jax.random.key(0))
    head = base["llm2vae"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return PolicyParams(base)


@pytest.fixture(scope="module")
def adapter(params: PolicyParams) -> PolicyParams:
    tree = lora.init(jax.random.key(2), params.base, lora.TARGETS, 3)
    tree = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), tree)
    return PolicyParams(params.base, tree, 0.5)


def latents(batch: int) -> jax.Array:
    shape = (batch, GRID[0] * GRID[1], CONFIG.latent_width)
    return jax.random.normal(jax.random.key(3), shape)


def patches(batch: int) -> jax.Array:
    return jax.random.normal(jax.random.key(4), (batch, 6, CONFIG.patch_width))


def context(params: PolicyParams, rows: slice = slice(None), width: int = 5) -> kv_cache.Context:
    """text, VAE block, ViT block, text."""
    tokens, mask = jnp.asarray(TEXT[rows, :width]), jnp.asarray(MASK[rows, :width])
    ctx, _ = extend_text(MODEL, params, kv_cache.empty(len(tokens)), tokens, mask)
    ctx = extend_vae(MODEL, params, ctx, latents(2)[rows], GRID)
    ctx = extend_vit(MODEL, params, ctx, patches(2)[rows], GRID)
    return extend_text(MODEL, params, ctx, tokens, mask)[0]


def scores(params: PolicyParams, ctx: kv_cache.Context, rows: slice, width: int):
    tokens, mask = jnp.asarray(TEXT[rows, :width]), jnp.asarray(MASK[rows, :width])
    function = jax.jit(functools.partial(text_log_probs, MODEL, temperature=0.7))
    return function(params, ctx, tokens, mask)


def test_rope_ids_and_lengths(params: PolicyParams):
    ctx = context(params)
    assert ctx.rope.tolist() == [5 + 1 + 1 + 5, 3 + 1 + 1 + 3]
    assert kv_cache.length(ctx).tolist() == [5 + 8 + 8 + 5, 3 + 8 + 8 + 3]


def test_a_row_does_not_depend_on_padding_or_neighbours(params: PolicyParams):
    batched = context(params)
    sigma, rows = jnp.array([0.8, 0.3]), slice(0, 2)
    v, text = (
        velocity(MODEL, params, batched, latents(2), sigma, GRID),
        scores(params, batched, rows, 5),
    )
    for index, width in enumerate((5, 3)):
        row = slice(index, index + 1)
        single = context(params, row, width)
        v_alone = velocity(MODEL, params, single, latents(2)[row], sigma[row], GRID)
        np.testing.assert_allclose(v[row], v_alone, atol=2e-5)
        text_alone = scores(params, single, row, width)
        got = text.log_prob[row, : width - 1]
        np.testing.assert_allclose(got, text_alone.log_prob, atol=2e-5)
        np.testing.assert_allclose(text.entropy[row, : width - 1], text_alone.entropy, atol=2e-5)
    assert text.mask.tolist() == MASK[:, 1:].tolist()
    assert not np.any(np.asarray(text.log_prob)[~MASK[:, 1:]])


@pytest.mark.parametrize(("chunk", "longest"), [(1, 5), (3, 5), (2, 2)])
def test_a_text_in_chunks_has_the_scores_and_the_gradient_of_the_whole(params, chunk, longest):
    """Also where chunks at the end hold no token of any row."""
    mask = jnp.asarray(MASK & (np.arange(5) < longest))

    def total(base, chunk):
        ctx = kv_cache.empty(2)
        found = text_log_probs(
            MODEL,
            PolicyParams(base),
            ctx,
            jnp.asarray(TEXT),
            mask,
            temperature=0.7,
            chunk=chunk,
        )
        return (found.log_prob * jnp.arange(1.0, 5.0)[None]).sum() + found.entropy.sum(), found

    compute = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, whole), expected = compute(params.base, 0)
    (_, by_chunk), gradient = compute(params.base, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), by_chunk, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, expected)
    assert float(jnp.abs(expected["embed_tokens"]["embedding"]).max()) > 1e-2


def test_what_stands_in_the_padding_is_irrelevant(params: PolicyParams):
    ctx = kv_cache.empty(2)
    changed = np.where(MASK, TEXT, 17)
    outputs = []
    for tokens in (TEXT, changed):
        longer, hidden = extend_text(MODEL, params, ctx, jnp.asarray(tokens), jnp.asarray(MASK))
        v = velocity(MODEL, params, longer, latents(2), jnp.ones(2), GRID)
        outputs.append((np.asarray(hidden)[MASK], np.asarray(v)))
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    np.testing.assert_array_equal(outputs[0][1], outputs[1][1])


def test_merged_and_broadcast_contexts_give_the_same_velocity(params: PolicyParams):
    ctx = context(params, slice(0, 1))
    x, sigma = latents(2), jnp.array([0.8, 0.3])
    expected = velocity(MODEL, params, kv_cache.take(ctx, jnp.zeros(2, int)), x, sigma, GRID)
    np.testing.assert_allclose(
        velocity(MODEL, params, kv_cache.merge(ctx), x, sigma, GRID), expected, atol=2e-5
    )


def test_decoding_token_by_token_equals_one_pass(params: PolicyParams):
    ctx = kv_cache.merge(context(params))
    _, hidden = extend_text(MODEL, params, ctx, jnp.asarray(TEXT), jnp.asarray(MASK))
    expected = policy.text_logits(MODEL, params, hidden)

    def body(state):
        cache, logits = state
        token = jnp.take(jnp.asarray(TEXT), cache.step, axis=1)
        active = jnp.take(jnp.asarray(MASK), cache.step, axis=1)
        at = cache.step
        cache, new = policy.decode_step(MODEL, params, ctx, cache, token, active)
        return cache, logits.at[:, at].set(new)

    @jax.jit
    def run():
        start = (policy.init_decode(MODEL, ctx, 5), jnp.zeros(expected.shape))
        return jax.lax.while_loop(lambda state: state[0].step < 5, body, start)

    cache, logits = run()
    np.testing.assert_allclose(np.asarray(logits)[MASK], np.asarray(expected)[MASK], atol=2e-5)
    after = policy.end_decode(ctx, cache)
    assert (after.rope - ctx.rope).tolist() == [5, 3]
    one_pass, _ = extend_text(MODEL, params, ctx, jnp.asarray(TEXT), jnp.asarray(MASK))
    v = [velocity(MODEL, params, c, latents(2), jnp.ones(2), GRID) for c in (after, one_pass)]
    np.testing.assert_allclose(*v, atol=2e-5)


def test_one_pass_with_a_mask_equals_the_cache(params: PolicyParams):
    row = slice(0, 1)
    tokens, x, sigma = jnp.asarray(TEXT[row]), latents(1), jnp.array([0.6])
    ctx, hidden = extend_text(MODEL, params, kv_cache.empty(1), tokens, jnp.asarray(MASK[row]))
    v = velocity(MODEL, params, ctx, x, sigma, GRID)
    marks = jnp.array([[TOKENS.vision_start, TOKENS.vision_end]])
    und = policy.embed_text(MODEL, params, jnp.concatenate([tokens, marks], axis=1))
    gen = policy.embed_latents(MODEL, params, x, sigma, GRID)
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 5] + [5] * 6], jnp.int32)
    mask = np.ones((1, 13, 13), bool)
    mask[0, :5] = np.tri(5, 13)
    out = policy.joint_forward(MODEL, params, Tokens(und, gen), positions, jnp.asarray(mask))
    np.testing.assert_allclose(out.und[:, :5], hidden, atol=2e-5)
    np.testing.assert_allclose(policy.read_velocity(MODEL, params, out.gen), v, atol=2e-5)


def test_several_noisy_versions_share_one_context(params: PolicyParams):
    ctx = context(params)
    x = jnp.stack([latents(2), latents(2)[::-1] * 0.5, latents(2) + 1.0], axis=1)
    sigma = jnp.array([[0.9, 0.5, 0.1], [0.2, 0.4, 0.6]])
    got = policy.packed_velocity(MODEL, params, ctx, x, sigma, GRID)
    for draw in range(3):
        single = velocity(MODEL, params, ctx, x[:, draw], sigma[:, draw], GRID)
        np.testing.assert_allclose(got[:, draw], single, atol=2e-5)


def test_a_zero_adapter_is_the_base_and_merging_is_the_adapter(
    params: PolicyParams, adapter: PolicyParams
):
    zero = PolicyParams(params.base, lora.init(jax.random.key(0), params.base, lora.TARGETS, 3))
    merged = PolicyParams(lora.merge(params.base, adapter.lora, adapter.lora_scale))
    outputs = [
        velocity(MODEL, p, context(p), latents(2), jnp.ones(2), GRID)
        for p in (params, zero, adapter, merged)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_allclose(outputs[2], outputs[3], atol=5e-5)
    assert np.abs(outputs[2] - outputs[0]).max() > 1e-2


@pytest.mark.slow
def test_the_adapter_gradient_matches_finite_differences(adapter: PolicyParams):
    x, sigma = latents(2), jnp.array([0.8, 0.3])

    @jax.jit
    def loss(tree):
        p = dataclasses.replace(adapter, lora=tree)
        return jnp.mean(velocity(MODEL, p, context(p), x, sigma, GRID) ** 2)

    gradient = jax.grad(loss)(adapter.lora)
    keys = jax.random.split(jax.random.key(5), len(jax.tree.leaves(gradient)))
    keys = jax.tree.unflatten(jax.tree.structure(gradient), list(keys))
    direction = jax.tree.map(lambda g, k: jax.random.normal(k, g.shape), gradient, keys)
    losses = [
        float(loss(jax.tree.map(lambda a, d, s=sign: a + s * 1e-3 * d, adapter.lora, direction)))
        for sign in (1, -1)
    ]
    products = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), gradient, direction)
    slope = sum(jax.tree.leaves(products))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=2e-2)


def test_a_detached_context_gives_no_gradient_to_its_text(params: PolicyParams):
    def loss(table, *, detached):
        base = params.base | {"embed_tokens": {"embedding": table}}
        p = PolicyParams(base)
        tokens, mask = jnp.asarray(TEXT), jnp.asarray(MASK)
        ctx, _ = policy.extend_text(MODEL, p, kv_cache.empty(2), tokens, mask)
        ctx = kv_cache.stop_gradient(ctx) if detached else ctx
        return policy.velocity(MODEL, p, ctx, latents(2), jnp.ones(2), GRID).sum()

    for detached in (False, True):
        function = jax.jit(jax.grad(functools.partial(loss, detached=detached)))
        rows = np.abs(function(params.base["embed_tokens"]["embedding"])).sum(axis=1)
        assert (rows[[1, 2, 3, 5]] > 0).all() != detached
        assert rows[TOKENS.vision_start] > 0  # the image block's own delimiters
        assert rows[20] == 0


@pytest.mark.parametrize("remat", [pytest.param("full", marks=pytest.mark.slow), "dots"])
def test_remat_and_unroll_change_nothing(params: PolicyParams, remat: str):
    def gradient(model):
        def loss(p):
            ctx, _ = policy.extend_text(
                model, p, kv_cache.empty(2), jnp.asarray(TEXT), jnp.asarray(MASK)
            )
            return policy.velocity(model, p, ctx, latents(2), jnp.ones(2), GRID).sum()

        return jax.jit(jax.grad(loss))(params).base["language_model"]

    plain = gradient(MODEL)
    unrolled = gradient(Bagel(CONFIG, remat=remat, unroll=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, unrolled)


def test_guidance_decided_on_the_device_equals_the_static_decision(params: PolicyParams):
    ctx = context(params)
    contexts = GuidanceContexts(ctx, kv_cache.empty(2), ctx)
    guidance = guided(text_scale=3.0, interval=(0.4, 1.0))
    call = functools.partial(policy.guided_velocity, MODEL, params, contexts, latents(2))
    sigma = jnp.array([0.8, 0.3])
    dynamic = call(sigma, GRID, guidance)
    on, off = (call(sigma, GRID, guidance, active=active) for active in (True, False))
    np.testing.assert_allclose(dynamic[0], on[0], atol=1e-6)
    np.testing.assert_allclose(dynamic[1], off[1], atol=1e-6)
    assert np.abs(on[1] - off[1]).max() > 1e-3


def test_images_there_and_back(params: PolicyParams):
    images = jax.random.uniform(jax.random.key(6), (2, 8, 12, 3), minval=-1.0)
    tokens = policy.encode_image(MODEL, params, images)
    assert tokens.shape == (2, 6, CONFIG.latent_width)
    out = policy.decode_latents(MODEL, params, 50.0 * tokens, GRID)
    assert out.shape == images.shape
    assert float(jnp.abs(out).max()) <= 1.0
    single = policy.encode_image(MODEL, params, images[1:])
    np.testing.assert_allclose(tokens[1:], single, atol=2e-5)


def test_an_image_is_a_vae_block_then_a_vit_block(params: PolicyParams):
    images = jax.random.uniform(jax.random.key(6), (2, 8, 12, 3), minval=-1.0)
    ctx = policy.extend_image(MODEL, params, kv_cache.empty(2), images)
    assert [s.valid.shape[1] for s in ctx.segments] == [2 + 6, 2 + 6]
    assert ctx.rope.tolist() == [2, 2]
    encoded = policy.encode_image(MODEL, params, images)
    clean = extend_vae(MODEL, params, kv_cache.empty(2), encoded, GRID)
    np.testing.assert_allclose(ctx.segments[0].k, clean.segments[0].k, atol=1e-5)


def test_bfloat16_stays_close_to_float32(params: PolicyParams):
    half = Bagel(CONFIG, dtype=jnp.bfloat16)
    tokens, mask = jnp.asarray(TEXT), jnp.asarray(MASK)
    ctx, hidden = policy.extend_text(half, params, kv_cache.empty(2), tokens, mask)
    assert hidden.dtype == ctx.segments[0].k.dtype == jnp.bfloat16
    logits = policy.text_logits(half, params, hidden)
    assert logits.dtype == jnp.float32
    v = policy.velocity(half, params, ctx, latents(2), jnp.ones(2), GRID)
    assert v.dtype == jnp.float32
    ctx, _ = extend_text(MODEL, params, kv_cache.empty(2), tokens, mask)
    exact = velocity(MODEL, params, ctx, latents(2), jnp.ones(2), GRID)
    assert np.abs(v - exact).max() < 0.1 * np.abs(exact).max()


def test_the_reference_policy_is_the_call_without_an_adapter(adapter: PolicyParams):
    reference = PolicyParams(adapter.base)
    assert jax.tree.structure(reference) != jax.tree.structure(adapter)
    a, b = (scores(p, context(p), slice(0, 2), 5).log_prob for p in (adapter, reference))
    assert np.abs(a - b).max() > 1e-3
