"""The exact checker: parses an image and decides which facts of a spec hold, from pixels alone.

It uses no model, and training never sees its verdicts. Steps: name the background; find the pixels
whose share of some palette color is above one half; cut them into connected pieces of one color;
compare each piece with smoothed templates of the four shapes. A piece that resembles no shape
closely, or has no known color, is unknown and spoils the image; so does an area that background
and palette do not explain, or explain by a faint color only.

    python -m alphagrpo_jax.shapes.checker      measures it on renders, clean and imperfect
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from scipy import ndimage

from alphagrpo_jax.runtime import cli
from alphagrpo_jax.runtime.errors import InputError
from alphagrpo_jax.shapes import corrupt, scenes, specs
from alphagrpo_jax.shapes.specs import BACKGROUNDS, COLORS, Spec

# Identifies the rules of judgement. Studies store it beside their kept verdicts and refuse verdicts
# of other rules. Change it whenever `facts` may decide an image differently; it must not change
# with names and comments. (Its value is the digest of the sources that the rules were written in.)
RULES = "fb4249d42130466bf2c51eecca2a5b55870b10ff9f4ee00d40cd273be92b9f2a"

SMOOTHING = 0.85  # pixels, of the image and of the sharpest templates
TEMPLATE_SMOOTHING = (0.85, 1.25, 1.8)  # pixels, for sharp and for blurred images
FULL_QUANTILE = 0.9  # of a mask's inner values, which counts as the full color
MIN_FULL = 0.7  # minimum of that quantile
MIN_PIECE = 12  # pixels; smaller pieces are noise
MIN_BACKGROUND = 0.3  # minimum share of the image that the background covers
BACKGROUND_DISTANCE = 60.0  # RGB distance within which a pixel belongs to a background
COLOR_DISTANCE = 70.0  # RGB distance within which a piece's core has a palette color
MIN_OVERLAP = 0.82  # soft IoU with the best template, below which a piece is unknown
MIN_SECOND = 0.15  # share of a piece that a second color needs to become a separate piece
LONGEST = 15  # pixels; a longer piece may be two touching objects
FAINT = 0.2  # share of its color above which a pixel is no longer background
SOLID = 0.5  # share of its color above which a pixel belongs to a piece
MAX_RESIDUAL = 45.0  # RGB distance from the best mixture, above which a pixel is foreign
MIN_FOREIGN = 9  # foreign pixels inside their areas' rims that spoil an image

PATCH = 20  # pixels per side of the window in which templates are compared
SCALES = (0.92, 1.0, 1.08)
FINE = 8  # positions per pixel at which templates are compared
REACH = 2 * FINE  # positions that a template moves each way at most

_COLOR_TABLE = np.array([scenes.COLORS[name] for name in COLORS], np.float64)
_BACKGROUND_TABLE = np.array([scenes.BACKGROUNDS[name] for name in BACKGROUNDS], np.float64)
_ALL_NEIGHBORS = np.ones((3, 3), bool)


@dataclasses.dataclass(frozen=True)
class ParsedImage:
    """Content of an image.

    Attributes:
      objects: the recognized objects, with cell and offset.
      background: its name, or None if it has no known color.
      unknown: number of pieces that are no known shape of a known color; foreign areas that are
        no pieces (see `_has_foreign`) count as one.
    """

    objects: tuple[scenes.SceneObject, ...]
    background: str | None
    unknown: int


@dataclasses.dataclass(frozen=True)
class Templates:
    """Smoothed masks of all shapes, scales and degrees of blur, finely sampled.

    fine[n, i :: FINE, j :: FINE] are the pixels of template n shifted by (REACH - i, REACH - j)
    fine positions; `centroid` is the unshifted template's, from the corner of its window.
    """

    shapes: tuple[str, ...]
    fine: np.ndarray  # float32[templates, (PATCH + 4) * FINE, (PATCH + 4) * FINE]
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
                masks.append(_normalized(mask))
                shapes.append(shape)
    fine = np.array(masks, np.float32)
    unshifted = fine[:, REACH : REACH + PATCH * FINE : FINE, REACH : REACH + PATCH * FINE : FINE]
    return Templates(tuple(shapes), fine, np.stack([_centroid(mask) for mask in unshifted]))


def _normalized(mask: np.ndarray) -> np.ndarray:
    """Scales a mask so that its strongest pixels are 1, which blurred thin bars do not reach."""
    full = float(np.quantile(mask[mask > 0.5 * mask.max()], FULL_QUANTILE))
    return np.minimum(mask / max(full, MIN_FULL), 1.0)


def _centroid(mask: np.ndarray) -> np.ndarray:
    """Computes (y, x) of a square mask's center of gravity, in pixels from its corner."""
    points = np.arange(len(mask)) + 0.5
    return np.array([mask.sum(1) @ points, mask.sum(0) @ points]) / max(mask.sum(), 1e-9)


