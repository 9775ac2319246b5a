"""Verifiers that misbehave on command; built inside worker processes by `test_pool.py`."""

import os
import pathlib
import signal
import time

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import Answer, Rating, Score


def truth(image: np.ndarray, questions: list[str]) -> list[float]:
    """What an honest verifier answers: a number that depends on image and question."""
    mean = float(image.mean()) / 255.0
    return [(mean + len(question) / 100.0) % 1.0 for question in questions]


def ratings(image: np.ndarray, questions: list[str]) -> list[float]:
    """What an honest verifier rates, 0 to 10."""
    return [10.0 * value for value in truth(image, questions)]


class Fake:
    """Answers honestly, unless the image's first pixel says otherwise.

    The red value of pixel (0, 0) is the misbehaviour, the green one how many attempts in all (of
    all workers, counted in a folder of marker files) show it; the blue one tells samples apart.
    """

    def __init__(self, folder: str) -> None:
        self._folder = pathlib.Path(folder)

    def answer(self, image: np.ndarray, questions: list[str]) -> list[Answer]:
        fault, times, number = (int(value) for value in image[0, 0])
        honest = [Answer(p_yes) for p_yes in truth(image, questions)]
        if fault not in FAULTS or not self._claim(number, times):
            return honest
        return FAULTS[fault](honest)

    def _claim(self, number: int, times: int) -> bool:
        """Whether one of the sample's `times` faults is still to be shown."""
        for attempt in range(times):
            try:
                (self._folder / f"{number}-{attempt}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False


def _die(honest: list[Answer]) -> list[Answer]:
    os._exit(3)


def _hang(honest: list[Answer]) -> list[Answer]:
    time.sleep(1000)
    return honest


def _stop(honest: list[Answer]) -> list[Answer]:
    os.kill(os.getpid(), signal.SIGSTOP)
    return honest


def _raise(honest: list[Answer]) -> list[Answer]:
    raise RuntimeError("the model is on fire")


FAULTS = {
    1: _die,
    2: _hang,
    3: _stop,
    4: _raise,
    5: lambda honest: [Answer(float("nan"))] * len(honest),
    6: lambda honest: honest[:-1],
    7: lambda honest: [*honest, Answer(0.5)],
    8: lambda honest: [Answer(1.5)] * len(honest),
    9: lambda honest: [Answer(None, "neither yes nor no")] * len(honest),
    10: lambda honest: None,
}


RATING_FAULTS = {
    21: lambda honest: [Rating(10.5)] * len(honest),
    22: lambda honest: [Rating(float("nan"))] * len(honest),
    23: lambda honest: [Rating(None, "no number")] * len(honest),
    24: lambda honest: honest[:-1],
    25: _raise,
}


class Slow:
    """Takes 20 ms for an answer."""

    def answer(self, image: np.ndarray, questions: list[str]) -> list[Answer]:
        time.sleep(0.02)
        return [Answer(p_yes) for p_yes in truth(image, questions)]


class Environment:
    """Answers 1 to "NAME=VALUE" if the worker's environment has it, else 0; counts modules too."""

    def answer(self, image: np.ndarray, questions: list[str]) -> list[Answer]:
        import sys

        facts = {f"{name}={value}" for name, value in os.environ.items()}
        facts |= {f"pid={os.getpid()}"} | {f"imported {name}" for name in sys.modules}
        return [Answer(float(question in facts)) for question in questions]


def broken() -> Fake:
    raise FileNotFoundError("no weights in /nowhere")


def dies_at_once() -> Fake:
    os._exit(7)


def never_starts() -> Fake:
    time.sleep(1000)
    raise AssertionError("nobody waits for so long")


class Rater(Fake):
    """As `Fake`, and rates; `RATING_FAULTS` says which images it rates wrongly, every time."""

    def rate(self, image: np.ndarray, questions: list[str]) -> list[Rating]:
        fault = int(image[0, 0, 0])
        honest = [Rating(rating) for rating in ratings(image, questions)]
        return RATING_FAULTS[fault](honest) if fault in RATING_FAULTS else honest


def true_scores(images: list[np.ndarray], prompts: list[str]) -> list[float]:
    """What an honest scorer says: any number, here between -300 and 300."""
    pairs = zip(images, prompts, strict=True)
    return [float(image.mean()) - 3.0 * len(prompt) for image, prompt in pairs]


def _raise_score(honest: list[Score]) -> list[Score]:
    raise RuntimeError("the model is on fire")


def _die_scoring(honest: list[Score]) -> list[Score]:
    os._exit(3)


def _hang_scoring(honest: list[Score]) -> list[Score]:
    time.sleep(1000)
    return honest


SCORE_FAULTS = {
    31: lambda honest: [Score(float("nan"))] * len(honest),
    32: lambda honest: [Score(float("-inf"))] * len(honest),
    33: lambda honest: [Score(None, "no text in the image")] * len(honest),
    34: lambda honest: [*honest, Score(1.0)],
    35: lambda honest: [],
    36: lambda honest: None,
    37: _raise_score,
    38: _die_scoring,
    39: _hang_scoring,
}


class Scorer:
    """Scores honestly, unless the red value of the first pixel is one of `SCORE_FAULTS`.

    It then fails every time, or as often as the green value says, as `Fake` does.
    """

    def __init__(self, folder: str) -> None:
        self._fake = Fake(folder)

    def score(self, images: list[np.ndarray], prompts: list[str]) -> list[Score]:
        honest = [Score(value) for value in true_scores(images, prompts)]
        fault, times, number = (int(value) for value in images[0][0, 0])
        if fault in SCORE_FAULTS and (not times or self._fake._claim(number, times)):
            return SCORE_FAULTS[fault](honest)
        return honest


class AnswersAndScores(Scorer):
    """A verifier that scores too."""

    def answer(self, image: np.ndarray, questions: list[str]) -> list[Answer]:
        return self._fake.answer(image, questions)
