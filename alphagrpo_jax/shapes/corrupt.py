"""Renders imperfect images with quality labels, for training and measuring a verifier.

Labels are True for the good answer: `geometry` (every object has its form), `coherence` (every
object is complete and separate), `texture` (colors flat and clean). A label that a kind of damage
leaves open is absent. Photometric kinds are mild (labels stay True) or strong (texture is False),
with a gap between, so that no label is a matter of taste:

  kind    mild                     strong
  noise   sigma <= 0.04            0.06 to 0.10 (of the range 0 to 1)
  blur    sigma <= 0.7 px          1.1 to 1.6 px
  jpeg    quality >= 60            10 to 25
  soft    resampled at >= 30 px    at 14 to 18 px
  bleed   color blurred <= 1 px   2 to 3 px
  blotch  amplitude <= 0.02        0.06 to 0.12
"""

import dataclasses
import io
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image
from scipy import ndimage

from alphagrpo_jax.shapes import scenes
from alphagrpo_jax.shapes.specs import pick

SOUND: Mapping[str, bool] = {"geometry": True, "coherence": True, "texture": True}
PHOTOMETRIC = ("noise", "blur", "jpeg", "soft", "bleed", "blotch")
STRUCTURAL = ("erase", "warp", "smear", "merge")
SURFACE = ("stripes", "speckle")
KINDS = ("clean", *PHOTOMETRIC, *STRUCTURAL, *SURFACE)
MAX_BLOB_OVERLAP = 0.75  # IoU of a malformed object with the nearest proper shape, at most
MILD_SHARE = 0.5  # of photometric damage
WITH_MILD_SHARE = 0.5  # structural and surface damage that gets mild photometric damage as well


@dataclasses.dataclass(frozen=True)
class Corruption:
    """An imperfect image, its labels, and the objects that show the damage."""

    image: np.ndarray  # uint8[48, 48, 3]
    labels: Mapping[str, bool]  # by quality type
    damaged: tuple[int, ...]  # indexes of objects beyond recognition
    faulty: tuple[int, ...]  # indexes of objects that show the damage; empty if it is everywhere
    kind: str  # of `KINDS`


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def noise(image: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Adds independent Gaussian noise, sigma as a share of the range 0 to 255."""
    return _to_uint8(image + rng.normal(0.0, 255.0 * sigma, image.shape))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Applies a Gaussian blur, sigma in pixels."""
    return _to_uint8(ndimage.gaussian_filter(image.astype(np.float64), (sigma, sigma, 0)))


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compresses and decompresses an image as JPEG (4:2:0 color)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(buffer).convert("RGB"))


def soft(image: np.ndarray, side: int) -> np.ndarray:
    """Resamples an image to `side` pixels and back."""
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(small.resize(image.shape[1::-1], Image.Resampling.BICUBIC))


