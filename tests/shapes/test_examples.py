"""Pretraining examples: pictures agree with texts, repairs repair."""

import numpy as np
import pytest

from alphagrpo_jax.shapes import examples, language, requests, riddles, scenes
from alphagrpo_jax.shapes.specs import describe, satisfied


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_drawings_agree_with_their_think_texts(rng):
    right = []
    for _ in range(300):
        example = examples.draw_example(rng)
        assert example.request.spec.split == "train"
        assert example.think.endswith(f"{language.layout(example.scene)} </think>")
        if example.request.kind == "plain":
            assert example.think == language.think(example.scene)
            assert satisfied(example.request.spec, example.scene)
        else:
            truth = language.think(example.scene, requests.truth(example.request))
            assert (example.think == truth) <= satisfied(example.request.spec, example.scene)
            right.append(example.think == truth)
    expected = np.mean([riddle.right for riddle in riddles.RIDDLES])
    assert 0.25 < np.mean(right) < expected + 0.05  # some have two riddles


def test_captions_and_answers(rng):
    for _ in range(100):
        caption, answer = examples.caption_example(rng), examples.answer_example(rng)
        assert describe(caption.scene).split == describe(answer.scene).split == "train"
        if caption.instruction == "Describe the layout.":
            assert caption.text == language.layout(caption.scene)
        assert answer.think == language.think(answer.scene)
        assert answer.question.endswith("?")
        assert len(answer.answer.split()) <= 2


def test_edits_change_one_thing(rng):
    verbs = set()
    for _ in range(200):
        example = examples.edit_example(rng)
        verbs.add(example.instruction.split()[0])
        assert example.think == language.think(example.target)
        before, after = example.scene, example.target
        unchanged = set(before.objects) & set(after.objects)
        changed = max(len(before.objects), len(after.objects)) - len(unchanged)
        assert changed + (before.background != after.background) == 1
    assert verbs == {"make", "turn", "remove", "move", "add", "change"}


def test_repairs(rng):
    kinds = {"plain": 0, "implied": 0}
    right = 0
    for _ in range(300):
        example = examples.reflect_example(rng)
        kinds[example.request.kind] += 1
        right += example.right
        assert example.think.endswith(f"{language.layout(example.target)} </think>")
        if example.right:
            assert example.scene == example.target
            assert "nothing is wrong. keep it" in example.think
        else:
            assert example.scene != example.target
            changed = set(example.scene.objects) ^ set(example.target.objects)
            assert len(changed) <= 4
        if example.request.kind == "plain":
            assert satisfied(example.request.spec, example.target)
            assert satisfied(example.request.spec, example.scene) == example.right
    assert right / 300 == pytest.approx(0.2, abs=0.07)
    assert min(kinds.values()) > 100


def test_images(rng):
    images = examples.render_batch([examples.draw_example(rng).scene for _ in range(3)])
    assert images.shape == (3, scenes.RESOLUTION, scenes.RESOLUTION, 3)
    assert images.dtype == np.uint8


def test_examples_depend_on_the_generator_alone():
    first, second = (examples.reflect_example(np.random.default_rng(5)) for _ in range(2))
    assert first == second
