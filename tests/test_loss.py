import jax
import jax.numpy as jnp
import numpy as np
import pytest
from default_options import loss_options

from alphagrpo_jax import loss as loss_lib
from alphagrpo_jax.losses import image_grpo as image_lib
from alphagrpo_jax.losses import text_grpo as text_lib
from alphagrpo_jax.losses.image_grpo import gaussian_kl
from alphagrpo_jax.losses.terms import ImageTerms, TextTerms
from alphagrpo_jax.losses.text_grpo import k3_kl, top_entropy_mask

B, T, J = 6, 5, 3


def grpo_loss(text, image, valid, *, text_tokens_total, trajectories_total, **options):
    """The loss of trajectories with at most one text and one image."""
    texts = [] if text is None else [text]
    images = [] if image is None else [image]
    counts = [1 if image is None else image.new_logp.shape[1]] * len(texts)
    tokens = jnp.reshape(jnp.asarray(text_tokens_total, jnp.float32), 1)
    totals = {"text_tokens_total": tokens, "trajectories_total": trajectories_total}
    section = loss_options(**options)
    return loss_lib.grpo_loss(texts, images, valid, text_counts=counts, options=section, **totals)


def text_grpo(
    text, valid, *, text_tokens_total, trajectories_total, selected_tokens_total=None, **options
):
    totals = {"text_tokens_total": text_tokens_total, "trajectories_total": trajectories_total}
    totals["selected_tokens_total"] = selected_tokens_total
    return text_lib.text_grpo(text, valid, options=loss_options(**options), **totals)


def image_grpo(image, valid, *, trajectories_total, **options):
    totals = {"trajectories_total": trajectories_total}
    return image_lib.image_grpo(image, valid, options=loss_options(**options), **totals)


def arrays(seed=0):
    """Terms of an update with ragged texts, one empty text, and an invalid trajectory."""
    rng = np.random.default_rng(seed)

    def f32(values):
        return jnp.asarray(values, jnp.float32)

    lengths = np.array([5, 3, 1, 4, 0, 2])
    old_text, old_image = rng.normal(-1, 0.5, (B, T)), rng.normal(-0.5, 0.1, (B, J))
    advantage = f32([1.0, -2.0, 0.5, 8.0, -7.0, 3.0])  # two beyond the image's clip
    text = TextTerms(
        new_logp=f32(old_text + rng.normal(0, 0.3, (B, T))),
        old_logp=f32(old_text),
        mask=jnp.asarray(np.arange(T) < lengths[:, None]),
        advantage=advantage,
        entropy=f32(rng.random((B, T))),
        ref_logp=f32(old_text + rng.normal(0, 0.3, (B, T))),
    )
    image = ImageTerms(
        new_logp=f32(old_image + rng.normal(0, 2e-5, (B, J))),
        old_logp=f32(old_image),
        advantage=advantage,
        kl=f32(rng.random((B, J))),
    )
    return text, image, jnp.asarray([True, True, True, True, True, False])


def totals(text, valid):
    tokens = jnp.sum(text.mask & valid[:, None], dtype=jnp.float32)
    return {"text_tokens_total": tokens, "trajectories_total": jnp.sum(valid, dtype=jnp.float32)}