def bleed(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs the color of an image, but not its brightness; sigma in pixels."""
    ycc = np.asarray(Image.fromarray(image).convert("YCbCr")).astype(np.float64)
    ycc[..., 1:] = ndimage.gaussian_filter(ycc[..., 1:], (sigma, sigma, 0))
    return np.asarray(Image.fromarray(_to_uint8(ycc), "YCbCr").convert("RGB"))


def blotch(image: np.ndarray, rng: np.random.Generator, amplitude: float) -> np.ndarray:
    """Adds smooth colored clouds of a standard deviation of `amplitude` of the range."""
    clouds = ndimage.gaussian_filter(rng.normal(size=image.shape), (2.5, 2.5, 0))
    return _to_uint8(image + 255.0 * amplitude * clouds / clouds.std())


def photometric(
    image: np.ndarray, rng: np.random.Generator, kind: str, *, mild: bool
) -> np.ndarray:
    """Damages an image by one of `PHOTOMETRIC`, with random strength in its mild or strong range.

    Raises:
      ValueError: unknown kind.
    """

    def between(mild_range: tuple[float, float], strong_range: tuple[float, float]) -> float:
        return float(rng.uniform(*(mild_range if mild else strong_range)))

    if kind == "noise":
        return noise(image, rng, between((0.005, 0.04), (0.06, 0.10)))
    if kind == "blur":
        return blur(image, between((0.3, 0.7), (1.1, 1.6)))
    if kind == "jpeg":
        return jpeg(image, round(between((60, 95), (10, 25))))
    if kind == "soft":
        return soft(image, round(between((30, 44), (14, 18))))
    if kind == "bleed":
        return bleed(image, between((0.4, 1.0), (2.0, 3.0)))
    if kind == "blotch":
        return blotch(image, rng, between((0.005, 0.02), (0.06, 0.12)))
    raise ValueError(f"unknown kind {kind!r}; expected one of {PHOTOMETRIC}")


def _grid(obj: scenes.SceneObject) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel centers relative to an object's center: x[1, 48] and y[48, 1]."""
    points = np.arange(scenes.RESOLUTION) + 0.5
    return points[None, :] - obj.center[0], points[:, None] - obj.center[1]


def _erase(mask: np.ndarray, obj: scenes.SceneObject, rng: np.random.Generator) -> np.ndarray:
    """Removes 35 to 65 % of an object, on one side of a straight line."""
    x, y = _grid(obj)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    cut = _weighted_quantile(along, mask, rng.uniform(0.35, 0.65))
    return mask * np.clip(along - cut + 0.5, 0.0, 1.0)


def _weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    order = np.argsort(values, axis=None)
    total = np.cumsum(weights.ravel()[order])
    return float(values.ravel()[order][np.searchsorted(total, share * total[-1])])


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the soft intersection over union of two masks with values in [0, 1]."""
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-9))


def _warp(mask: np.ndarray, obj: scenes.SceneObject, rng: np.random.Generator) -> np.ndarray:
    """Samples a blob of about the object's size that resembles none of the shapes."""
    x, y = _grid(obj)
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    proper = [
        scenes.object_masks(scenes.Scene((dataclasses.replace(obj, shape=shape),), "white"))[0]
        for shape in scenes.SHAPES
    ]
    while True:
        radius = np.full_like(angle, rng.uniform(3.5, 5.5))
        for order in (1, 2, 3, 5):
            radius += rng.uniform(-1.6, 1.6) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
        blob = np.clip(np.minimum(radius, 7.5) - distance + 0.5, 0.0, 1.0)
        if blob.sum() > 40 and max(overlap(blob, p) for p in proper) < MAX_BLOB_OVERLAP:
            return blob


def _smear(mask: np.ndarray, obj: scenes.SceneObject, rng: np.random.Generator) -> np.ndarray:
    """Drags an object along, as a moving camera does, leaving a fading trail."""
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(7.0, 11.0)
    trail = [
        (1.0 - 0.5 * fraction)
        * ndimage.shift(
            mask, (np.sin(angle) * length * fraction, np.cos(angle) * length * fraction), order=1
        )
        for fraction in np.linspace(0.0, 1.0, 12)
    ]
    return np.clip(np.max(trail, 0), 0.0, 1.0)


def _merge(scene: scenes.Scene, rng: np.random.Generator) -> tuple[scenes.Scene, tuple[int, int]]:
    """Pushes one object onto another, leaving their centers 5 to 8 pixels apart.

    Returns:
      The scene, and the indexes of the object that moves and of the one that stays.
    """
    mover, target = (int(i) for i in rng.permutation(len(scene.objects))[:2])
    cx, cy = scene.objects[target].center
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(5.0, 8.0)
    half = scenes.RESOLUTION / 2
    if (half - cx) * np.cos(angle) + (half - cy) * np.sin(angle) < 0:  # not out of the image
        angle += np.pi
    cell = dataclasses.replace(scene.objects[target], dx=0.0, dy=0.0)
    pushed = dataclasses.replace(
        scene.objects[mover],
        row=cell.row,
        col=cell.col,
        dx=cx + distance * np.cos(angle) - cell.center[0],
        dy=cy + distance * np.sin(angle) - cell.center[1],
    )
    objects = tuple(pushed if i == mover else obj for i, obj in enumerate(scene.objects))
    return dataclasses.replace(scene, objects=objects), (mover, target)


def _stripes(obj: scenes.SceneObject, rng: np.random.Generator) -> np.ndarray:
    """Samples stripes of another brightness: offsets to the color, float[48, 48, 1]."""
    x, y = _grid(obj)
    angle, period = rng.uniform(0, np.pi), rng.uniform(3.0, 5.0)
    wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period)
    return (rng.uniform(45, 90) * np.sign(wave))[..., None]


