"""A pool without processes: its checks, answers at `gather`, and failures by sample."""

import numpy as np
import pytest

from alphagrpo_jax.rewards.verifiers.base import Answer
from alphagrpo_jax.rewards.workers.in_process import InProcessPool

QUESTIONS = ["Is there a circle?", "Is it red?"]


class Recorder:
    """Answers by brightness and question length, and records its calls."""

    def __init__(self):
        self.calls = []

    def answer_batch(self, images, questions):
        self.calls.append([int(image[0, 0, 0]) for image in images])
        if any("explode" in image_questions for image_questions in questions):
            raise RuntimeError("out of memory")
        return [
            [
                Answer(None, f"cannot ask {text!r}")
                if text.startswith("bad")
                else Answer((int(image[0, 0, 0]) + len(text)) / 256)
                for text in image_questions
            ]
            for image, image_questions in zip(images, questions, strict=True)
        ]


@pytest.fixture
def pool():
    return InProcessPool(Recorder())


def picture(number):
    return np.full((2, 2, 3), number, np.uint8)


def test_samples_are_answered_when_gathered_in_the_order_of_the_ids(pool):
    images = {number: picture(number) for number in range(4)}
    for number, image in images.items():
        pool.submit(number, image, QUESTIONS[: 1 + number % 2])
        image[:] = 99  # the pool has a copy
    assert pool.verifier.calls == []
    results = pool.gather([3, 0, 3])
    assert pool.verifier.calls == [[3, 0]]
    assert list(results) == [3, 0]
    assert results[3].p_yes == ((3 + 18) / 256, (3 + 10) / 256)
    assert results[0].p_yes == ((0 + 18) / 256,)
    assert (results[3].valid, results[3].failure, results[3].ratings) == (True, None, ())
    assert (results[3].attempts, results[3].worker) == (1, None)
    assert list(pool.gather(iter([1, 2]))) == [1, 2]


def test_one_failed_question_makes_its_sample_invalid_and_no_other(pool):
    pool.submit("a", picture(1), [QUESTIONS[0], "bad one", "bad two"])
    pool.submit("b", picture(2), QUESTIONS)
    results = pool.gather(["a", "b"])
    assert (results["a"].valid, results["a"].p_yes) == (False, None)
    assert results["a"].failure == "cannot ask 'bad one'"
    assert results["b"].valid


def test_refuses_wrong_samples(pool):
    for questions, rated in (([], ()), ("Is it?", ()), (["Is it?"], ["How well?"])):
        with pytest.raises(ValueError, match="expected a list of yes/no questions or of prompts"):
            pool.submit("x", picture(1), questions, rated)
    with pytest.raises(ValueError, match=r"sample 'x': got an image float32\[2, 2, 3\], expected"):
        pool.submit("x", picture(1).astype(np.float32), QUESTIONS)
    pool.submit("x", picture(1), QUESTIONS)
    with pytest.raises(ValueError, match="submitted before"):
        pool.submit("x", picture(1), QUESTIONS)
    pool.gather(["x"])
    for sample_id in ("x", "never"):
        with pytest.raises(ValueError, match=rf"got sample ids \['{sample_id}'\] that are not wai"):
            pool.gather([sample_id])


def test_an_error_of_the_verifier_is_raised_and_loses_no_sample(pool):
    pool.submit("a", picture(1), ["explode"])
    pool.submit("b", picture(2), QUESTIONS)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.gather(["a", "b"])
    assert pool.gather(["b"])["b"].valid
