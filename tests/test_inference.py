"""Editing, answering and refining with a tiny random model; a verifier whose rewards are given."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tiny_world
from PIL import Image

from alphagrpo_jax import config_checks as config_lib
from alphagrpo_jax import inference, tasks
from alphagrpo_jax.inference import refine, run_task
from alphagrpo_jax.policy import PolicyParams
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.runtime.records import parse_record


@pytest.fixture(scope="module")
def policy():
    config = config_lib.from_config_dict(tiny_world.config(pathlib.Path("unused")))
    loaded = tiny_world.model()
    return inference.Policy(config, loaded, PolicyParams(loaded.base), 0)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
ASKED = ["a red circle", "a", "two green crosses"]


def test_a_row_depends_on_its_own_input_and_number_only(policy):
    task = tasks.TASKS["ti2t"]
    one_batch = run_task(policy, task, ASKED, IMAGES, seed=3, temperature=1.0)
    assert one_batch.images is None
    assert len(one_batch.texts) == 2
    cut = run_task(policy, task, ASKED, IMAGES, seed=3, temperature=1.0, batch=2)
    assert cut.texts == one_batch.texts
    assert len(set(one_batch.texts[0])) > 1


class Verdicts:
    """A verifier with given rewards, in the order in which it is asked."""

    def __init__(self, *rewards):
        self.rewards, self.closed = list(rewards), False

    def __call__(self, image):
        if self.rewards[0] is None:
            raise InputError("no answer")
        return self.rewards.pop(0)

    def close(self):
        self.closed = True


@pytest.fixture
def rounds(monkeypatch):
    """Every round adds ten to the image it is shown, starting from 100."""

    def step(policy, task, text, image, *, count, seed):
        value = int(np.asarray(image)[0, 0, 0]) + 10
        return inference.GeneratedImages(np.full((1, 2, 2, 3), value, np.uint8), [f"seed {seed}"])

    def run(keep, *rewards):
        rater = Verdicts(*rewards)
        monkeypatch.setattr(inference, "_sample_prompt", step)
        monkeypatch.setattr(inference, "_ImageRater", lambda policy, record: rater)
        first = inference.Round(np.full((2, 2, 3), 100, np.uint8), "")
        monkeypatch.setattr(inference, "_first_round", lambda *_, **__: first)
        record = None if keep == "last" else parse_record(tiny_world.record("x"))
        results = refine(
            None, "x", rounds=3, keep=keep, think=False, record=record, image=None, seed=5
        )
        return results, rater

    return run


def values(results):
    return [int(result.image[0, 0, 0]) for result in results]


def test_a_refinement_asks_with_the_blank_of_the_released_evaluation(policy, monkeypatch):
    """Training asks without it, see `tests/test_tasks.py`."""
    prefixes = []

    def sample(policy, spec, inputs, *, seed, temperature):
        (text,) = [block for block in inputs if hasattr(block, "tokens")]
        prefixes.append(policy.loaded.tokenizer.decode(np.asarray(text.tokens)[0][1:-1]))
        return None, np.zeros((1, 32, 32, 3), np.uint8)

    monkeypatch.setattr(inference, "_sample", sample)
    monkeypatch.setattr(inference, "decode_steps", lambda *_: [["a reflection"]])
    image = Image.fromarray(IMAGES[0])
    options = {"keep": "last", "think": False, "record": None, "image": image, "seed": 0}
    assert len(list(refine(policy, "a red cross", rounds=1, **options))) == 2
    (prefix,) = prefixes
    assert prefix == tasks.GENERATE_REFLECTION_REQUEST.format(prompt="a red cross")
    assert "the correct image. \nReflect on" in prefix


def test_last_goes_on_and_asks_no_one(rounds):
    results, rater = rounds("last")
    results = list(results)
    assert all(result.is_kept for result in results)  # so far
    assert values(results) == [100, 110, 120, 130]
    assert [result.reward for result in results] == [None] * 4
    assert [result.text for result in results[1:]] == ["seed 6", "seed 7", "seed 8"]
    assert not rater.closed


def test_best_goes_on_and_keeps_the_first_of_the_best(rounds):
    results, rater = rounds("best", 0.3, 0.8, 0.8, 0.1)
    results = list(results)
    assert [result.is_kept for result in results] == [True, True, False, False]
    assert values(results) == [100, 110, 120, 130]
    assert rater.closed


def test_gated_goes_back_to_the_best_so_far(rounds):
    results, _ = rounds("gated", 0.3, 0.2, 0.5, 0.5)
    results = list(results)
    assert [result.is_kept for result in results] == [True, False, True, False]
    # The first round was worse: the second starts from the first image again, as did the first.
    assert values(results) == [100, 110, 110, 120]


def test_rounds_come_one_by_one_and_a_verifier_that_fails_costs_none(rounds):
    results, rater = rounds("best", 0.3, 0.2, None)
    assert next(results).reward == 0.3
    assert len(rater.rewards) == 2  # the next round is not yet begun
    assert next(results).reward == 0.2
    unrated = next(results)
    assert values([unrated]) == [120]
    assert unrated.reward is None
    assert not unrated.is_kept
    with pytest.raises(ValueError, match="no answer"):
        next(results)
    assert rater.closed


def test_keeping_by_a_verifier_needs_questions(policy):
    with pytest.raises(ValueError, match="keep='best' needs a verifier and a record"):
        next(
            refine(policy, "x", rounds=1, keep="best", think=False, record=None, image=None, seed=0)
        )


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (33, 70)])
def test_images_of_any_size_are_edited(policy, size):
    sizes = dataclasses.replace(policy.loaded.config.vae_transform, max_size=32, min_size=16)
    config = dataclasses.replace(policy.loaded.config, vae_transform=sizes)
    small_policy = policy._replace(loaded=dataclasses.replace(policy.loaded, config=config))
    image = Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8))
    pixels, vit_pixels = inference._encoder_images(small_policy.loaded, image)
    assert pixels.shape[0] % 16 == pixels.shape[1] % 16 == 0
    assert max(pixels.shape) <= 32
    assert vit_pixels.shape[0] % 8 == vit_pixels.shape[1] % 8 == 0
