"""A Python function or class of the user's as a scorer."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import Score, VerifierLoadError


class FunctionScorer:
    """A `base.Scorer` over a function `(images, prompts) -> scores`, or over a class with `score`.

    A score is a number, `base.Score`, or None where there is none.
    """

    def __init__(self, target: str) -> None:
        """Imports the function, or makes an object of the class, without arguments.

        Args:
          target: "module:name".
        Raises:
          VerifierLoadError: no such module or name, or what it names cannot score.
        """
        module, _, name = target.partition(":")
        try:
            named = vars(importlib.import_module(module)).get(name)
        except ModuleNotFoundError as error:
            raise VerifierLoadError(
                f"scorer callable:{target}: {error}; start the program in the folder of the "
                "module, or install it"
            ) from error
        scorer = named() if inspect.isclass(named) else named
        score = getattr(scorer, "score", None) if inspect.isclass(named) else scorer
        if not callable(score):
            raise VerifierLoadError(
                f"scorer callable:{target}: got {named!r}, expected a function of images and "
                "prompts, or a class with a method score of the two"
            )
        self._target = target
        self._score: Callable[[list[np.ndarray], list[str]], Any] = score

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Scores each image by its prompt; see `base.Scorer`.

        Raises:
          TypeError: what the function returns is no list of numbers.
        """
        scores = self._score(list(images), list(prompts))
        if isinstance(scores, str) or not hasattr(scores, "__len__"):
            raise TypeError(
                f"callable:{self._target} returned {scores!r}, expected a list of "
                f"{len(images)} numbers"
            )
        return [_as_score(score) for score in scores]


def _as_score(score: Any) -> Score:
    """Converts a number, or None, to a score."""
    if isinstance(score, Score):
        return score
    return Score(None, "the scorer gave no score") if score is None else Score(float(score))