def reference(text, image, valid, *, level, w, text_beta=0.0, image_beta=0.0, constant=None):
    """The loss in float64, trajectory by trajectory and token by token.

    `constant` are the new log-probs of the KL's ratio, through which no gradient flows.
    """
    text = [np.asarray(x, np.float64) for x in text[:6]]
    image = [np.asarray(x, np.float64) for x in image]
    valid = np.asarray(valid)
    new, old, mask, advantage, _, ref = text
    rows = [i for i in range(B) if valid[i]]
    tokens = [(i, t) for i in rows for t in range(T) if mask[i, t]]

    def surrogate(log_ratio, a, low, high):
        ratio = np.exp(log_ratio)
        return -min(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)

    if level == "token":
        terms = [surrogate(new[i, t] - old[i, t], advantage[i], 0.2, 0.28) for i, t in tokens]
    else:
        terms = []
        for i in rows:
            scored = mask[i].astype(bool)
            mean = (new[i] - old[i])[scored].mean() if scored.any() else 0.0
            terms.append(surrogate(mean, advantage[i], 0.2, 0.28))
    text_loss = np.mean(terms)
    log_ratio = (new if constant is None else np.asarray(constant, np.float64)) - old
    kl = np.exp(ref - new) - (ref - new) - 1
    if level == "token":
        kl_terms = [np.exp(log_ratio[i, t]) * kl[i, t] for i, t in tokens]
    else:
        scored = {i: mask[i].astype(bool) for i in rows if mask[i].any()}
        kl_terms = [
            np.exp(log_ratio[i][scored[i]].mean()) * kl[i][scored[i]].mean() if i in scored else 0.0
            for i in rows
        ]
    text_loss += text_beta * np.mean(kl_terms)
    image_loss = 0.0
    for i in rows:
        for j in range(J):
            a = np.clip(advantage[i], -5, 5)
            image_loss += surrogate(image[0][i, j] - image[1][i, j], a, 1e-5, 1e-5)
            image_loss += image_beta * image[3][i, j]
    return (J * w * text_loss + image_loss / len(rows)) / (J + 1)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("jit", [True, False])
def test_whole_loss_against_float64(level, jit):
    text, image, valid = arrays()
    options = {"text_beta": 0.1, "image_beta": 0.3}

    def run(text, image, valid):
        return grpo_loss(
            text,
            image,
            valid,
            level=level,
            text_loss_weight=0.5,
            **totals(text, valid),
            **options,
        )

    got, metrics = (jax.jit(run) if jit else run)(text, image, valid)
    expected = reference(text, image, valid, level=level, w=0.5, **options)
    assert got == pytest.approx(expected, rel=1e-5)
    assert metrics["loss/total"] == got


def test_text_token_level_by_hand():
    # ratios 1.5, 0.5 with A = 2: min(3, 2.56) = 2.56 and min(1, 1.6) = 1; with A = -1 ratios 1.5,
    # 0.5: min(-1.5, -1.28) = -1.5 and min(-0.5, -0.8) = -0.8
    ratio = jnp.array([[1.5, 0.5], [1.5, 0.5]])
    text = TextTerms(
        new_logp=jnp.log(ratio),
        old_logp=jnp.zeros((2, 2)),
        mask=jnp.ones((2, 2), bool),
        advantage=jnp.array([2.0, -1.0]),
        entropy=jnp.array([[1.0, 2.0], [3.0, 4.0]]),
    )
    valid = jnp.ones(2, bool)
    got, metrics = text_grpo(text, valid, level="token", **totals(text, valid))
    assert got == pytest.approx(-(2.56 + 1.0 - 1.5 - 0.8) / 4)
    assert metrics["text/clip_fraction"] == 0.5
    assert metrics["text/ratio_max_dev"] == pytest.approx(0.5)
    assert metrics["text/entropy"] == pytest.approx(2.5)
    assert metrics["loss/text"] == got


def test_text_sequence_level_by_hand():
    # log ratios 0.3, 0.1 -> exp(0.2) = 1.2214, inside; 0.6, 0.4 -> exp(0.5) = 1.6487, clipped 1.28
    text = TextTerms(
        new_logp=jnp.array([[0.3, 0.1, 9.0], [0.6, 0.4, 9.0]]),
        old_logp=jnp.zeros((2, 3)),
        mask=jnp.array([[True, True, False]] * 2),
        advantage=jnp.array([1.0, 1.0]),
        entropy=jnp.zeros((2, 3)),
    )
    valid = jnp.ones(2, bool)
    got, metrics = text_grpo(text, valid, **totals(text, valid))
    assert got == pytest.approx(-(np.exp(0.2) + 1.28) / 2, rel=1e-6)
    assert metrics["text/clip_fraction"] == 0.5
    assert metrics["text/ratio_max_dev"] == pytest.approx(np.exp(0.6) - 1, rel=1e-6)


