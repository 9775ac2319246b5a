"""Riddles: phrases that only imply a color, a shape or a number.

The pretraining data reads each riddle correctly only with a fixed probability, so the correct
reading is latent in the pretrained model and reinforcement learning can bring it out. The image
always agrees with the reading. Pretraining contains all riddles; four of them (`HELDOUT`) occur in
no prompt of the reinforcement stage.
"""

import dataclasses

import numpy as np

from alphagrpo_jax.shapes import scenes, specs

OPTIONS = {
    "color": specs.COLORS,
    "shape": scenes.SHAPES,
    "number": specs.NUMBERS,
}
# Probability of the correct reading -> probability of the riddle's favored wrong reading; the
# remainder is spread evenly over the other readings.
WRONG_PROBABILITY = {0.55: 0.0, 0.40: 0.45, 0.20: 0.60}


@dataclasses.dataclass(frozen=True)
class Riddle:
    """A phrase, its true meaning, and how often pretraining reads it that way.

    Attributes:
      kind: "color", "shape" or "number".
      phrase: wording in prompts: "a ripe banana", "with three sides", "a bicycle has wheels".
      clue: wording in think texts: "a ripe banana", "three sides", "bicycle wheels".
      meaning: the correct reading, one of `OPTIONS[kind]`.
      right: probability of the correct reading in pretraining.
      wrong: the favored wrong reading; None if all wrong readings are equally likely.
    """

    kind: str
    phrase: str
    clue: str
    meaning: str
    right: float
    wrong: str | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """Computes how often pretraining reads each of `OPTIONS[kind]`: float64[options]."""
        options = OPTIONS[self.kind]
        favored = WRONG_PROBABILITY[self.right]
        num_unfavored = len(options) - (1 if self.wrong is None else 2)
        result = np.full(len(options), (1.0 - self.right - favored) / num_unfavored)
        result[options.index(self.meaning)] = self.right
        if self.wrong is not None:
            result[options.index(self.wrong)] = favored
        return result

    def resolution(self, reading: str) -> str:
        """Returns the think text's sentence for a reading: "a ripe banana is yellow"."""
        return f"{self.clue} {'is' if self.kind == 'color' else 'means'} {reading}"


def _color(phrase: str, meaning: str, right: float, wrong: str | None = None) -> Riddle:
    return Riddle("color", phrase, phrase, meaning, right, wrong)


def _shape(phrase: str, clue: str, meaning: str, right: float, wrong: str | None = None) -> Riddle:
    return Riddle("shape", phrase, clue, meaning, right, wrong)


def _number(owner: str, noun: str, meaning: str, right: float, wrong: str | None = None) -> Riddle:
    phrase = f"{owner} has {noun}"
    return Riddle("number", phrase, f"{owner.split(' ', 1)[1]} {noun}", meaning, right, wrong)


RIDDLES = (
    _color("a ripe tomato", "red", 0.55),
    _color("a fire engine", "red", 0.40, "yellow"),
    _color("a stop sign", "red", 0.20, "orange"),
    _color("fresh grass", "green", 0.55),
    _color("a frog", "green", 0.40, "orange"),
    _color("a clear sky", "blue", 0.55),
    _color("the deep sea", "blue", 0.20, "green"),
    _color("a ripe banana", "yellow", 0.40, "green"),
    _color("a lemon", "yellow", 0.55),
    _color("a sunflower", "yellow", 0.20, "red"),
    _color("a ripe plum", "purple", 0.40, "red"),
    _color("lavender", "purple", 0.20, "blue"),
    _color("a carrot", "orange", 0.55),
    _color("a pumpkin", "orange", 0.40, "purple"),
    _shape("like a full moon", "a full moon", "circle", 0.55),
    _shape("like a coin", "a coin", "circle", 0.40, "square"),
    _shape("without any corners", "no corners", "circle", 0.20, "triangle"),
    _shape("with four equal sides", "four equal sides", "square", 0.55),
    _shape("like a chess board", "a chess board", "square", 0.40, "cross"),
    _shape("like a window", "a window", "square", 0.20, "circle"),
    _shape("with three sides", "three sides", "triangle", 0.55),
    _shape("like a slice of pizza", "a slice of pizza", "triangle", 0.40, "circle"),
    _shape("like a tent", "a tent", "triangle", 0.20, "square"),
    _shape("like a plus sign", "a plus sign", "cross", 0.55),
    _shape("like a road junction", "a road junction", "cross", 0.40, "triangle"),
    _shape("like a hospital sign", "a hospital sign", "cross", 0.20, "circle"),
    _number("a unicorn", "horns", "one", 0.55),
    _number("the earth", "moons", "one", 0.40, "two"),
    _number("a bicycle", "wheels", "two", 0.55),
    _number("a bird", "wings", "two", 0.40, "three"),
    _number("a person", "eyes", "two", 0.20, "one"),
    _number("a tricycle", "wheels", "three", 0.55),
    _number("a clover", "leaves", "three", 0.40, "one"),
    _number("a traffic light", "lamps", "three", 0.20, "two"),
)
HELDOUT = tuple(
    riddle
    for riddle in RIDDLES
    if riddle.clue in ("a frog", "lavender", "a coin", "tricycle wheels")
)
TRAINED = tuple(riddle for riddle in RIDDLES if riddle not in HELDOUT)
BY_CLUE = {riddle.clue: riddle for riddle in RIDDLES}


def sample_reading(riddle: Riddle, rng: np.random.Generator) -> str:
    """Samples a reading of the riddle by its pretraining probabilities."""
    edges = np.cumsum(riddle.probabilities)
    return OPTIONS[riddle.kind][int(np.searchsorted(edges, rng.random() * edges[-1], "right"))]
