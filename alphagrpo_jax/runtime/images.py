"""Reads and resizes images by BAGEL's rule; converts between uint8 and [-1, 1]."""

import base64
import binascii
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from alphagrpo_jax.runtime.errors import MissingFileError, UserError

MAX_PIXELS = 14 * 14 * 9 * 1024  # largest image of either transform


class ImageError(UserError, ValueError):
    """An image that cannot be read or used."""


@dataclasses.dataclass(frozen=True)
class ImageSizes:
    """Size rule of an image transform, pixels: sides within [min, max], multiples of stride."""

    max_size: int
    min_size: int
    stride: int


def fitted_size(width: int, height: int, sizes: ImageSizes) -> tuple[int, int]:
    """Computes width and height after a transform.

    The longer side is brought down to `max_size`, then the shorter one up to `min_size`; both are
    rounded (half to even) to multiples of `stride`; then the pixel count and the longer side are
    limited again.

    Args:
      width: pixels.
      height: pixels.
      sizes: the transform's rule.
    """
    scale = min(sizes.max_size / max(width, height), 1.0)
    scale = max(scale, sizes.min_size / min(width, height))
    width, height = _scaled(width, height, scale, sizes.stride)
    if width * height > MAX_PIXELS:
        width, height = _scaled(width, height, MAX_PIXELS / (width * height), sizes.stride)
    if max(width, height) > sizes.max_size:
        width, height = _scaled(width, height, sizes.max_size / max(width, height), sizes.stride)
    return width, height


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    def scaled(side: int) -> int:
        return max(stride, round(round(side * scale) / stride) * stride)

    return scaled(width), scaled(height)


def resize(image: Image.Image, sizes: ImageSizes) -> Image.Image:
    """Resizes an image to a transform's size (bicubic)."""
    return image.resize(fitted_size(*image.size, sizes), Image.Resampling.BICUBIC)


def open_rgb(path: str | Path) -> Image.Image:
    """Reads an image file, upright (EXIF); transparency is laid on white.

    Raises:
      MissingFileError: no such file.
      ImageError: not an image, cut short, or of so many pixels that it may be an attack.
    """
    return _read(path, str(path))


def from_data_url(url: str) -> Image.Image:
    """Reads the image in a `data:image/...;base64,...` URL, as `open_rgb` reads a file.

    Raises:
      ImageError: not such a URL, or not an image.
    """
    head, _, body = url.partition(",")
    try:
        content = base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ImageError(f"{url[:40]!r}... is no data: URL in base64 ({error})") from error
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ImageError(
            f"got a URL that starts with {head[:40]!r}, expected data:image/...;base64"
        )
    return _read(io.BytesIO(content), f"{head[:40]},...")


def data_url(image: np.ndarray) -> str:
    """Encodes uint8[H, W, 3] as a PNG in a data: URL, `from_data_url`'s inverse."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise MissingFileError(f"no image file at {name}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} is too large ({error}); give a smaller image") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ImageError(
            f"{name} is not a readable image ({error}); give a PNG or JPEG file"
        ) from error
    try:
        return to_rgb(upright)
    except ImageError as error:
        raise ImageError(f"{name}: {error}; give a PNG or JPEG file") from error


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fits an image into `width` x `height` pixels (bicubic), white where it does not reach.

    A very thin image keeps a line of pixels.
    """
    if image.size == (width, height):
        return image
    if image.width * height > image.height * width:
        size = (width, max(1, round(image.height / image.width * width)))
    else:
        size = (max(1, round(image.width / image.height * height)), height)
    white = Image.new("RGB", (width, height), (255, 255, 255))
    corner = (round((width - size[0]) / 2), round((height - size[1]) / 2))
    white.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return white


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB; transparency is laid on white.

    Raises:
      ImageError: floating-point values, whose range is not known.
    """
    if image.mode == "F":
        raise ImageError("got floating-point pixels, expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts off what exceeds 8 bits
        values = np.asarray(image)
        if image.mode.startswith("I;16") or values.max() > 255:
            values = values >> 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "La", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def to_float(image: np.ndarray | Image.Image) -> np.ndarray:
    """Converts uint8[..., H, W, 3] to float32[..., H, W, 3] in [-1, 1]."""
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"got an image of {pixels.dtype}, expected uint8")
    return (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Converts float[..., H, W, 3] in [-1, 1] to uint8, clipped and truncated (not rounded)."""
    unit = np.clip(np.asarray(images, np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return (unit * np.float32(255)).astype(np.uint8)


def both_sizes(
    image: Image.Image, vae_sizes: ImageSizes, vit_sizes: ImageSizes
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes a user's image to the sizes of the two encoders.

    The VAE's size comes first and the ViT's transform starts from that resized image.

    Args:
      image: RGB.
      vae_sizes: rule of the VAE transform.
      vit_sizes: rule of the ViT transform.
    Returns:
      uint8[H, W, 3] for the VAE and uint8[h, w, 3] for the ViT.
    """
    resized = resize(image, vae_sizes)
    # Resized twice for the VAE: the size rule is not idempotent for extreme aspect ratios.
    pair = (resize(resized, vae_sizes), resize(resized, vit_sizes))
    return np.asarray(pair[0]), np.asarray(pair[1])


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Tiles images row by row on white.

    Args:
      images: uint8[N, H, W, 3].
      columns: images per row.
      gap: pixels between images.
    Returns:
      uint8[rows * (H + gap) + gap, columns * (W + gap) + gap, 3].
    """
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    for index, image in enumerate(images):
        row = gap + (index // columns) * (height + gap)
        column = gap + (index % columns) * (width + gap)
        canvas[row : row + height, column : column + width] = image
    return canvas
