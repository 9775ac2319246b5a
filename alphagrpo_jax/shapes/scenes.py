"""Scenes of one to three flat shapes on a 3x3 grid, and their exact renderer.

Conventions: images are uint8[H, W, 3] RGB; `row` 0 is the top, `col` 0 the left; jitter is in
pixels of a 48-pixel image, +x to the right and +y downwards.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESOLUTION = 48  # pixels per side
GRID = 3  # cells per side, 16 px each
MAX_THINGS = 3
RADIUS = 6.0  # half the side of a shape's bounding box, pixels
MAX_JITTER = 1.5  # pixels

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 35, 35),
    "green": (30, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 220, 30),
    "purple": (150, 50, 180),
    "orange": (255, 135, 10),
}
BACKGROUNDS = {"white": (248, 248, 248), "black": (12, 12, 12), "gray": (150, 150, 150)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape: what it is, its grid cell, and its offset from the cell's centre in pixels."""

    shape: str
    color: str
    row: int
    col: int
    dx: float = 0.0
    dy: float = 0.0

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the shape's centre in pixels of a 48-pixel image."""
        cell = RESOLUTION / GRID
        return (self.col + 0.5) * cell + self.dx, (self.row + 0.5) * cell + self.dy


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and the shapes on it, at most one per cell."""

    things: tuple[Thing, ...]
    background: str


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float = RADIUS) -> np.ndarray:
    """Boolean mask of the points (x, y), relative to the shape's centre, that lie inside it.

    Args:
      shape: one of `SHAPES`.
      x, y: float arrays of one shape, pixels from the centre.
      radius: half the side of the bounding box, pixels.
    Raises:
      ValueError: unknown shape.
    """
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        side = 0.9 * radius
        return (np.abs(x) <= side) & (np.abs(y) <= side)
    if shape == "triangle":  # apex at the top, base at the bottom
        return (y <= radius) & (y >= -radius) & (np.abs(x) <= (y + radius) / 2)
    if shape == "cross":
        arm = radius / 3
        inside = (np.abs(x) <= radius) & (np.abs(y) <= radius)
        return inside & ((np.abs(x) <= arm) | (np.abs(y) <= arm))
    raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")


def alphas(scene: Scene, *, resolution: int = RESOLUTION, supersample: int = 4) -> np.ndarray:
    """Anti-aliased mask of every shape of a scene: float64[shapes, resolution, resolution].

    Args:
      scene: what to draw.
      resolution: side of the image in pixels.
      supersample: sample points per pixel and axis.
    """
    scale = resolution / RESOLUTION
    points = (np.arange(resolution * supersample) + 0.5) / (supersample * scale)
    result = np.zeros((len(scene.things), resolution, resolution))
    for alpha, thing in zip(result, scene.things, strict=True):
        # Only the pixels of the shape's bounding box can be inside it.
        (left, right), (top, bottom) = (
            (max(0, int((c - RADIUS) * scale)), min(resolution, int((c + RADIUS) * scale) + 1))
            for c in thing.center
        )
        x = points[left * supersample : right * supersample] - thing.center[0]
        y = points[top * supersample : bottom * supersample] - thing.center[1]
        inside = coverage(thing.shape, x[None, :], y[:, None])
        blocks = inside.reshape(bottom - top, supersample, right - left, supersample)
        alpha[top:bottom, left:right] = blocks.mean((1, 3))
    return result


def render(scene: Scene, *, resolution: int = RESOLUTION, supersample: int = 4) -> np.ndarray:
    """Draws a scene with anti-aliased edges.

    Args:
      scene: what to draw.
      resolution: side of the image in pixels.
      supersample: sample points per pixel and axis.
    Returns:
      uint8[resolution, resolution, 3].
    """
    image = np.full((resolution, resolution, 3), BACKGROUNDS[scene.background], np.float64)
    masks = alphas(scene, resolution=resolution, supersample=supersample)
    for alpha, thing in zip(masks, scene.things, strict=True):
        image += alpha[..., None] * (np.asarray(COLORS[thing.color], np.float64) - image)
    return np.round(image).astype(np.uint8)


def place(rng: np.random.Generator, kinds: Sequence[tuple[str, str]], background: str) -> Scene:
    """Puts (shape, colour) pairs into distinct random cells with random jitter."""
    cells = rng.permutation(GRID * GRID)[: len(kinds)]
    jitter = rng.uniform(-MAX_JITTER, MAX_JITTER, (len(kinds), 2))
    things = tuple(
        Thing(shape, color, int(cell) // GRID, int(cell) % GRID, float(dx), float(dy))
        for (shape, color), cell, (dx, dy) in zip(kinds, cells, jitter, strict=True)
    )
    return Scene(things, background)


def random_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A scene of `count` (default: one to three, uniformly) independent random shapes."""
    count = int(rng.integers(1, MAX_THINGS + 1)) if count is None else count
    kinds = [(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))) for _ in range(count)]
    return place(rng, kinds, str(rng.choice(list(BACKGROUNDS))))
