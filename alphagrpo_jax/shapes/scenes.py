"""Scenes of one to three flat shapes on a 3x3 grid, and their exact renderer.

Conventions: images are uint8[H, W, 3] RGB; `row` 0 is the top, `col` 0 the left; jitter is in
pixels of a 48-pixel image, +x to the right and +y downwards.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

RESOLUTION = 48  # pixels per side
GRID = 3  # cells per side, 16 px each
MAX_OBJECTS = 3
RADIUS = 6.0  # half the side of an object's bounding box, pixels
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
class SceneObject:
    """One object: its shape, color, grid cell, and offset from the cell's center in pixels."""

    shape: str
    color: str
    row: int
    col: int
    dx: float = 0.0
    dy: float = 0.0

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the object's center in pixels of a 48-pixel image."""
        cell = RESOLUTION / GRID
        return (self.col + 0.5) * cell + self.dx, (self.row + 0.5) * cell + self.dy


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and the objects on it, at most one per cell."""

    objects: tuple[SceneObject, ...]
    background: str


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float = RADIUS) -> np.ndarray:
    """Computes the mask of the points (x, y), relative to the center, that lie inside a shape.

    Args:
      shape: one of `SHAPES`.
      x, y: float arrays that broadcast against each other, pixels from the center.
      radius: half the side of the bounding box, pixels.
    Returns:
      Boolean array of the broadcast shape of x and y.
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


def object_masks(scene: Scene, *, resolution: int = RESOLUTION, supersample: int = 4) -> np.ndarray:
    """Computes the anti-aliased mask of every object: float64[objects, resolution, resolution].

    Args:
      scene: the scene to render.
      resolution: side of the image in pixels.
      supersample: sample points per pixel and axis.
    """
    scale = resolution / RESOLUTION
    points = (np.arange(resolution * supersample) + 0.5) / (supersample * scale)
    masks = np.zeros((len(scene.objects), resolution, resolution))
    for mask, obj in zip(masks, scene.objects, strict=True):
        # Only the pixels of the object's bounding box can be inside it.
        (left, right), (top, bottom) = (
            (max(0, int((c - RADIUS) * scale)), min(resolution, int((c + RADIUS) * scale) + 1))
            for c in obj.center
        )
        x = points[left * supersample : right * supersample] - obj.center[0]
        y = points[top * supersample : bottom * supersample] - obj.center[1]
        inside = coverage(obj.shape, x[None, :], y[:, None])
        blocks = inside.reshape(bottom - top, supersample, right - left, supersample)
        mask[top:bottom, left:right] = blocks.mean((1, 3))
    return masks


def render(scene: Scene, *, resolution: int = RESOLUTION, supersample: int = 4) -> np.ndarray:
    """Renders a scene with anti-aliased edges.

    Args:
      scene: the scene to render; later objects cover earlier ones.
      resolution: side of the image in pixels.
      supersample: sample points per pixel and axis.
    Returns:
      uint8[resolution, resolution, 3].
    """
    image = np.full((resolution, resolution, 3), BACKGROUNDS[scene.background], np.float64)
    masks = object_masks(scene, resolution=resolution, supersample=supersample)
    for mask, obj in zip(masks, scene.objects, strict=True):
        image += mask[..., None] * (np.asarray(COLORS[obj.color], np.float64) - image)
    return np.round(image).astype(np.uint8)


def place_objects(
    rng: np.random.Generator, kinds: Sequence[tuple[str, str]], background: str
) -> Scene:
    """Puts (shape, color) pairs into distinct random cells with random jitter."""
    cells = rng.permutation(GRID * GRID)[: len(kinds)]
    jitter = rng.uniform(-MAX_JITTER, MAX_JITTER, (len(kinds), 2))
    objects = tuple(
        SceneObject(shape, color, int(cell) // GRID, int(cell) % GRID, float(dx), float(dy))
        for (shape, color), cell, (dx, dy) in zip(kinds, cells, jitter, strict=True)
    )
    return Scene(objects, background)


def random_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """Samples a scene of `count` (default: one to three, uniformly) independent random objects."""
    count = int(rng.integers(1, MAX_OBJECTS + 1)) if count is None else count
    kinds = [(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS)))) for _ in range(count)]
    return place_objects(rng, kinds, str(rng.choice(list(BACKGROUNDS))))
