"""The shipped verifier, spot-checked; `shapes.verifier_eval` measures it in full."""

import pathlib

import numpy as np
import pytest

import alphagrpo_jax.shapes
from alphagrpo_jax.rewards.verifiers.hf import HFVerifier
from alphagrpo_jax.shapes import scenes, verifier_eval

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


def test_shared_prefix_is_used_and_changes_nothing(verifier):
    assert verifier.shared_prefix
    example = verifier_eval.heldout_example(np.random.default_rng(0), clean=True)
    texts = ["Is there a red circle?", "Are there exactly two shapes?"]
    shared = [answer.p_yes for answer in verifier.answer(example.image, texts)]
    verifier.shared_prefix = False
    whole = [answer.p_yes for answer in verifier.answer(example.image, texts)]
    verifier.shared_prefix = True
    np.testing.assert_allclose(shared, whole, atol=1e-5)


def test_rates_a_match_above_a_mismatch(verifier):
    example = verifier_eval.heldout_example(np.random.default_rng(1), clean=True)
    thing = example.scene.things[0]
    used = {thing.color for thing in example.scene.things}
    absent = next(color for color in scenes.COLORS if color not in used)
    ask = "How well does the image match the prompt: a {} {}?"
    good, bad = verifier.rate(
        example.image, [ask.format(thing.color, thing.shape), ask.format(absent, thing.shape)]
    )
    assert good.value > bad.value
