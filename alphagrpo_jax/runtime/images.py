"""Reads and resizes images by BAGEL's rule; converts between uint8 and [-1, 1]."""

import base64
import dataclasses
import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, features

from alphagrpo_jax.runtime.errors import MissingFileError, UserError

MAX_PIXELS = 14 * 14 * 9 * 1024  # largest image of either transform
MAX_FILE_PIXELS = 1024 * 1024 * 1024 // 4 // 3  # Pillow's own limit: more may be an attack
DATA_URL_HEAD = re.compile(r"data:image/[\w.+-]+(;[\w.+=-]+)*;base64", re.ASCII | re.IGNORECASE)
# Formats that are read: endings, and the feature that Pillow needs for them. Its other formats stay
# shut: some start programs (EPS), and none is what a drawing comes in.
FORMATS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "PNG": ((".png", ".apng"), None),
    "JPEG": ((".jpg", ".jpeg", ".jpe", ".jfif"), None),
    "WEBP": ((".webp",), "webp"),
    "BMP": ((".bmp", ".dib"), None),
    "GIF": ((".gif",), None),
    "TIFF": ((".tif", ".tiff"), None),
    "PPM": ((".ppm", ".pgm", ".pbm", ".pnm"), None),
    "AVIF": ((".avif",), "avif"),
}
# What Pillow raises for damaged files, by what its decoders stumble over.
DAMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    struct.error,
    zlib.error,
)


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


def readable_formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that are read: all of `FORMATS` that it can decode."""
    return tuple(
        name
        for name, (_, feature) in FORMATS.items()
        # Older versions of Pillow do not know all features.
        if feature is None or (feature in features.modules and features.check(feature))
    )


def readable_endings() -> tuple[str, ...]:
    """Returns the endings of files that are read, such as ".png"."""
    return tuple(ending for name in readable_formats() for ending in FORMATS[name][0])


def open_rgb(source: str | Path | bytes, *, max_pixels: int = MAX_FILE_PIXELS) -> Image.Image:
    """Reads an image upright (EXIF) as RGB; every command and server reads images by this.

    Transparency is laid on white; of 16 bits the upper 8 count. Of several pages or pictures of an
    animation the first is read (see `count_pages`).

    Args:
      source: a file, or its contents.
      max_pixels: most pixels of an image; a small file may hold a very large one.
    Raises:
      MissingFileError: no such file.
      ImageError: not an image, cut short, or of too many pixels.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), f"the image ({len(source)} bytes)", max_pixels)
    return _read(source, str(source), max_pixels)


def count_pages(path: str | Path) -> int | None:
    """Counts the pages or pictures in an image file that `open_rgb` reads.

    Returns:
      The number; None if the file is damaged behind its first page, so that it is not known.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=readable_formats()) as image:
                return getattr(image, "n_frames", 1)
    except (*DAMAGE_ERRORS, Image.DecompressionBombError):
        return None


def from_data_url(url: str, *, max_pixels: int = MAX_FILE_PIXELS) -> Image.Image:
    """Reads the image in a `data:image/...;base64,...` URL, as `open_rgb` reads a file.

    Raises:
      ImageError: not such a URL, or not an image.
    """
    return _read(io.BytesIO(data_url_content(url)), f"{url[:40]}...", max_pixels)


def data_url_content(url: str) -> bytes:
    """Decodes a `data:image/...;base64,...` URL.

    What follows `image/` does not matter: `jpg` is common, and the contents tell the format.

    Raises:
      ImageError: not such a URL.
    """
    head, _, body = url.partition(",")
    if DATA_URL_HEAD.fullmatch(head) is None:
        raise ImageError(
            f"got a URL that starts with {head[:40]!r}, expected data:image/...;base64"
        )
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:  # binascii.Error, or letters that are not ASCII
        raise ImageError(f"{url[:40]!r}... is no data: URL in base64 ({error})") from error


def data_url(image: np.ndarray) -> str:
    """Encodes uint8[H, W, 3] as a PNG in a data: URL, `from_data_url`'s inverse."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(source: str | Path | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=readable_formats())
        if image.width * image.height > max_pixels:  # before they are decoded
            raise ImageError(
                f"{name} is too large ({image.width}x{image.height} pixels, at most {max_pixels} "
                "in all); give a smaller image"
            )
        image.load()
        if image.format == "PPM" and image.mode == "I":  # Pillow scales it to 16 bits
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise MissingFileError(f"no image file at {name}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} is too large ({error}); give a smaller image") from error
    except ImageError as error:
        if str(error).startswith(name):
            raise
        raise ImageError(f"{name}: {error}; give a PNG or JPEG file") from error
    except DAMAGE_ERRORS as error:
        raise ImageError(
            f"{name} is not a readable image ({error}); give a PNG or JPEG file"
        ) from error


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
      ImageError: floating-point values, whose range is not known, or colors that Pillow cannot
        convert.
    """
    if image.mode == "F":
        raise ImageError("got floating-point pixels, expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # Pillow's own conversion cuts off what exceeds 8 bits
        return _from_integers(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.getchannel("A"))
            return white
        return image.convert("RGB")
    except ValueError as error:  # e.g. LAB
        raise ImageError(f"got pixels of the mode {image.mode!r} ({error})") from error


def _from_integers(image: Image.Image) -> Image.Image:
    """Converts gray values of 16 or 32 bits to RGB by their upper 8 of 16 bits."""
    values = np.asarray(image)
    pixels = values
    if image.mode.startswith("I;16") or values.max() > 255:
        pixels = values >> 8
    pixels = pixels.clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")  # of a PNG: one gray value
    if isinstance(transparent, int):
        pixels = np.where(values == transparent, np.uint8(255), pixels)
    return Image.fromarray(pixels).convert("RGB")


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