def selecting(mean, level):
    """One text of four tokens, ratios 1.5, 0.5, 1.4 and 1.0, A = 2; the first two are trained."""
    text = TextTerms(
        new_logp=jnp.log(jnp.array([[1.5, 0.5, 1.4, 1.0]])),
        old_logp=jnp.zeros((1, 4)),
        mask=jnp.ones((1, 4), bool),
        advantage=jnp.array([2.0]),
        entropy=jnp.array([[4.0, 3.0, 2.0, 1.0]]),
        selected=jnp.array([[True, True, False, False]]),
    )
    return text_grpo(
        text,
        jnp.ones(1, bool),
        text_tokens_total=jnp.float32(4),
        selected_tokens_total=jnp.float32(2),
        trajectories_total=jnp.float32(1),
        entropy_mean=mean,
        level=level,
    )


def test_the_most_uncertain_tokens_are_averaged_over_all():
    """Terms -min(3, 2.56) and -min(1, 1.6), over four tokens; of four ratios two are clipped."""
    got, metrics = selecting("all", "token")
    assert got == pytest.approx(-(2.56 + 1.0) / 4)
    assert metrics["text/clip_fraction"] == 0.5
    assert metrics["text/entropy"] == pytest.approx(2.5)
    got, metrics = selecting("all", "sequence")  # log-ratios of the two, over four: (3/4)^(1/4)
    assert got == pytest.approx(-2.0 * 0.75**0.25)
    assert metrics["text/clip_fraction"] == 0.0
    assert metrics["text/entropy"] == pytest.approx(2.5)


