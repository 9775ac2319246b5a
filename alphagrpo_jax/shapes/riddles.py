"""Riddles: phrases that only imply a colour, a shape or a number.

In the pretraining data each riddle is read rightly with its own fixed probability only, so that
the right reading is latent in the pretrained model and can be brought out by reinforcement. The
image always agrees with the reading. Four riddles are kept out of all prompts of the
reinforcement stage (`HELDOUT`); they occur in pretraining.
"""

import dataclasses

import numpy as np

from alphagrpo_jax.shapes import scenes, specs

OPTIONS = {
    "color": specs.COLORS,
    "shape": scenes.SHAPES,
    "number": specs.NUMBERS,
}
# Probability of the right reading -> probability of the riddle's fixed wrong reading; whatever
# remains is spread evenly over the other readings.
WRONG_PROBABILITY = {0.55: 0.0, 0.40: 0.45, 0.20: 0.60}


@dataclasses.dataclass(frozen=True)
class Riddle:
    """A phrase, what it truly means, and how often pretraining reads it so.

    Attributes:
      kind: "color", "shape" or "number".
      phrase: as the prompt says it: "a ripe banana", "with three sides", "a bicycle has wheels".
      clue: as the think text repeats it: "a ripe banana", "three sides", "bicycle wheels".
      meaning: the truth, one of `OPTIONS[kind]`.
      right: probability of the right reading in pretraining.
      wrong: the favoured wrong reading; None if the others are all alike.
    """

    kind: str
    phrase: str
    clue: str
    meaning: str
    right: float
    wrong: str | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """float64[options]: how often pretraining reads each of `OPTIONS[kind]`."""
        options = OPTIONS[self.kind]
        favoured = WRONG_PROBABILITY[self.right]
        others = len(options) - (1 if self.wrong is None else 2)
        result = np.full(len(options), (1.0 - self.right - favoured) / others)
        result[options.index(self.meaning)] = self.right
        if self.wrong is not None:
            result[options.index(self.wrong)] = favoured
        return result

    def resolution(self, reading: str) -> str:
        """The think text's sentence for a reading: "a ripe banana is yellow"."""
        return f"{self.clue} {'is' if self.kind == 'color' else 'means'} {reading}"


def _color(thing: str, meaning: str, right: float, wrong: str | None = None) -> Riddle:
    return Riddle("color", thing, thing, meaning, right, wrong)


def _shape(phrase: str, clue: str, meaning: str, right: float, wrong: str | None = None) -> Riddle:
    return Riddle("shape", phrase, clue, meaning, right, wrong)


def _number(owner: str, parts: str, meaning: str, right: float, wrong: str | None = None) -> Riddle:
    phrase = f"{owner} has {parts}"
    return Riddle("number", phrase, f"{owner.split(' ', 1)[1]} {parts}", meaning, right, wrong)


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


def draw_reading(riddle: Riddle, rng: np.random.Generator) -> str:
    """A reading of the riddle as pretraining draws it: right, or wrong, by its probabilities."""
    edges = np.cumsum(riddle.probabilities)
    return OPTIONS[riddle.kind][int(np.searchsorted(edges, rng.random() * edges[-1], "right"))]
