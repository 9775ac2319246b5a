"""Editing, answering and refining with a tiny random model; a judge whose verdicts are given."""

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
    whole = run_task(policy, task, ASKED, IMAGES, seed=3, temperature=1.0)
    assert whole.images is None
    assert len(whole.texts) == 2
    cut = run_task(policy, task, ASKED, IMAGES, seed=3, temperature=1.0, batch=2)
    assert cut.texts == whole.texts
    assert len(set(whole.texts[0])) > 1


class Verdicts:
    """A judge with given rewards, in the order in which it is asked."""

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

    def step(policy, name, text, image, *, count, seed):
        value = int(np.asarray(image)[0, 0, 0]) + 10
        return inference.GeneratedImages(np.full((1, 2, 2, 3), value, np.uint8), [f"seed {seed}"])

    def run(keep, *rewards):
        judge = Verdicts(*rewards)
        monkeypatch.setattr(inference, "_sample_prompt", step)
        monkeypatch.setattr(inference, "_ImageRater", lambda policy, record: judge)
        first = inference.Round(np.full((2, 2, 3), 100, np.uint8), "")
        monkeypatch.setattr(inference, "_first_round", lambda *_, **__: first)
        record = None if keep == "last" else parse_record(tiny_world.record("x"))
        found = refine(
            None, "x", rounds=3, keep=keep, think=False, record=record, image=None, seed=5
        )
        return found, judge

    return run


def values(found):
    return [int(each.image[0, 0, 0]) for each in found]


def test_last_goes_on_and_asks_no_one(rounds):
    found, judge = rounds("last")
    found = list(found)
    assert all(each.is_kept for each in found)  # so far
    assert values(found) == [100, 110, 120, 130]
    assert [each.reward for each in found] == [None] * 4
    assert [each.text for each in found[1:]] == ["seed 6", "seed 7", "seed 8"]
    assert not judge.closed


def test_best_goes_on_and_keeps_the_first_of_the_best(rounds):
    found, judge = rounds("best", 0.3, 0.8, 0.8, 0.1)
    found = list(found)
    assert [each.is_kept for each in found] == [True, True, False, False]
    assert values(found) == [100, 110, 120, 130]
    assert judge.closed


def test_gated_goes_back_to_the_best_so_far(rounds):
    found, _ = rounds("gated", 0.3, 0.2, 0.5, 0.5)
    found = list(found)
    assert [each.is_kept for each in found] == [True, False, True, False]
    # The first round was worse: the second starts from the first image again, as did the first.
    assert values(found) == [100, 110, 110, 120]


def test_rounds_come_one_by_one_and_a_judge_that_fails_costs_none(rounds):
    found, judge = rounds("best", 0.3, 0.2, None)
    assert next(found).reward == 0.3
    assert len(judge.rewards) == 2  # the next round is not yet begun
    assert next(found).reward == 0.2
    unrated = next(found)
    assert values([unrated]) == [120]
    assert unrated.reward is None
    assert not unrated.is_kept
    with pytest.raises(ValueError, match="no answer"):
        next(found)
    assert judge.closed


def test_keeping_by_a_verifier_needs_questions(policy):
    with pytest.raises(ValueError, match="keep='best' needs a verifier and a record"):
        next(
            refine(policy, "x", rounds=1, keep="best", think=False, record=None, image=None, seed=0)
        )


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (33, 70)])
def test_images_of_any_size_are_edited(policy, size):
    sizes = dataclasses.replace(policy.loaded.config.vae_transform, max_size=32, min_size=16)
    config = dataclasses.replace(policy.loaded.config, vae_transform=sizes)
    own = policy._replace(loaded=dataclasses.replace(policy.loaded, config=config))
    image = Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8))
    pixels, seen = inference._encoder_images(own.loaded, image)
    assert pixels.shape[0] % 16 == pixels.shape[1] % 16 == 0
    assert max(pixels.shape) <= 32
    assert seen.shape[0] % 8 == seen.shape[1] % 8 == 0
