"""The shipped verifier, spot-checked; `shapes.verifier_eval` measures it in full."""

import pathlib

import numpy as np
import pytest

import alphagrpo_jax.shapes
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.studies import verifier_eval

pytestmark = pytest.mark.torch

FOLDER = pathlib.Path(alphagrpo_jax.shapes.__file__).parent / "assets" / "verifier"


@pytest.fixture(scope="module")
def verifier() -> HFVerifier:
    return HFVerifier(FOLDER, num_threads=1)


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"README.md", "config.json", "chat_template.jinja", "tokenizer.json"} <= set(files)
    assert sum(files.values()) <= 10 * 2**20


def test_answers_clean_and_imperfect_heldout_images(verifier):
    for clean, bar in ((True, 0.95), (False, 0.90)):
        rows = verifier_eval.collect(verifier, seed=7, images=40, clean=clean)
        right = [(p_yes > 0.5) == truth for _, truth, p_yes in rows]
        assert len(rows) == 480
        assert np.mean(right) >= bar
        assert verifier_eval.calibration_error(rows) <= 0.08  # 0.05 on the full set


def test_rates_a_match_above_a_mismatch(verifier):
    example = verifier_eval.heldout_example(np.random.default_rng(1), clean=True)
    obj = example.scene.objects[0]
    used = {obj.color for obj in example.scene.objects}
    absent = next(color for color in scenes.COLORS if color not in used)
    ask = "How well does the image match the prompt: a {} {}?"
    good, bad = verifier.rate(
        example.image, [ask.format(obj.color, obj.shape), ask.format(absent, obj.shape)]
    )
    assert good.value > bad.value


@pytest.mark.slow
def test_three_ways_are_timed_on_the_same_questions():
    samples = verifier_eval.timed_lists(seed=1, images=3)
    speeds = verifier_eval.speed(FOLDER, samples, threads=2)
    assert [name.split(" (")[0] for name in speeds] == [
        "one pass per question",
        "one image's questions packed",
        "pool of 2 workers",
    ]
    for row in speeds.values():  # 12 questions per image
        assert row["questions_per_second"] * row["ms_per_image"] == pytest.approx(12_000)
    apart = [row["apart"] for row in speeds.values()]
    assert apart[0] == 0 < apart[1] <= 1e-5  # another computation with the same result
    assert 0 < apart[2] <= 1e-5
    title, _, *rows = verifier_eval.speed_table(speeds, samples).splitlines()
    assert title == "2 held-out images, 24 questions"
    assert len(rows) == 3
