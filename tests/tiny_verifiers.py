"""Verifiers of the tests' tiny world, which a worker imports without JAX."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import Answer, Score


class Honest:
    """P(yes) from the image's brightness and the question's length: deterministic, never equal."""

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        mean = float(image.astype(np.float64).mean()) / 255.0
        return [Answer((7.0 * mean + 0.37 * len(text)) % 1.0) for text in questions]


class DiesOnce(Honest):
    """As `Honest`, but a folder's first process is slow, and one ends in the middle of a run."""

    def __init__(self):
        self.answered, self.seconds = 0, 0.0
        with contextlib.suppress(FileExistsError):
            pathlib.Path("verifier_is_slow").touch(exist_ok=False)
            self.seconds = 0.02

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        self.answered += 1
        marker = pathlib.Path("verifier_died")
        if self.answered == 12 and not marker.exists():
            marker.write_text("")
            os._exit(1)
        time.sleep(self.seconds)
        return super().answer(image, questions)


class Tires(Honest):
    """As `Honest`, but gives no numbers after as many images as the file `tires_after` says."""

    def __init__(self):
        self.answered = 0

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        self.answered += 1
        limit = pathlib.Path("tires_after")
        if limit.exists() and self.answered > int(limit.read_text()):
            return [Answer(None, "no answer") for _ in questions]
        return super().answer(image, questions)


class SometimesMute(Honest):
    """As `Honest`, but gives no number about some images: always the same ones."""

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        if int(image.astype(np.int64).sum()) % 5 == 0:
            return [Answer(None, "no answer") for _ in questions]
        return super().answer(image, questions)


class Mute:
    """Never gives a number."""

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        return [Answer(None, "no answer") for _ in questions]


class Constant:
    """Always the same answer: groups without differences."""

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        return [Answer(0.5) for _ in questions]


class Interrupts(Honest):
    """As `Honest`, but once sends the run a signal: `signal.json` holds its number and the image.

    The signal arrives before the answer: the run stops after the very step that asked.
    """

    def __init__(self):
        self.answered = 0

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        self.answered += 1
        path = pathlib.Path("signal.json")
        if path.exists():
            number, after = json.loads(path.read_text())
            if self.answered > after:
                path.unlink()
                os.kill(os.getppid(), number)
        return super().answer(image, questions)


class Stalls(Honest):
    """As `Honest`, but never answers after as many images as the file `stalls_after` says.

    The file `reached` tells that it has begun to stall.
    """

    def __init__(self):
        self.answered = 0

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        self.answered += 1
        limit = pathlib.Path("stalls_after")
        if limit.exists() and self.answered > int(limit.read_text()):
            pathlib.Path("reached").touch()
            time.sleep(1e4)
        return super().answer(image, questions)


def never_starts():
    """Takes for ever to be built, if the file `stalls_after` is there."""
    if pathlib.Path("stalls_after").exists():
        pathlib.Path("reached").touch()
        time.sleep(1e4)
    return Honest()


def redness(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    """A scorer: the mean of red, 0 to 255, less the prompt's length."""
    pairs = zip(images, prompts, strict=True)
    return [float(image[..., 0].mean()) - len(prompt) for image, prompt in pairs]


def sometimes_nothing(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | None]:
    """As `redness`, but gives no score for some images, NaN for others: always the same ones."""
    odd = {0: None, 1: float("nan")}
    return [
        odd.get(int(image.astype(np.int64).sum()) % 7, score)
        for image, score in zip(images, redness(images, prompts), strict=True)
    ]


class NoUnicorns(Honest):
    """As `Honest`, but cannot be asked about unicorns, whoever tries; tells the answers' mass."""

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Answer]:
        return [
            Answer(None, "unicorns do not exist", permanent=True)
            if "unicorn" in question
            else answer._replace(mass=0.75)
            for question, answer in zip(questions, super().answer(image, questions), strict=True)
        ]


def no_unicorns(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score | float]:
    """As `redness`, but no prompt about unicorns, and no empty one, can have a score."""
    return [
        Score(None, "unicorns do not exist", permanent=True)
        if "unicorn" in prompt or not prompt
        else score
        for prompt, score in zip(prompts, redness(images, prompts), strict=True)
    ]
