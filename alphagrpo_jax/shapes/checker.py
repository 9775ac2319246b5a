"""The exact checker: what an image shows and which facts of a spec hold, from pixels alone.

No model and no reward: it is the yardstick that training does not see. Steps: name the
background; find the pixels that are at least half some colour of the palette; cut them into
connected pieces of one colour; compare each piece with smoothed templates of the four shapes.
A piece that resembles none closely, or is of no known colour, is unknown and spoils the image; so
does an area that the background and the palette do not explain, or explain by a faint colour only.

    python -m alphagrpo_jax.shapes.checker      measures it on renders, clean and imperfect
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage

from alphagrpo_jax.shapes import corrupt, scenes, specs
from alphagrpo_jax.shapes.specs import BACKGROUNDS, COLORS, Spec

SMOOTHING = 0.85  # pixels, of the image and of the sharpest templates
TEMPLATE_SMOOTHING = (0.85, 1.25, 1.8)  # pixels, for sharp and for blurred pictures
FULL_QUANTILE = 0.9  # of a mask's inner values, which counts as the full colour
MIN_FULL = 0.7  # share of its colour that a piece reaches at least
MIN_PIECE = 12  # pixels; smaller pieces are noise
MIN_BACKGROUND = 0.3  # share of the image that the background covers at least
BACKGROUND_DISTANCE = 60.0  # RGB distance within which a pixel belongs to a background
COLOR_DISTANCE = 70.0  # RGB distance within which a piece's core is of a palette colour
MIN_OVERLAP = 0.82  # soft IoU with the best template, below which a piece is unknown
MIN_SECOND = 0.15  # share of a piece that another colour needs to be a piece of its own
LONGEST = 15  # pixels; a longer piece may be two shapes that touch
FAINT = 0.2  # share of its colour above which a pixel is no longer background
SOLID = 0.5  # share of its colour above which a pixel belongs to a piece
MAX_RESIDUAL = 45.0  # RGB distance from the best mixture, above which a pixel is foreign
MIN_FOREIGN = 9  # foreign pixels off their areas' rims that spoil an image

PATCH = 20  # pixels per side of the window in which templates are compared
SCALES = (0.92, 1.0, 1.08)
FINE = 8  # positions per pixel at which templates are compared
REACH = 2 * FINE  # positions that a template moves each way at most

_COLOR_TABLE = np.array([scenes.COLORS[name] for name in COLORS], np.float64)
_BACKGROUND_TABLE = np.array([scenes.BACKGROUNDS[name] for name in BACKGROUNDS], np.float64)
_ALL_NEIGHBOURS = np.ones((3, 3), bool)


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What an image shows.

    Attributes:
      objects: the shapes recognised, with cell and offset.
      background: its name, or None if it is of no known colour.
      unknown: number of pieces that are no known shape of a known colour; foreign areas that are
        no pieces (see `_foreign`) count as one.
    """

    objects: tuple[scenes.Thing, ...]
    background: str | None
    unknown: int


@dataclasses.dataclass(frozen=True)
class Templates:
    """Smoothed masks of all shapes, scales and degrees of blur, finely sampled.

    fine[n, i :: FINE, j :: FINE] are the pixels of template n moved by (REACH - i, REACH - j)
    fine positions; `centroid` is that of the template at rest, from its window's corner.
    """

    shapes: tuple[str, ...]
    fine: np.ndarray  # float32[templates, (PATCH + 4) * FINE, same]
    centroid: np.ndarray  # float64[templates, 2], (y, x) in pixels


