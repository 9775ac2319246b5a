"""Names of scores: what they mean, what they are called in metrics, and what is refused."""

import math

import pytest

from alphagrpo_jax import score_specs


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("confidence", "confidence"),
        ("exact", "exact"),
        ("likelihood", "likelihood"),
        ("hf_clip:openai/clip-vit-base-patch32", "hf_clip.clip-vit-base-patch32"),
        ("hf_clip:/models/pick score/?value=logit", "hf_clip.pick_score"),
        ("callable:rewards.ocr:match", "callable.match"),
        ("callable:rewards.ocr:match?name=text", "text"),
    ],
)
def test_scores_have_short_names(text, name):
    assert score_specs.short_name(text) == name
    assert score_specs.check(text) == text


def test_options_are_read():
    spec = score_specs.parse(
        "hf_clip:a/b?range=0.1..0.4&value=logit&truncate=yes&processes=3&device=cuda:1&dtype=auto"
        "&processor=c/d"
    )
    assert spec == score_specs.ScorerSpec(
        kind="hf_clip",
        target="a/b",
        name="hf_clip.b",
        value="logit",
        range=(0.1, 0.4),
        processor="c/d",
        truncate=True,
        processes=3,
        device="cuda:1",
        dtype="auto",
    )
    assert score_specs.parse("hf_clip:a/b").value == "cosine"
    assert score_specs.parse("exact").range == (0.0, 1.0)
    assert score_specs.parse("binary") is None


@pytest.mark.parametrize(
    "text",
    [
        "warmth",
        "hf_clip",
        "hf_clip:",
        "exact:shapes",
        "likelihood:folder",
        "callable:module",
        "callable:module:function:more",
        "confidence?range=0..2",
        "exact?",
        "exact?value=cosine",
        "likelihood?device=cuda",
        "hf_clip:a?colour=red",
        "hf_clip:a?range=0..1&range=0..2",
        "hf_clip:a?range=1..1",
        "hf_clip:a?range=0..nan",
        "hf_clip:a?range=3",
        "hf_clip:a?value=distance",
        "hf_clip:a?truncate=maybe",
        "callable:a:b?processes=0",
        "callable:a:b?name=confidence",
        "callable:a:b?name=two words",
        "hf_clip:a?device=",
        "hf_clip:a?processor=",
    ],
)
def test_refusals(text):
    with pytest.raises(ValueError, match=r"got .* expected"):
        score_specs.parse(text)


def test_a_range_is_brought_to_that_of_probabilities():
    spec = score_specs.parse("callable:a:b?range=-10..10")
    assert [spec.rescaled(score) for score in (-10.0, 0.0, 10.0, 20.0)] == [0.0, 0.5, 1.0, 1.5]
    falling = score_specs.parse("callable:a:distance?range=4..0")  # less is better
    assert [falling.rescaled(score) for score in (4.0, 1.0, 0.0)] == [0.0, 0.75, 1.0]


def test_likelihoods_are_geometric_means_of_the_tokens_probabilities():
    mean = (math.log(0.5) + math.log(0.125)) / 2
    assert score_specs.parse("likelihood").read(mean) == pytest.approx(0.25)
    assert score_specs.parse("likelihood?value=log_prob").read(mean) == mean
    assert math.isnan(score_specs.parse("likelihood").read(0.1))  # of no probability
    assert score_specs.parse("exact").read(0.1) == 0.1