def test_the_most_uncertain_tokens_may_be_averaged_alone():
    got, metrics = selecting("kept", "token")
    assert got == pytest.approx(-(2.56 + 1.0) / 2)
    assert metrics["text/clip_fraction"] == 0.5
    assert metrics["text/entropy"] == pytest.approx(3.5)
    got, metrics = selecting("kept", "sequence")  # over the two alone: (3/4)^(1/2)
    assert got == pytest.approx(-2.0 * 0.75**0.5)
    assert metrics["text/entropy"] == pytest.approx(3.5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_that_are_not_selected_have_no_policy_gradient(level):
    text, _, valid = arrays()
    selected = jnp.arange(T) < 2

    def run(new):
        terms = text._replace(new_logp=new, selected=jnp.broadcast_to(selected, (B, T)))
        return text_grpo(terms, valid, level=level, **totals(text, valid))[0]

    gradient = np.asarray(jax.grad(run)(text.old_logp))
    assert not gradient[:, 2:].any()
    assert gradient[1, :2].all()


def diverging():
    """Texts of two tokens and of one, A = 0; k3 of r = ln 2, 0 and ln 4 with ratios 2, 8 and 3."""
    new = jnp.log(jnp.array([[2.0, 8.0], [3.0, 1.0]]))
    return TextTerms(
        new_logp=new,
        old_logp=jnp.zeros((2, 2)),
        mask=jnp.array([[True, True], [True, False]]),
        advantage=jnp.zeros(2),
        entropy=jnp.zeros((2, 2)),
        ref_logp=new + jnp.log(jnp.array([[2.0, 1.0], [4.0, 1.0]])),
    )


@pytest.mark.parametrize("selected", [None, [[False, True], [False, False]]])
@pytest.mark.parametrize("mean", ["all", "kept"])
def test_kl_of_texts_by_hand(selected, mean):
    """Over all tokens, whichever are trained; the ratio is 4 = sqrt(2 * 8), and 3."""
    first, second = 2 - np.log(2) - 1, 4 - np.log(4) - 1
    text, valid = diverging(), jnp.ones(2, bool)
    options = {**totals(text, valid), "text_beta": 0.5, "entropy_mean": mean}
    if selected is not None:
        text = text._replace(selected=jnp.array(selected))
        options["selected_tokens_total"] = jnp.float32(1)
    got, metrics = text_grpo(text, valid, level="sequence", **options)
    expected = (4 * first / 2 + 3 * second) / 2
    assert metrics["text/kl"] == pytest.approx(expected, rel=1e-6)
    assert got == pytest.approx(0.5 * expected, rel=1e-6)
    got, metrics = text_grpo(text, valid, level="token", **options)
    expected = (2 * first + 3 * second) / 3
    assert metrics["text/kl"] == pytest.approx(expected, rel=1e-6)
    assert got == pytest.approx(0.5 * expected, rel=1e-6)


def test_the_ratio_of_the_kl_is_a_constant_and_one_in_a_first_update():
    text, valid = diverging(), jnp.ones(2, bool)
    options = {**totals(text, valid), "text_beta": 1.0}

    def run(new, old):
        return text_grpo(text._replace(new_logp=new, old_logp=old), valid, **options)[0]

    # d k3 / d new = 1 - exp(r) with r = ln 2, 0 and ln 4, times 4 and 3, over two texts.
    gradient = jax.grad(run)(text.new_logp, text.old_logp)
    np.testing.assert_allclose(gradient, [[-4 / 4, 0], [-9 / 2, 0]], atol=1e-6)
    gradient = jax.grad(run)(text.new_logp, text.new_logp)
    np.testing.assert_allclose(gradient, [[-1 / 4, 0], [-3 / 2, 0]], atol=1e-6)


def test_image_by_hand():
    # A = 9 is clipped to 5; ratio e^1e-4 to 1 + 1e-5; with A = -2 the unclipped term is the larger
    image = ImageTerms(
        new_logp=jnp.array([[1e-4, 0.0], [1e-4, -1e-4]]),
        old_logp=jnp.zeros((2, 2)),
        advantage=jnp.array([9.0, -2.0]),
    )
    valid = jnp.ones(2, bool)
    got, metrics = image_grpo(image, valid, trajectories_total=jnp.float32(2))
    expected = (-5 * (1 + 1e-5) - 5 + 2 * np.exp(1e-4) + 2 * (1 - 1e-5)) / 4
    assert got == pytest.approx(expected, rel=1e-6)
    assert metrics["image/clip_fraction"] == 0.5
    assert metrics["image/ratio_max_dev"] == pytest.approx(1e-4, rel=1e-3)


def test_first_update_has_ratio_one_and_the_policy_gradient():
    text, image, valid = arrays()
    text = text._replace(old_logp=text.new_logp)
    image = image._replace(old_logp=image.new_logp)

    def run(new_text, new_image):
        return grpo_loss(
            text._replace(new_logp=new_text),
            image._replace(new_logp=new_image),
            valid,
            level="token",
            **totals(text, valid),
        )

    gradients, metrics = jax.grad(run, argnums=(0, 1), has_aux=True)(text.new_logp, image.new_logp)
    assert metrics["text/ratio_max_dev"] == 0.0
    assert metrics["image/ratio_max_dev"] == 0.0
    assert metrics["text/clip_fraction"] == metrics["image/clip_fraction"] == 0.0
    scored = np.asarray(text.mask & valid[:, None])
    advantage = np.asarray(text.advantage)[:, None]
    expected = np.where(scored, -advantage, 0) / scored.sum() * J / (J + 1)
    np.testing.assert_allclose(gradients[0], expected, rtol=1e-6)
    clipped = np.clip(advantage, -5, 5) * np.ones((1, J))
    expected = np.where(np.asarray(valid)[:, None], -clipped, 0) / 5 / (J + 1)
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradients_against_finite_differences_of_float64(level):
    text, image, valid = arrays(seed=1)
    options = {"text_beta": 0.2, "image_beta": 0.0}

    def run(new_text, new_image):
        return grpo_loss(
            text._replace(new_logp=new_text),
            image._replace(new_logp=new_image),
            valid,
            level=level,
            **totals(text, valid),
            **options,
        )[0]

    gradients = jax.grad(run, argnums=(0, 1))(text.new_logp, image.new_logp)
    size = 1e-7
    for which, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            values = []
            for sign in (1, -1):
                news = [np.asarray(t.new_logp, np.float64).copy() for t in (text, image)]
                news[which][index] += sign * size
                terms = text._replace(new_logp=news[0]), image._replace(new_logp=news[1])
                constant = text.new_logp
                values.append(
                    reference(*terms, valid, level=level, w=1.0, constant=constant, **options)
                )
            numeric = (values[0] - values[1]) / (2 * size)
            assert gradient[index] == pytest.approx(numeric, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_loss_gradient_and_metrics_do_not_depend_on_the_micro_batch(level, micro_batch):
    text, image, valid = arrays()
    normalizers = totals(text, valid)

    def run(rows, delta):
        part_text = TextTerms(*(None if x is None else x[rows] for x in text))
        part_image = ImageTerms(*(x[rows] for x in image))
        return grpo_loss(
            part_text._replace(new_logp=part_text.new_logp + delta),
            part_image._replace(new_logp=part_image.new_logp + 1e-5 * delta),
            valid[rows],
            level=level,
            text_beta=0.1,
            image_beta=0.2,
            **normalizers,
        )

    value = jax.value_and_grad(run, argnums=1, has_aux=True)
    (full, metrics), gradient = value(slice(None), 0.01)
    results = [value(slice(i, i + micro_batch), 0.01) for i in range(0, B, micro_batch)]
    merged = results[0][0][1]
    for (_, more), _ in results[1:]:
        merged = loss_lib.merge_metrics(merged, more)
    assert sum(result[0][0] for result in results) == pytest.approx(float(full), rel=1e-5)
    assert sum(result[1] for result in results) == pytest.approx(float(gradient), rel=1e-5)
    assert merged.keys() == metrics.keys()
    for name, number in metrics.items():
        assert merged[name] == pytest.approx(float(number), rel=1e-5), name


def test_padding_and_invalid_trajectories_count_nowhere_even_as_nan():
    text, image, valid = arrays()
    scored = text.mask & valid[:, None]
    bad_text = text._replace(
        new_logp=jnp.where(scored, text.new_logp, jnp.nan),
        old_logp=jnp.where(scored, text.old_logp, jnp.inf),
        entropy=jnp.where(scored, text.entropy, jnp.nan),
        ref_logp=jnp.where(scored, text.ref_logp, jnp.nan),
        advantage=jnp.where(valid, text.advantage, jnp.nan),
    )
    bad_image = ImageTerms(
        *(jnp.where(valid[:, None], x, jnp.nan) for x in (image.new_logp, image.old_logp)),
        advantage=bad_text.advantage,
        kl=jnp.where(valid[:, None], image.kl, jnp.nan),
    )
    for level in ("token", "sequence"):

        def run(text, image, level=level):
            return grpo_loss(
                text,
                image,
                valid,
                level=level,
                text_beta=0.1,
                image_beta=0.1,
                **totals(text, valid),
            )

        expected, metrics = run(text, image)
        got, bad_metrics = run(bad_text, bad_image)
        assert got == expected
        assert bad_metrics == metrics

        def scalar(new_text, new_image, run=run):
            terms = bad_text._replace(new_logp=new_text), bad_image._replace(new_logp=new_image)
            return run(*terms)[0]

        gradients = jax.grad(scalar, argnums=(0, 1))(bad_text.new_logp, bad_image.new_logp)
        assert np.isfinite(gradients[0]).all()
        assert np.isfinite(gradients[1]).all()
        np.testing.assert_array_equal(np.asarray(gradients[0])[~np.asarray(scored)], 0.0)
        np.testing.assert_array_equal(gradients[1][5], 0.0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_log_prob_that_is_not_a_number_makes_the_loss_one_too(jit, level):
    text, image, valid = arrays()
    broken_text = text._replace(new_logp=jnp.full_like(text.new_logp, jnp.nan))
    broken_image = image._replace(new_logp=jnp.full_like(image.new_logp, jnp.nan))
    normalizers = totals(text, valid)

    def run(text, image):
        return grpo_loss(text, image, valid, level=level, **normalizers)[0]

    run = jax.jit(run) if jit else run
    assert np.isfinite(run(text, image))
    assert np.isnan(run(broken_text, image))
    assert np.isnan(run(text, broken_image))


def test_nothing_valid_gives_zero():
    text, image, _ = arrays()
    none = jnp.zeros(B, bool)
    got, metrics = grpo_loss(text, image, none, **totals(text, none))
    assert got == 0.0
    assert all(value == 0.0 for value in metrics.values())


def test_text_alone_and_image_alone():
    text, image, valid = arrays()
    normalizers = totals(text, valid)
    text_only, _ = grpo_loss(text, None, valid, text_loss_weight=0.3, **normalizers)
    image_only, _ = grpo_loss(None, image, valid, **normalizers)
    combined, metrics = grpo_loss(text, image, valid, text_loss_weight=0.3, **normalizers)
    assert text_only == pytest.approx(0.3 * float(metrics["loss/text"]))
    assert image_only == pytest.approx(float(metrics["loss/image"]))
    assert combined == pytest.approx(float(text_only + image_only) * J / (J + 1), rel=1e-6)
    with pytest.raises(ValueError, match="neither text nor image"):
        grpo_loss(None, None, valid, **normalizers)


def test_clipped_terms_have_no_gradient_on_the_clipped_side_only():
    def gradient(ratio, advantage):
        def run(new):
            image = ImageTerms(new[None, None], jnp.zeros((1, 1)), jnp.array([advantage]))
            valid = jnp.ones(1, bool)
            return image_grpo(image, valid, trajectories_total=1.0, image_clip=0.1)[0]

        return jax.grad(run)(jnp.log(jnp.float32(ratio)))

    assert gradient(1.2, 1.0) == 0.0
    assert gradient(0.8, -1.0) == 0.0
    assert gradient(0.8, 1.0) == pytest.approx(-0.8)
    assert gradient(1.2, -1.0) == pytest.approx(1.2)
    assert gradient(1.05, 1.0) == pytest.approx(-1.05)


def test_k3_kl_by_hand():
    new, ref = jnp.array([[0.0, 0.0, 5.0]]), jnp.array([[0.0, np.log(2.0), -5.0]])
    got = k3_kl(new, ref, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(got, [[0.0, 2 - np.log(2.0) - 1, 0.0]], rtol=1e-6)


def test_gaussian_kl_by_hand():
    mean = jnp.array([[[1.0, 3.0]], [[0.0, 0.0]]])
    got = gaussian_kl(mean, jnp.zeros((2, 1, 2)), jnp.float32(2.0))
    np.testing.assert_allclose(got, [5 / 8, 0.0])
    got = gaussian_kl(mean, jnp.zeros((2, 1, 2)), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(got, [2.5, 0.0])


def test_top_entropy_mask():
    entropy = jnp.array([[0.1, 0.9, 9.0], [0.5, 0.7, 0.3]])
    mask = jnp.array([[True, True, False], [True, True, True]])
    got = top_entropy_mask(entropy, mask, fraction=0.5)  # median 0.5 of 0.1 .3 .5 .7 .9
    np.testing.assert_array_equal(got, [[False, True, False], [True, True, False]])
    np.testing.assert_array_equal(top_entropy_mask(entropy, mask, fraction=1.0), mask)
    nothing = jnp.zeros_like(mask)
    got = top_entropy_mask(entropy, nothing, fraction=0.5)
    np.testing.assert_array_equal(got, nothing)


def test_a_kl_that_is_only_reported_never_touches_the_loss():
    text, image, valid = arrays()
    normalizers = totals(text, valid)
    plain, _ = text_grpo(text._replace(ref_logp=None), valid, **normalizers)
    share, metrics = text_grpo(text, valid, **normalizers)
    assert share == plain
    assert metrics["text/kl"] > 0.0
    far = text._replace(ref_logp=jnp.full_like(text.ref_logp, jnp.inf))  # its KL overflows
    share, metrics = text_grpo(far, valid, **normalizers)
    assert share == plain
    assert not jnp.isfinite(metrics["text/kl"])
    image_share, _ = image_grpo(image._replace(kl=None), valid, trajectories_total=3.0)
    overflown = image._replace(kl=jnp.full_like(image.kl, jnp.inf))
    share, metrics = image_grpo(overflown, valid, trajectories_total=3.0)
    assert share == image_share
    assert metrics["image/kl"] == jnp.inf


def test_refuses_what_does_not_fit():
    text, image, valid = arrays()
    normalizers = totals(text, valid)
    with pytest.raises(ValueError, match=r"level\n  Input should be 'sequence' or 'token'"):
        text_grpo(text, valid, level="word", **normalizers)
    with pytest.raises(ValueError, match="without ref_logp"):
        text_grpo(text._replace(ref_logp=None), valid, text_beta=0.1, **normalizers)
    with pytest.raises(ValueError, match="without kl"):
        grpo_loss(None, image._replace(kl=None), valid, image_beta=0.1, **normalizers)
    with pytest.raises(AssertionError):
        text_grpo(text._replace(old_logp=text.old_logp[:, :-1]), valid, **normalizers)
    selected = text._replace(selected=text.mask)
    with pytest.raises(ValueError, match=r"only one of TextTerms\.selected and selected_tokens_to"):
        text_grpo(selected, valid, entropy_mean="kept", **normalizers)
    with pytest.raises(AssertionError):
        image_grpo(image, valid[:-1], trajectories_total=1.0)
    with pytest.raises(ValueError, match="expected the same as"):
        loss_lib.merge_metrics({"a": 1.0}, {"b": 1.0})


def test_steps_of_several_turns_are_averaged_over_all_backward_calls():
    """[think, image (2 steps), think, image (2 steps), answer], by hand: counts 2W, W and 1."""
    rng = np.random.default_rng(3)
    valid = jnp.array([True, True, False])
    advantage = jnp.array([1.0, -2.0, 9.0])
    texts = []
    for _ in range(3):
        old = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
        new = old + jnp.asarray(rng.normal(size=(3, 4)) * 0.05, jnp.float32)
        mask = jnp.ones((3, 4), bool)
        texts.append(loss_lib.TextTerms(new, old, mask, advantage, jnp.zeros((3, 4))))
    images = []
    for _ in range(2):
        old = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
        images.append(loss_lib.ImageTerms(old + 1e-6, old, 0.5 * advantage))
    normalizers = {"trajectories_total": jnp.float32(2.0)}
    share, metrics = loss_lib.grpo_loss(
        texts,
        images,
        valid,
        text_counts=(4, 2, 1),
        text_tokens_total=jnp.full(3, 8.0),
        options=loss_options(text_loss_weight=0.5),
        **normalizers,
    )
    each_text = [
        float(text_grpo(t, valid, text_tokens_total=jnp.float32(8.0), **normalizers)[0])
        for t in texts
    ]
    each_image = [float(image_grpo(i, valid, **normalizers)[0]) for i in images]
    weighed = 0.5 * (4 * each_text[0] + 2 * each_text[1] + each_text[2])
    expected = (weighed + 2 * each_image[0] + 2 * each_image[1]) / (3 + 4)
    np.testing.assert_allclose(share, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/text"], np.mean(each_text), rtol=1e-5)
    deviations = [np.abs(np.expm1(t.new_logp - t.old_logp))[:2].max() for t in texts]
    np.testing.assert_allclose(metrics["text/ratio_max_dev"], max(deviations), rtol=1e-5)
    with pytest.raises(ValueError, match="2 text_counts for 3 text steps"):
        loss_lib.grpo_loss(
            texts,
            images,
            valid,
            text_counts=(1, 1),
            text_tokens_total=jnp.ones(3),
            options=loss_options(),
            **normalizers,
        )
