"""The exact checker of the shapes world as a scorer, for ablations: a verifier that never errs."""

import json
from collections.abc import Sequence

import numpy as np

from alphagrpo_jax.rewards.verifiers.base import Score
from alphagrpo_jax.runtime.errors import UserError
from alphagrpo_jax.shapes import checker
from alphagrpo_jax.shapes.specs import Spec

NO_FACTS = 'the record has no "facts", which the exact checker needs'


class ExactScorer:
    """A `base.Scorer` that gives the share of a record's facts that hold in the image."""

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Score]:
        """Scores each image uint8[H, W, 3] by a record's facts, as JSON, in [0, 1]."""
        return [_score(image, text) for image, text in zip(images, prompts, strict=True)]


def _score(image: np.ndarray, text: str) -> Score:
    """Scores one image; records without facts, or with others than the checker reads, fail."""
    if not text:
        return Score(None, NO_FACTS, permanent=True)
    try:
        spec = Spec.from_json(json.loads(text))
    except UserError as error:
        return Score(None, f"the exact checker cannot read the facts: {error}", permanent=True)
    try:
        facts = checker.facts(image, spec)
    except UserError as error:  # another image may be readable
        return Score(None, f"the exact checker cannot read the image: {error}")
    return Score(float(np.mean(list(facts.values()))))