def _speckle(obj: scenes.SceneObject, rng: np.random.Generator) -> np.ndarray:
    """Samples spots of another color: offsets to the color, float[48, 48, 3]."""
    side = scenes.RESOLUTION
    spots = rng.random((side, side, 1)) < rng.uniform(0.2, 0.4)
    return spots * rng.uniform(-130, 130, (side, side, 3))


_MASK: dict[str, Callable] = {"erase": _erase, "warp": _warp, "smear": _smear}
_PAINT: dict[str, Callable] = {"stripes": _stripes, "speckle": _speckle}
_LABELS = {
    "erase": {"geometry": False, "coherence": False, "texture": True},
    "warp": {"geometry": False, "coherence": True, "texture": True},
    "smear": {"geometry": False, "coherence": False},
    "merge": {"coherence": False, "texture": True},
    "stripes": {"geometry": True, "coherence": True, "texture": False},
    "speckle": {"geometry": True, "coherence": True, "texture": False},
}


def _paint(scene: scenes.Scene, masks: np.ndarray, offsets: Mapping[int, np.ndarray]) -> np.ndarray:
    """Renders objects with their masks; `offsets` change the color of some of them."""
    side = scenes.RESOLUTION
    image = np.full((side, side, 3), scenes.BACKGROUNDS[scene.background], np.float64)
    for index, (mask, obj) in enumerate(zip(masks, scene.objects, strict=True)):
        color = np.asarray(scenes.COLORS[obj.color], np.float64) + offsets.get(index, 0.0)
        image += mask[..., None] * (np.clip(color, 0, 255) - image)
    return _to_uint8(image)


def _structural(scene: scenes.Scene, rng: np.random.Generator, kind: str) -> Corruption:
    index = int(rng.integers(len(scene.objects)))
    offsets: dict[int, np.ndarray] = {}
    faulty: tuple[int, ...] = (index,)
    if kind == "merge":
        scene, faulty = _merge(scene, rng)
    masks = scenes.object_masks(scene)
    if kind in _MASK:
        masks[index] = _MASK[kind](masks[index], scene.objects[index], rng)
    elif kind in _PAINT:
        offsets[index] = _PAINT[kind](scene.objects[index], rng)
    damaged = () if kind in SURFACE else faulty
    return Corruption(_paint(scene, masks, offsets), _LABELS[kind], damaged, faulty, kind)


def corrupt(scene: scenes.Scene, rng: np.random.Generator, kind: str | None = None) -> Corruption:
    """Renders a scene imperfectly.

    Args:
      scene: the scene, one object at least.
      rng: source of randomness.
      kind: one of `KINDS` (default: any); "merge" of a single object becomes "smear".
    Returns:
      The image with its labels. Questions about the scene keep their answers, unless they depend
      on the `damaged` objects (see `questions.sample_questions`).
    Raises:
      ValueError: unknown kind.
    """
    kind = kind or str(pick(rng, KINDS))
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {KINDS}")
    if kind == "merge" and len(scene.objects) == 1:
        kind = "smear"
    if kind == "clean":
        return Corruption(scenes.render(scene), SOUND, (), (), kind)
    if kind in PHOTOMETRIC:
        mild = bool(rng.random() < MILD_SHARE)
        image = photometric(scenes.render(scene), rng, kind, mild=mild)
        return Corruption(image, {**SOUND, "texture": mild}, (), (), kind)
    result = _structural(scene, rng, kind)
    if rng.random() < WITH_MILD_SHARE:
        image = photometric(result.image, rng, str(pick(rng, PHOTOMETRIC)), mild=True)
        result = dataclasses.replace(result, image=image)
    return result
