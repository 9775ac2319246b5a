"""DiffusionNFT, advantage-weighted matching and ReMax against float64 references by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from default_options import loss_options

from alphagrpo_jax import loss as loss_lib
from alphagrpo_jax.losses import awm, nft, remax
from alphagrpo_jax.losses.terms import ImageTerms, MatchingTerms, TextTerms

B, J, M, C, T = 5, 3, 4, 2, 6
VALID = np.array([True, True, False, True, True])
ADVANTAGE = np.array([1.5, -0.5, 3.0, -9.0, 7.0])  # two beyond the clip
LATENTS = ("velocity", "target", "old_velocity", "average_velocity", "ref_velocity")


def matching_arrays(seed=0):
    """Float64 arrays of `MatchingTerms`."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(B, J, M, C)) for name in LATENTS}
    arrays["old_velocity"] = arrays["velocity"] + 0.1 * rng.normal(size=(B, J, M, C))
    return arrays | {"sigma": rng.uniform(0.1, 1.0, (B, J)), "advantage": ADVANTAGE}


def matching_terms(arrays, rows=slice(None)):
    return MatchingTerms(**{k: jnp.asarray(v[rows], jnp.float32) for k, v in arrays.items()})


def square(values):
    return (values**2).mean(axis=(2, 3))


def nft_reference(x, beta, image_beta, clip=5.0):
    plus = beta * x["velocity"] + (1 - beta) * x["average_velocity"]
    minus = (1 + beta) * x["average_velocity"] - beta * x["velocity"]

    def error(v):
        gap = v - x["target"]
        return x["sigma"] * square(gap) / np.maximum(np.abs(gap).mean(axis=(2, 3)), 1e-5)

    w = np.clip(np.clip(x["advantage"], -clip, clip) / (2 * clip) + 0.5, 0, 1)[:, None]
    terms = 5 * (w * error(plus) + (1 - w) * error(minus)) / beta
    terms += image_beta * square(x["velocity"] - x["ref_velocity"])
    return terms[VALID].mean()


def awm_reference(x, clip, average_beta, image_beta, advantage_clip=5.0):
    def log_prob(v):
        return -((square(v - x["target"]) + 1e-10) ** 0.25 - 1e-10**0.25) * x["sigma"] / 0.25

    ratio = np.exp(log_prob(x["velocity"]) - log_prob(x["old_velocity"]))
    a = np.clip(x["advantage"], -advantage_clip, advantage_clip)[:, None] / advantage_clip
    terms = np.maximum(-ratio * a, -np.clip(ratio, 1 - clip, 1 + clip) * a)
    terms += average_beta * square(x["velocity"] - x["average_velocity"])
    terms += image_beta * square(x["velocity"] - x["ref_velocity"])
    return terms[VALID].mean()


