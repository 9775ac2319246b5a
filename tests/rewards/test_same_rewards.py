"""The shipped verifier in a pool: the same numbers whoever answers, whenever, in whatever order."""

import numpy as np
import pytest
from default_options import start_pool

from alphagrpo_jax.runtime.paths import resolve

pytestmark = pytest.mark.torch

QUESTIONS = ("Is there a red circle?", "Are there exactly two squares?", "Is the background white?")
FACTORY = ("hf", {"path": str(resolve("package:verifier")), "num_threads": 1})


def test_one_worker_in_turn_and_two_at_once_agree_bit_for_bit():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 48, 48, 3)).astype(np.uint8)
    questions = [QUESTIONS[: 1 + number % 3] for number in range(len(images))]
    with start_pool(FACTORY, workers=1) as pool:  # synchronous
        in_turn = []
        for number, image in enumerate(images):
            pool.submit(number, image, questions[number])
            in_turn.append(pool.gather([number])[number].p_yes)
    with start_pool(FACTORY, workers=2) as pool:  # asynchronous, backwards
        pool.wait_ready()
        for number in reversed(range(len(images))):
            pool.submit(number, images[number], questions[number])
        at_once = pool.gather(range(len(images)))
    assert [at_once[number].p_yes for number in range(len(images))] == in_turn
    assert [len(p_yes) for p_yes in in_turn] == [len(texts) for texts in questions]
