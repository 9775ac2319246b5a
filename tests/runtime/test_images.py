"""Resize rule and conversions."""

import numpy as np
import pytest
from PIL import Image

from alphagrpo_jax.runtime.images import (
    ImageSizes,
    conditioning,
    fitted_size,
    grid,
    open_rgb,
    to_float,
    to_rgb,
    to_uint8,
)

VAE = ImageSizes(max_size=1024, min_size=512, stride=16)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1024, 1024), (1024, 1024)),
        ((2048, 1024), (1024, 512)),  # longer side down to 1024
        ((100, 200), (512, 1024)),  # shorter side up to 512
        ((1000, 1000), (992, 992)),  # 62.5 strides: half to even
        ((4000, 400), (1024, 96)),  # up to 512 for the short side, then the long one rules
    ],
)
def test_fitted_size(size: tuple[int, int], fitted: tuple[int, int]):
    assert fitted_size(*size, VAE) == fitted


def test_pixels_there_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    floats = to_float(pixels)
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    assert np.abs(to_uint8(floats).astype(int) - pixels).max() <= 1
    # truncation, not rounding; values outside are clipped
    np.testing.assert_array_equal(to_uint8(np.array([0.999 / 127.5 - 1, -3.0, 3.0])), [0, 0, 255])
    with pytest.raises(ValueError, match="float32, expected uint8"):
        to_float(floats)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_conditioning_images():
    image = Image.new("RGB", (100, 60), (255, 255, 255))
    vae, vit = conditioning(image, ImageSizes(48, 16, 16), ImageSizes(32, 8, 8))
    assert vae.shape == (32, 48, 3)
    assert vit.shape == (24, 32, 3)
    assert vae.min() == vit.min() == 1.0


def test_grid_of_images():
    images = np.zeros((3, 2, 2, 3), np.uint8)
    canvas = grid(images, 2, gap=1)
    assert canvas.shape == (7, 7, 3)
    assert (canvas[..., 0] == 0).sum() == 3 * 4


def test_a_file_that_is_no_image(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("no")
    with pytest.raises(ValueError, match=r"x\.png is not a readable image"):
        open_rgb(path)
    with pytest.raises(FileNotFoundError):
        open_rgb(tmp_path / "y.png")
