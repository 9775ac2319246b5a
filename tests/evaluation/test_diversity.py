"""Gauges of collapse by hand."""

import numpy as np
import pytest

from alphagrpo_jax.evaluation import diversity
from alphagrpo_jax.evaluation.checkers import CHECKERS
from alphagrpo_jax.runtime.records import parse_record
from alphagrpo_jax.shapes import scenes, specs
from alphagrpo_jax.shapes.scenes import Scene, SceneObject


def record(groups, relation=None, background=None):
    facts = {"groups": groups, "relation": relation, "background": background}
    questions = [{"question_type": "semantic", "question": "Q?", "is_valid": True, "tag": "Count"}]
    quality = [questions[0] | {"question_type": "quality"}]
    fields = {"prompt": "p", "semantic_questions": questions, "quality_questions": quality}
    return parse_record(fields | {"facts": facts})


ANY_CIRCLE = {"count": 1, "shape": "circle", "color": None}
RED_ANY = {"count": 1, "shape": None, "color": "red"}
RED_SQUARE = {"count": 1, "shape": "square", "color": "red"}


def test_effective_numbers_by_hand():
    assert diversity.effective_number([5]) == 1.0
    assert diversity.effective_number([2, 2, 2, 2]) == pytest.approx(4.0)
    assert diversity.effective_number([3, 1]) == pytest.approx(4 / 3**0.75)


def test_choices_count_where_the_prompt_leaves_them_open():
    def choices(image, prompt):
        return CHECKERS["shapes"](image, prompt).choices

    circle, square = SceneObject("circle", "blue", 0, 2), SceneObject("square", "red", 1, 1)
    one = scenes.render(Scene((circle,), "white"))
    assert choices(one, record([ANY_CIRCLE])) == {
        "background": ["white"], "place": ["0 2"], "color": ["blue"], "shape": [],
    }  # fmt: skip
    two = scenes.render(Scene((circle, square), "black"))
    relation = {"name": specs.RELATIONS[0], "first": 0, "second": 1}
    related = record([ANY_CIRCLE, RED_SQUARE], relation=relation, background="black")
    assert choices(two, related) == {
        "background": [], "place": [], "color": ["blue"], "shape": [],
    }  # fmt: skip
    assert choices(two, record([RED_ANY, ANY_CIRCLE]))["shape"] == ["square"]


def test_a_policy_that_always_draws_the_same_has_a_diversity_of_one():
    backgrounds = ["white", "black", "gray", "white"]
    different = np.stack([
        scenes.render(Scene((SceneObject("circle", "red", i % 3, i // 3),), background))
        for i, background in enumerate(backgrounds)
    ])  # fmt: skip
    read = CHECKERS["shapes"]
    choices = [read(image, record([ANY_CIRCLE])).choices for image in different]
    metrics = diversity.diversity(different, choices)
    assert metrics["diversity/background"] == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4
    assert metrics["diversity/place"] == pytest.approx(4.0)
    assert metrics["diversity/color"] == 1.0
    assert metrics["diversity/pixels"] > 0.1
    alike = np.repeat(different[:1], 4, axis=0)
    collapsed = diversity.diversity(alike, choices[:1] * 4)
    assert collapsed["diversity/background"] == collapsed["diversity/place"] == 1.0
    assert collapsed["diversity/pixels"] == 0.0


def test_without_an_exact_checker_pixels_are_left():
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, axis=3)
    metrics = diversity.diversity(
        images, [CHECKERS[""](images[0], record([ANY_CIRCLE])).choices] * 2
    )
    assert metrics == {"diversity/pixels": pytest.approx(0.5)}