CASES = {
    "nft": (nft.image_nft, {"nft_beta": 1.0}, lambda x: nft_reference(x, 1.0, 0.0)),
    "nft with a step of 0.3 and a reference": (
        nft.image_nft,
        {"nft_beta": 0.3, "image_beta": 0.2},
        lambda x: nft_reference(x, 0.3, 0.2),
    ),
    "awm": (
        awm.image_awm,
        {"awm_clip": 1.0, "awm_average_beta": 1.0},
        lambda x: awm_reference(x, 1.0, 1.0, 0.0),
    ),
    "awm with a tight clip and a reference": (
        awm.image_awm,
        {"awm_clip": 1e-3, "awm_average_beta": 0.0, "image_beta": 0.3},
        lambda x: awm_reference(x, 1e-3, 0.0, 0.3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_that_match_velocities_equal_their_references(name):
    function, options, expected = CASES[name]
    arrays = matching_arrays()
    total = jnp.float32(VALID.sum())
    section = loss_options(**options)

    def loss(velocity):
        terms = matching_terms(arrays)._replace(velocity=velocity)
        arguments = {"trajectories_total": total, "options": section}
        return function(terms, jnp.asarray(VALID), **arguments)

    velocity = jnp.asarray(arrays["velocity"], jnp.float32)
    value, metrics = loss(velocity)
    assert value == pytest.approx(expected(arrays), rel=1e-5)
    assert metrics["loss/image"] == value
    gap = square(arrays["velocity"] - arrays["target"])[VALID].mean()
    assert metrics["image/target_error"] == pytest.approx(gap, rel=1e-5)

    gradient = jax.grad(lambda v: loss(v)[0])(velocity)
    assert not np.any(gradient[~VALID])
    # The divisor of NFT's error is a constant of the gradient: differences of it would differ.
    if name.startswith("awm"):
        step = 1e-5 * np.random.default_rng(1).normal(size=arrays["velocity"].shape)
        moved = [expected(arrays | {"velocity": arrays["velocity"] + s * step}) for s in (1, -1)]
        slope = float(np.sum(np.asarray(gradient, np.float64) * step))
        assert slope == pytest.approx((moved[0] - moved[1]) / 2, rel=1e-3)


def test_the_gradient_of_nft_by_hand():
    """dL/dv = 5 sigma (w 2 (v+ - u) / (N |v+ - u|) - (1 - w) 2 (v- - u) / (N |v- - u|)) / (B J)."""
    x = matching_arrays()
    section = loss_options(nft_beta=0.5)
    total = jnp.float32(VALID.sum())

    def loss(velocity):
        terms = matching_terms(x)._replace(velocity=velocity)
        arguments = {"trajectories_total": total, "options": section}
        return nft.image_nft(terms, jnp.asarray(VALID), **arguments)[0]

    gradient = jax.grad(loss)(jnp.asarray(x["velocity"], jnp.float32))
    w = np.clip(np.clip(x["advantage"], -5, 5) / 10 + 0.5, 0, 1)[:, None, None, None]
    expected = 0.0
    for weight, sign in ((w, 1), (1 - w, -1)):
        v = x["average_velocity"] + sign * 0.5 * (x["velocity"] - x["average_velocity"])
        gap = v - x["target"]
        size = np.abs(gap).mean(axis=(2, 3), keepdims=True)
        expected += sign * weight * 2 * gap / (M * C) / size
    expected *= 5 * x["sigma"][..., None, None] / (VALID.sum() * J)
    expected[~VALID] = 0
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("function", "options"),
    [(nft.image_nft, {}), (awm.image_awm, {"awm_average_beta": 0.0})],
    ids=["nft", "awm"],
)
def test_a_step_downhill_matches_good_images_better_and_bad_ones_worse(function, options):
    x = matching_arrays()
    x["average_velocity"] = x["old_velocity"] = x["velocity"]
    total = jnp.float32(VALID.sum())

    def loss(velocity):
        terms = matching_terms(x)._replace(velocity=velocity)
        arguments = {"trajectories_total": total, "options": loss_options(**options)}
        return function(terms, jnp.asarray(VALID), **arguments)[0]

    velocity = jnp.asarray(x["velocity"], jnp.float32)
    moved = np.asarray(velocity - 1e-2 * jax.grad(loss)(velocity), np.float64)
    change = square(moved - x["target"]) - square(x["velocity"] - x["target"])
    assert (change[VALID & (ADVANTAGE > 0)] < 0).all()
    assert (change[VALID & (ADVANTAGE < 0)] > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_shares_of_micro_batches_add_up(name):
    function, options, _ = CASES[name]
    arrays, valid = matching_arrays(), jnp.asarray(VALID)
    call = functools.partial(
        function, trajectories_total=jnp.float32(VALID.sum()), options=loss_options(**options)
    )
    whole, metrics = call(matching_terms(arrays), valid)
    parts = [call(matching_terms(arrays, rows), valid[rows]) for rows in (slice(2), slice(2, 5))]
    assert sum(share for share, _ in parts) == pytest.approx(float(whole), rel=1e-5)
    merged = loss_lib.merge_metrics(*(part_metrics for _, part_metrics in parts))
    for key, value in metrics.items():
        assert float(merged[key]) == pytest.approx(float(value), rel=1e-5), key


def test_a_weight_needs_its_reference():
    terms = matching_terms(matching_arrays())._replace(ref_velocity=None)
    arguments = {"trajectories_total": jnp.float32(4), "options": loss_options(image_beta=0.1)}
    for function in (nft.image_nft, awm.image_awm):
        with pytest.raises(ValueError, match=r"image_beta=0\.1 without ref_velocity"):
            function(terms, jnp.asarray(VALID), **arguments)


def text_terms(rng):
    lengths = np.array([6, 3, 2, 0, 4])
    return TextTerms(
        new_logp=jnp.asarray(rng.normal(-1, 0.5, (B, T)), jnp.float32),
        old_logp=jnp.asarray(rng.normal(-1, 0.5, (B, T)), jnp.float32),
        mask=jnp.asarray(np.arange(T) < lengths[:, None]),
        advantage=jnp.asarray(ADVANTAGE, jnp.float32),
        entropy=jnp.asarray(rng.random((B, T)), jnp.float32),
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_remax_of_texts(level):
    text = text_terms(np.random.default_rng(2))
    mask = np.asarray(text.mask) & VALID[:, None]
    totals = {
        "text_tokens_total": jnp.float32(mask.sum()),
        "trajectories_total": jnp.float32(VALID.sum()),
    }

    def loss(new_logp):
        terms = text._replace(new_logp=new_logp)
        options = loss_options(level=level)
        return remax.text_remax(terms, jnp.asarray(VALID), options=options, **totals)

    value, metrics = loss(text.new_logp)
    weight = -np.clip(ADVANTAGE, -5, 5) / 10
    log_p = np.asarray(text.new_logp, np.float64)
    if level == "token":
        expected = (weight[:, None] * log_p)[mask].sum() / mask.sum()
        slope = np.where(mask, weight[:, None], 0) / mask.sum()
    else:
        length = np.maximum(mask.sum(axis=1), 1)
        means = np.where(mask, log_p, 0).sum(axis=1) / length
        expected = (weight * means)[VALID].mean()
        slope = np.where(mask, weight[:, None] / length[:, None], 0) / VALID.sum()
    assert value == pytest.approx(expected, rel=1e-5)
    assert metrics["loss/text"] == value
    np.testing.assert_allclose(jax.grad(lambda x: loss(x)[0])(text.new_logp), slope, rtol=1e-5)


def test_remax_of_images():
    rng = np.random.default_rng(3)
    log_p = rng.normal(-0.5, 0.1, (B, J))
    image = ImageTerms(
        new_logp=jnp.asarray(log_p, jnp.float32),
        old_logp=jnp.asarray(log_p + 0.01, jnp.float32),
        advantage=jnp.asarray(ADVANTAGE, jnp.float32),
    )
    totals = {"trajectories_total": jnp.float32(VALID.sum()), "options": loss_options()}
    value, metrics = remax.image_remax(image, jnp.asarray(VALID), **totals)
    weight = -np.clip(ADVANTAGE, -5, 5)[:, None] / 10
    assert value == pytest.approx((weight * log_p)[VALID].mean(), rel=1e-5)
    assert metrics["image/ratio_max_dev"] == pytest.approx(1 - np.exp(-0.01), rel=1e-3)


def test_remax_refuses_what_it_does_not_compute():
    text = text_terms(np.random.default_rng(2))
    totals = {"text_tokens_total": jnp.float32(9), "trajectories_total": jnp.float32(4)}
    selected = text._replace(selected=text.mask)
    for terms, options in ((text, loss_options(text_beta=0.1)), (selected, loss_options())):
        with pytest.raises(ValueError, match="neither selected tokens nor a KL"):
            remax.text_remax(terms, jnp.asarray(VALID), options=options, **totals)


@pytest.mark.parametrize("algorithm", ["nft", "awm"])
def test_an_update_weighs_a_text_against_the_levels_of_its_image(algorithm):
    """(n w L_text + J L_image) / (1 + J), with n = J levels behind the text."""
    text, image = text_terms(np.random.default_rng(2)), matching_terms(matching_arrays())
    options = loss_options(image=algorithm, text="remax", text_loss_weight=0.5)
    totals = {"trajectories_total": jnp.float32(VALID.sum()), "options": options}
    tokens = jnp.float32(11)
    value, metrics = loss_lib.grpo_loss(
        [text],
        [image],
        jnp.asarray(VALID),
        text_counts=[J],
        text_tokens_total=tokens[None],
        **totals,
    )
    of_text, _ = remax.text_remax(text, jnp.asarray(VALID), text_tokens_total=tokens, **totals)
    of_image, _ = loss_lib.IMAGE_LOSSES[algorithm](image, jnp.asarray(VALID), **totals)
    assert value == pytest.approx(float(J * 0.5 * of_text + J * of_image) / (1 + J), rel=1e-5)
    assert metrics["loss/image"] == of_image