def _background(image: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Finds the name (None if unknown) and RGB color of a smoothed image's background."""
    distance = np.linalg.norm(image[:, :, None] - _BACKGROUND_TABLE, axis=-1)
    near = distance < BACKGROUND_DISTANCE
    best = int(near.sum((0, 1)).argmax())
    if near[..., best].mean() < MIN_BACKGROUND:
        return None, np.median(image.reshape(-1, 3), 0)
    return BACKGROUNDS[best], np.median(image[near[..., best]], 0)


def _palette(image: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explains each pixel as a mixture of the background and one palette color.

    Returns:
      color: int[H, W] index of the color whose mixture fits best; alpha: float[H, W, colors]
      share of each color in its mixture, in [0, 1].
    """
    directions = _COLOR_TABLE - background
    offset = image - background
    squared = (directions**2).sum(-1)
    alpha = np.clip(offset @ directions.T / squared, 0.0, 1.0)
    dots = offset @ directions.T
    # |offset - alpha d|^2 without the constant |offset|^2, which does not change the argmin.
    residual = alpha * alpha * squared - 2.0 * alpha * dots
    return residual.argmin(-1), alpha


def _has_foreign(
    image: np.ndarray, background: np.ndarray, color: np.ndarray, share: np.ndarray
) -> bool:
    """Returns True if an area has a strange color, or a faint one of the palette.

    Args:
      image: float64[H, W, 3], smoothed.
      background: float64[3].
      color: int[H, W], see `_palette`.
      share: float[H, W] of that color in its mixture.
    """
    explained = background + share[..., None] * (_COLOR_TABLE[color] - background)
    strange = np.linalg.norm(image - explained, axis=-1) > MAX_RESIDUAL
    faint = (share > FAINT) & (share <= SOLID)
    # Objects' rims are strange and faint too, but thin: erosion removes them.
    areas = ndimage.binary_erosion(strange | faint, _ALL_NEIGHBORS)
    return int(areas.sum()) >= MIN_FOREIGN


def _label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels connected areas from 1: int32[H, W] and their number."""
    return cast(tuple[np.ndarray, int], ndimage.label(mask, _ALL_NEIGHBORS))


def _pieces(color: np.ndarray, solid: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Cuts an image into connected pieces of one color: (mask bool[H, W], color index)."""
    labels, count = _label(solid)
    result = []
    for label in range(1, count + 1):
        mask = labels == label
        size = int(mask.sum())
        if size < MIN_PIECE:
            continue
        color_sizes = np.bincount(color[mask], minlength=len(COLORS))
        piece_colors = np.flatnonzero(color_sizes >= max(MIN_PIECE, MIN_SECOND * size))
        if len(piece_colors) <= 1:
            result.append((mask, int(color_sizes.argmax())))
            continue
        for index in piece_colors:
            sublabels, subcount = _label(mask & (color == index))
            sizes = np.bincount(sublabels.ravel(), minlength=subcount + 1)
            large = [i for i in range(1, subcount + 1) if sizes[i] >= MIN_PIECE]
            result += [(sublabels == i, int(index)) for i in large]
    return result


def _window(values: np.ndarray, top: int, left: int) -> np.ndarray:
    """Cuts out values[top : top + PATCH, left : left + PATCH], zeros outside the image."""
    result = np.zeros((PATCH, PATCH), np.float32)
    rows, cols = values.shape
    y0, y1 = max(top, 0), min(top + PATCH, rows)
    x0, x1 = max(left, 0), min(left + PATCH, cols)
    result[y0 - top : y1 - top, x0 - left : x1 - left] = values[y0:y1, x0:x1]
    return result


def _match(alpha: np.ndarray, mask: np.ndarray) -> tuple[str, float, float, float]:
    """Finds the template most like a piece: (shape, center x, center y, overlap)."""
    rows, cols = np.nonzero(mask)
    # Windows center on the middle of the bounding box, which the search then refines.
    left = round((cols.min() + cols.max() + 1) / 2 - PATCH / 2)
    top = round((rows.min() + rows.max() + 1) / 2 - PATCH / 2)
    near = ndimage.binary_dilation(mask, _ALL_NEIGHBORS, iterations=2)
    piece = _normalized(_window(np.where(near, alpha, 0.0), top, left))
    templates = _templates()
    shifts = np.rint((_centroid(piece) - templates.centroid) * FINE).astype(int)
    shifts = np.clip(shifts, -REACH, REACH)
    extent = PATCH * FINE
    shifted = np.stack(
        [
            fine[REACH - dy : REACH - dy + extent : FINE, REACH - dx : REACH - dx + extent : FINE]
            for fine, (dy, dx) in zip(templates.fine, shifts, strict=True)
        ]
    )
    overlap = np.minimum(shifted, piece).sum((1, 2)) / np.maximum(shifted, piece).sum((1, 2))
    best = int(overlap.argmax())
    dy, dx = shifts[best] / FINE
    half = PATCH / 2
    return templates.shapes[best], left + half + dx, top + half + dy, float(overlap[best])


def _object_at(shape: str, color: str, x: float, y: float) -> scenes.SceneObject:
    cell = scenes.RESOLUTION / scenes.GRID
    row, col = (min(max(int(v // cell), 0), scenes.GRID - 1) for v in (y, x))
    return scenes.SceneObject(
        shape, color, row, col, x - (col + 0.5) * cell, y - (row + 0.5) * cell
    )


def _split(mask: np.ndarray) -> list[np.ndarray]:
    """Cuts a long piece along the grid's lines; a piece within one object's length stays uncut."""
    rows, cols = np.nonzero(mask)
    if max(np.ptp(rows), np.ptp(cols)) + 1 <= LONGEST:
        return [mask]
    cell = scenes.RESOLUTION // scenes.GRID
    cuts = []
    for cell_index in np.unique(rows // cell * scenes.GRID + cols // cell):
        cut = np.zeros_like(mask)
        row, col = divmod(int(cell_index), scenes.GRID)
        area = np.s_[row * cell : (row + 1) * cell, col * cell : (col + 1) * cell]
        cut[area] = mask[area]
        if cut.sum() >= MIN_PIECE:
            cuts.append(cut)
    return cuts


def _recognize(
    image: np.ndarray, alpha: np.ndarray, mask: np.ndarray, color: int
) -> list[scenes.SceneObject | None]:
    """Recognizes the objects that a piece consists of; None for one of no known shape."""
    core = np.asarray(ndimage.binary_erosion(mask, _ALL_NEIGHBORS), bool)
    value = np.median(image[core if core.sum() >= 4 else mask], 0)
    if np.linalg.norm(value - _COLOR_TABLE[color]) > COLOR_DISTANCE:
        return [None]
    objects: list[scenes.SceneObject | None] = []
    for cut in _split(mask):
        shape, x, y, overlap = _match(alpha[..., color], cut)
        objects.append(_object_at(shape, COLORS[color], x, y) if overlap >= MIN_OVERLAP else None)
    return objects


def parse(image: np.ndarray) -> ParsedImage:
    """Parses an image into its objects and background.

    Args:
      image: uint8[48, 48, 3].
    Raises:
      InputError: another shape or dtype.
    """
    side = scenes.RESOLUTION
    if image.shape != (side, side, 3) or image.dtype != np.uint8:
        raise InputError(
            f"got an image {image.dtype}{list(image.shape)}, expected uint8[{side}, {side}, 3]"
        )
    sigma = (SMOOTHING, SMOOTHING, 0)
    smooth = ndimage.gaussian_filter(image.astype(np.float64), sigma, mode="nearest")
    name, background = _background(smooth)
    color, alpha = _palette(smooth, background)
    share = np.take_along_axis(alpha, color[..., None], -1)[..., 0]
    recognized = [
        obj
        for mask, index in _pieces(color, share > SOLID)
        for obj in _recognize(smooth, alpha, mask, index)
    ]
    objects = tuple(obj for obj in recognized if obj is not None)
    unknown = len(recognized) - len(objects) + _has_foreign(smooth, background, color, share)
    return ParsedImage(objects, name, unknown)


def facts(image: np.ndarray, spec: Spec | Mapping) -> dict[str, bool]:
    """Decides which facts of a spec hold in an image.

    Args:
      image: uint8[48, 48, 3].
      spec: a `Spec` or its JSON form, as records carry it under "facts".
    Returns:
      The facts of `specs.facts`, and "well_formed": nothing in the image is unknown.
    """
    return parsed_facts(parse(image), spec if isinstance(spec, Spec) else Spec.from_json(spec))


def parsed_facts(parsed: ParsedImage, spec: Spec) -> dict[str, bool]:
    """Decides which facts of a spec hold in a parsed image; see `facts`."""
    result = specs.facts(spec, parsed.objects, parsed.background)
    result["well_formed"] = parsed.unknown == 0 and parsed.background is not None
    return result


def exact_all(image: np.ndarray, spec: Spec | Mapping) -> bool:
    """Returns True if every fact of a spec holds in an image, uint8[48, 48, 3]."""
    return all(facts(image, spec).values())


def shows_scene(image: np.ndarray, scene: scenes.Scene) -> bool:
    """Returns True if an image, uint8[48, 48, 3], shows exactly this scene.

    Every object must be in its cell, anywhere within it, and nothing else may be in the image.
    """
    parsed = parse(image)
    got, expected = (
        sorted((obj.shape, obj.color, obj.row, obj.col) for obj in objects)
        for objects in (parsed.objects, scene.objects)
    )
    return parsed.unknown == 0 and parsed.background == scene.background and got == expected


def measure(images: int, seed: int) -> dict[str, float]:
    """Measures the share of renders that pass: clean, imperfect, and wrong in one fact.

    Args:
      images: renders per row.
      seed: of the scenes and of the damage.
    Returns:
      Row -> share of images in which all facts hold; it should be 0 in the rows "erase", "warp"
      and "one fact wrong".
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
        "one fact wrong": lambda scene, rng: scenes.render(_spoil(scene, rng)),
    }
    result = {}
    for name, render in rows.items():
        rng = np.random.default_rng(seed)
        passed = 0
        for _ in range(images):
            scene = scenes.random_scene(rng)
            spec = dataclasses.replace(specs.describe(scene), background=scene.background)
            passed += exact_all(render(scene, rng), spec)
        result[name] = passed / images
    return result


def _spoil(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """Changes a scene in one fact: the background, an object's color or shape, or its absence."""
    index, objects = int(rng.integers(len(scene.objects))), list(scene.objects)
    fact = specs.pick(rng, ("background", "color", "shape", "missing"))
    if fact == "missing":
        del objects[index]
        return dataclasses.replace(scene, objects=tuple(objects))
    options = {"background": BACKGROUNDS, "color": COLORS, "shape": scenes.SHAPES}[fact]
    holder = scene if fact == "background" else objects[index]
    wrong = specs.pick(rng, [option for option in options if option != getattr(holder, fact)])
    if fact == "background":
        return dataclasses.replace(scene, background=wrong)
    changes: dict[str, Any] = {fact: wrong}
    objects[index] = dataclasses.replace(objects[index], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command's flags; wrong usage ends the process with code 2."""
    parser = cli.Parser(description="Measures the exact checker on renders.")
    parser.add_argument("--images", type=cli.COUNT, default=500, help="renders per row")
    parser.add_argument("--seed", type=cli.SEED, default=0)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Writes the table of `measure` to standard output."""
    for name, share in measure(options.images, options.seed).items():
        sys.stdout.write(f"{name:20s} {share:.3f}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return cli.run(parse_flags, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
