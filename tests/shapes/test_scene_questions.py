"""Questions about scenes: wordings, truth, balance."""

import collections

import numpy as np
import pytest

from alphagrpo_jax.shapes import corrupt, questions, scenes
from alphagrpo_jax.shapes.specs import Group

SCENE = scenes.Scene(
    (
        scenes.SceneObject("circle", "red", 0, 0),
        scenes.SceneObject("circle", "red", 0, 2),
        scenes.SceneObject("square", "blue", 2, 1),
    ),
    "gray",
)
RED_CIRCLE, BLUE_SQUARE = Group(1, "circle", "red"), Group(1, "square", "blue")
ANY = Group(1, None, None)


@pytest.mark.parametrize(
    ("query", "words", "answer"),
    [
        (questions.exists(Group(1, "circle", None)), "Is there a circle?", True),
        (questions.exists(Group(1, None, "orange")), "Is there an orange shape?", False),
        (questions.exists(BLUE_SQUARE), "Is there a blue square?", True),
        (questions.exists(Group(1, "square", "red")), "Is there a red square?", False),
        (questions.has_color("circle", "red"), "Is the circle red?", True),
        (questions.has_color("cross", "red"), "Is the cross red?", False),
        (questions.counts(Group(2, "circle", None)), "Are there exactly two circles?", True),
        (questions.counts(ANY), "Is there exactly one shape?", False),
        (questions.counts(Group(3, None, None)), "Are there exactly three shapes?", True),
        (
            questions.relates("above", RED_CIRCLE, BLUE_SQUARE),
            "Is the red circle above the blue square?",
            True,
        ),
        (
            questions.relates("left of", RED_CIRCLE, BLUE_SQUARE),
            "Is the red circle to the left of the blue square?",
            False,  # one of the two is not
        ),
        (
            questions.relates("below", Group(1, "cross", "red"), RED_CIRCLE),
            "Is the red cross below the red circle?",
            False,  # absent
        ),
        (questions.has_background("gray"), "Is the background gray?", True),
        (questions.has_background("white"), "Is the background white?", False),
        (questions.quality("geometry"), "Are all shapes well formed?", False),
        (questions.quality("texture"), "Are the colours flat and clean?", True),
    ],
)
def test_words_and_truth(query, words, answer):
    labels = {"geometry": False, "coherence": True, "texture": True}
    assert questions.text(query) == words
    assert questions.truth(query, SCENE, labels) == answer


def test_quality_needs_a_label():
    with pytest.raises(KeyError):
        questions.truth(questions.quality("geometry"), SCENE)


def test_sampled_questions_are_balanced_and_different():
    rng, answers = np.random.default_rng(0), collections.defaultdict(list)
    for _ in range(1200):
        scene = scenes.random_scene(rng)
        triples = questions.sample_questions(scene, None, rng, 6)
        assert len({words for words, _, _ in triples}) == len(triples)
        for _, answer, type_ in triples:
            answers[type_].append(answer)
    assert set(answers) == set(questions.SEMANTIC)
    for type_, values in answers.items():
        assert len(values) > 300, type_
        assert np.mean(values) == pytest.approx(0.5, abs=0.05), type_


def test_only_labelled_qualities_are_asked():
    rng = np.random.default_rng(1)
    labels = {"coherence": False}
    triples = [
        triple for _ in range(50) for triple in questions.sample_questions(SCENE, labels, rng, 8)
    ]
    quality = {(answer, type_) for _, answer, type_ in triples if type_ in questions.QUALITY}
    assert quality == {(False, "coherence")}


def test_questions_do_not_hang_on_damaged_shapes():
    rng = np.random.default_rng(2)
    texts = [
        words
        for _ in range(80)
        for words, _, _ in questions.sample_questions(SCENE, corrupt.SOUND, rng, 8, damaged=(2,))
    ]
    assert any("circle" in words for words in texts)
    for words in ("Is there a blue square?", "Are there exactly three shapes?"):
        assert words not in texts


def test_open_questions():
    rng = np.random.default_rng(3)
    answers = dict(questions.open_question(SCENE, rng) for _ in range(300))
    assert answers == {
        "How many shapes are there?": "three",
        "What is the colour of the background?": "gray",
        "What is the colour of the square?": "blue",
        "What shape is the blue shape?": "square",
        "Where is the blue square?": "bottom center",
        "How many red circles are there?": "two",
    }