@functools.cache
def _templates() -> Templates:
    size = PATCH * FINE + 2 * REACH
    points = (np.arange(size) + 0.5 - size / 2) / FINE
    shapes, masks = [], []
    for shape in scenes.SHAPES:
        for scale in SCALES:
            radius = scenes.RADIUS * scale
            inside = scenes.coverage(shape, points[None, :], points[:, None], radius)
            for sigma in TEMPLATE_SMOOTHING:
                mask = ndimage.gaussian_filter(inside.astype(np.float32), sigma * FINE)
                # Entry k averages entries k .. k + FINE - 1: one pixel.
                mask = ndimage.uniform_filter(mask, FINE, origin=-(FINE // 2))
                masks.append(_normalised(mask))
                shapes.append(shape)
    fine = np.array(masks, np.float32)
    rest = fine[:, REACH : REACH + PATCH * FINE : FINE, REACH : REACH + PATCH * FINE : FINE]
    return Templates(tuple(shapes), fine, np.stack([_centroid(mask) for mask in rest]))


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A mask scaled so that its strongest pixels are 1: blurred thin parts do not reach it."""
    full = float(np.quantile(mask[mask > 0.5 * mask.max()], FULL_QUANTILE))
    return np.minimum(mask / max(full, MIN_FULL), 1.0)


def _centroid(mask: np.ndarray) -> np.ndarray:
    """(y, x) of the centre of gravity, in pixels from the corner of a square mask."""
    points = np.arange(len(mask)) + 0.5
    return np.array([mask.sum(1) @ points, mask.sum(0) @ points]) / max(mask.sum(), 1e-9)


def _background(image: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Name (None if unknown) and RGB colour of the background of a smoothed image."""
    distance = np.linalg.norm(image[:, :, None] - _BACKGROUND_TABLE, axis=-1)
    near = distance < BACKGROUND_DISTANCE
    best = int(near.sum((0, 1)).argmax())
    if near[..., best].mean() < MIN_BACKGROUND:
        return None, np.median(image.reshape(-1, 3), 0)
    return BACKGROUNDS[best], np.median(image[near[..., best]], 0)


def _palette(image: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explains each pixel as a mixture of the background and one palette colour.

    Returns:
      colour: int[H, W] index of the colour whose mixture fits best; alpha: float[H, W, colours]
      share of each colour in its mixture, in [0, 1].
    """
    directions = _COLOR_TABLE - background
    offset = image - background
    squared = (directions**2).sum(-1)
    alpha = np.clip(offset @ directions.T / squared, 0.0, 1.0)
    dots = offset @ directions.T
    # |offset - alpha d|^2 without the pixel's own |offset|^2, which does not change the choice.
    residual = alpha * alpha * squared - 2.0 * alpha * dots
    return residual.argmin(-1), alpha


def _foreign(
    image: np.ndarray, background: np.ndarray, color: np.ndarray, share: np.ndarray
) -> bool:
    """Whether there are areas of a strange colour, or of a faint one of the palette.

    The rims of shapes are both, but thin: erosion takes them away.

    Args:
      image: float64[H, W, 3], smoothed.
      background: float64[3].
      color: int[H, W], see `_palette`.
      share: float[H, W] of that colour in its mixture.
    """
    explained = background + share[..., None] * (_COLOR_TABLE[color] - background)
    strange = np.linalg.norm(image - explained, axis=-1) > MAX_RESIDUAL
    faint = (share > FAINT) & (share <= SOLID)
    areas = ndimage.binary_erosion(strange | faint, _ALL_NEIGHBOURS)
    return int(areas.sum()) >= MIN_FOREIGN


def _pieces(color: np.ndarray, solid: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Connected pieces of one colour: (mask bool[H, W], colour index)."""
    labels, count = ndimage.label(solid, _ALL_NEIGHBOURS)
    result = []
    for label in range(1, count + 1):
        mask = labels == label
        size = int(mask.sum())
        if size < MIN_PIECE:
            continue
        shares = np.bincount(color[mask], minlength=len(COLORS))
        found = np.flatnonzero(shares >= max(MIN_PIECE, MIN_SECOND * size))
        if len(found) <= 1:
            result.append((mask, int(shares.argmax())))
            continue
        for index in found:
            part, parts = ndimage.label(mask & (color == index), _ALL_NEIGHBOURS)
            sizes = np.bincount(part.ravel(), minlength=parts + 1)
            big = [i for i in range(1, parts + 1) if sizes[i] >= MIN_PIECE]
            result += [(part == i, int(index)) for i in big]
    return result


def _window(values: np.ndarray, top: int, left: int) -> np.ndarray:
    """values[top : top + PATCH, left : left + PATCH] with zeros outside the image."""
    result = np.zeros((PATCH, PATCH), np.float32)
    rows, cols = values.shape
    y0, y1 = max(top, 0), min(top + PATCH, rows)
    x0, x1 = max(left, 0), min(left + PATCH, cols)
    result[y0 - top : y1 - top, x0 - left : x1 - left] = values[y0:y1, x0:x1]
    return result


def _match(alpha: np.ndarray, mask: np.ndarray) -> tuple[str, float, float, float]:
    """The template most like a piece: (shape, centre x, centre y, overlap)."""
    rows, cols = np.nonzero(mask)
    # Windows centre on the middle of the bounding box, which the search then refines.
    left = round((cols.min() + cols.max() + 1) / 2 - PATCH / 2)
    top = round((rows.min() + rows.max() + 1) / 2 - PATCH / 2)
    near = ndimage.binary_dilation(mask, _ALL_NEIGHBOURS, iterations=2)
    seen = _normalised(_window(np.where(near, alpha, 0.0), top, left))
    templates = _templates()
    moves = np.rint((_centroid(seen) - templates.centroid) * FINE).astype(int)
    moves = np.clip(moves, -REACH, REACH)
    extent = PATCH * FINE
    table = np.stack(
        [
            fine[REACH - dy : REACH - dy + extent : FINE, REACH - dx : REACH - dx + extent : FINE]
            for fine, (dy, dx) in zip(templates.fine, moves, strict=True)
        ]
    )
    overlap = np.minimum(table, seen).sum((1, 2)) / np.maximum(table, seen).sum((1, 2))
    best = int(overlap.argmax())
    dy, dx = moves[best] / FINE
    half = PATCH / 2
    return templates.shapes[best], left + half + dx, top + half + dy, float(overlap[best])


def _thing(shape: str, color: str, x: float, y: float) -> scenes.Thing:
    cell = scenes.RESOLUTION / scenes.GRID
    row, col = (min(max(int(v // cell), 0), scenes.GRID - 1) for v in (y, x))
    return scenes.Thing(shape, color, row, col, x - (col + 0.5) * cell, y - (row + 0.5) * cell)


def _split(mask: np.ndarray) -> list[np.ndarray]:
    """Cuts a long piece along the grid's lines; a piece within one shape's length stays whole."""
    rows, cols = np.nonzero(mask)
    if max(np.ptp(rows), np.ptp(cols)) + 1 <= LONGEST:
        return [mask]
    cell = scenes.RESOLUTION // scenes.GRID
    parts = []
    for cell_index in np.unique(rows // cell * scenes.GRID + cols // cell):
        part = np.zeros_like(mask)
        row, col = divmod(int(cell_index), scenes.GRID)
        area = np.s_[row * cell : (row + 1) * cell, col * cell : (col + 1) * cell]
        part[area] = mask[area]
        if part.sum() >= MIN_PIECE:
            parts.append(part)
    return parts


def _recognise(
    image: np.ndarray, alpha: np.ndarray, mask: np.ndarray, color: int
) -> list[scenes.Thing | None]:
    """The shapes that a piece consists of; None for a part that is no known shape."""
    core = ndimage.binary_erosion(mask, _ALL_NEIGHBOURS)
    value = np.median(image[core if core.sum() >= 4 else mask], 0)
    if np.linalg.norm(value - _COLOR_TABLE[color]) > COLOR_DISTANCE:
        return [None]
    found: list[scenes.Thing | None] = []
    for part in _split(mask):
        shape, x, y, overlap = _match(alpha[..., color], part)
        found.append(_thing(shape, COLORS[color], x, y) if overlap >= MIN_OVERLAP else None)
    return found


def parse(image: np.ndarray) -> Parsed:
    """Reads a picture.

    Args:
      image: uint8[48, 48, 3].
    Raises:
      ValueError: another shape or type.
    """
    side = scenes.RESOLUTION
    if image.shape != (side, side, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"got an image {image.dtype}{list(image.shape)}, expected uint8[{side}, {side}, 3]"
        )
    sigma = (SMOOTHING, SMOOTHING, 0)
    smooth = ndimage.gaussian_filter(image.astype(np.float64), sigma, mode="nearest")
    name, background = _background(smooth)
    color, alpha = _palette(smooth, background)
    share = np.take_along_axis(alpha, color[..., None], -1)[..., 0]
    found = [
        thing
        for mask, index in _pieces(color, share > SOLID)
        for thing in _recognise(smooth, alpha, mask, index)
    ]
    objects = tuple(thing for thing in found if thing is not None)
    unknown = len(found) - len(objects) + _foreign(smooth, background, color, share)
    return Parsed(objects, name, unknown)


def facts(image: np.ndarray, spec: Spec | Mapping) -> dict[str, bool]:
    """Which facts of a spec hold in an image.

    Args:
      image: uint8[48, 48, 3].
      spec: a `Spec` or its JSON form, as records carry it under "facts".
    Returns:
      The facts of `specs.facts`, and "well_formed": nothing in the image is unknown.
    """
    spec = spec if isinstance(spec, Spec) else Spec.from_json(spec)
    seen = parse(image)
    result = specs.facts(spec, seen.objects, seen.background)
    result["well_formed"] = seen.unknown == 0 and seen.background is not None
    return result


def exact_all(image: np.ndarray, spec: Spec | Mapping) -> bool:
    """Whether every fact of a spec holds in an image, uint8[48, 48, 3]."""
    return all(facts(image, spec).values())


def same(image: np.ndarray, scene: scenes.Scene) -> bool:
    """Whether an image, uint8[48, 48, 3], shows just this scene.

    Every shape must be in its cell, wherever in it, and nothing else be there.
    """
    seen = parse(image)
    found, wanted = (
        sorted((thing.shape, thing.color, thing.row, thing.col) for thing in things)
        for things in (seen.objects, scene.things)
    )
    return seen.unknown == 0 and seen.background == scene.background and found == wanted


def measure(images: int, seed: int) -> dict[str, float]:
    """Share of renders that pass: of random scenes, whole, imperfect and spoilt in one fact.

    Args:
      images: renders per row.
      seed: of the scenes and of the damage.
    Returns:
      row -> share found exactly right; of the rows "erase", "warp" and "one fact wrong" none
      should be.
    """
    rows: dict[str, Callable[[scenes.Scene, np.random.Generator], np.ndarray]] = {
        "clean": lambda scene, rng: scenes.render(scene),
        "noise 0.1": lambda scene, rng: corrupt.noise(scenes.render(scene), rng, 0.1),
        "blur 0.7 px": lambda scene, rng: corrupt.blur(scenes.render(scene), 0.7),
        "blur 1 px": lambda scene, rng: corrupt.blur(scenes.render(scene), 1.0),
        "jpeg 60": lambda scene, rng: corrupt.jpeg(scenes.render(scene), 60),
        "resampled at 24 px": lambda scene, rng: corrupt.soft(scenes.render(scene), 24),
        "erase": lambda scene, rng: corrupt.corrupt(scene, rng, "erase").image,
        "warp": lambda scene, rng: corrupt.corrupt(scene, rng, "warp").image,
        "one fact wrong": lambda scene, rng: scenes.render(_spoilt(scene, rng)),
    }
    result = {}
    for name, draw in rows.items():
        rng = np.random.default_rng(seed)
        passed = 0
        for _ in range(images):
            scene = scenes.random_scene(rng)
            wanted = dataclasses.replace(specs.describe(scene), background=scene.background)
            passed += exact_all(draw(scene, rng), wanted)
        result[name] = passed / images
    return result


def _spoilt(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """The scene with another background, or one shape's colour or form changed, or one missing."""
    index, things = int(rng.integers(len(scene.things))), list(scene.things)
    fact = specs.pick(rng, ("background", "color", "shape", "missing"))
    if fact == "missing":
        del things[index]
        return dataclasses.replace(scene, things=tuple(things))
    options = {"background": BACKGROUNDS, "color": COLORS, "shape": scenes.SHAPES}[fact]
    held = scene if fact == "background" else things[index]
    wrong = specs.pick(rng, [option for option in options if option != getattr(held, fact)])
    if fact == "background":
        return dataclasses.replace(scene, background=wrong)
    things[index] = dataclasses.replace(things[index], **{fact: wrong})
    return dataclasses.replace(scene, things=tuple(things))


def main() -> None:
    """Writes the table of `measure` to standard output."""
    parser = argparse.ArgumentParser(description="Measures the exact checker on renders.")
    parser.add_argument("--images", type=int, default=500, help="renders per row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, share in measure(arguments.images, arguments.seed).items():
        sys.stdout.write(f"{name:20s} {share:.3f}\n")


if __name__ == "__main__":
    main()
