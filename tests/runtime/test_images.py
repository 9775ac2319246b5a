"""Resize rule and conversions."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from alphagrpo_jax.runtime.images import (
    ImageSizes,
    both_sizes,
    data_url,
    fitted,
    fitted_size,
    from_data_url,
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


def test_the_sizes_of_both_encoders():
    image = Image.new("RGB", (100, 60), (255, 255, 255))
    vae, vit = both_sizes(image, ImageSizes(48, 16, 16), ImageSizes(32, 8, 8))
    assert vae.shape == (32, 48, 3)
    assert vit.shape == (24, 32, 3)
    assert vae.min() == vit.min() == 255


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


def saved(folder, image: Image.Image, name: str = "x.png", **options) -> str:
    path = folder / name
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.new("L", (2, 1), 200), [200, 200, 200]),
        (Image.new("LA", (2, 1), (200, 255)), [200, 200, 200]),
        (Image.new("LA", (2, 1), (200, 0)), [255, 255, 255]),
        (Image.new("1", (2, 1), 1), [255, 255, 255]),
        (Image.new("P", (2, 1), 0), [0, 0, 0]),
        (Image.fromarray(np.full((1, 2), 200 << 8, np.uint16)), [200, 200, 200]),
        (Image.fromarray(np.full((1, 2), 200, np.int32)), [200, 200, 200]),
    ],
    ids=["grey", "grey and alpha", "transparent", "bits", "palette", "16 bits", "32 bits"],
)
def test_any_kind_of_pixels_becomes_rgb(image, value):
    found = np.asarray(to_rgb(image))
    assert found.shape == (1, 2, 3)
    assert found[0, 0].tolist() == value


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="floating-point pixels"):
        to_rgb(Image.fromarray(np.full((2, 2), 0.5, np.float32)))


def test_a_rotated_photograph_is_shown_upright(tmp_path):
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise
    path = saved(tmp_path, image, "x.jpg", exif=exif)
    assert open_rgb(path).size == (2, 4)


@pytest.mark.parametrize(
    ("size", "coloured"),
    [((1, 1), 32 * 32), ((1, 500), 32), ((3000, 2), 48), ((100_000, 1), 48), ((96, 64), 48 * 32)],
)
def test_odd_sizes_are_fitted_whole(size, coloured):
    found = np.asarray(fitted(Image.new("RGB", size, (0, 0, 255)), 48, 32))
    assert found.shape == (32, 48, 3)
    assert (found == (0, 0, 255)).all(axis=-1).sum() == coloured
    assert (found == 255).all(axis=-1).sum() == 48 * 32 - coloured  # no other colour


@pytest.mark.parametrize("size", [(47, 31), (7, 40), (90, 33), (31, 90), (49, 32), (24, 16)])
def test_fitting_is_pillows_padding(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    expected = ImageOps.pad(image, (48, 32), Image.Resampling.BICUBIC, color=(255, 255, 255))
    np.testing.assert_array_equal(np.asarray(fitted(image, 48, 32)), np.asarray(expected))


def test_the_whole_image_is_kept_on_white():
    found = np.asarray(fitted(Image.new("RGB", (10, 40), (0, 0, 255)), 40, 40))
    assert found[20, 20].tolist() == [0, 0, 255]
    assert found[20, 0].tolist() == [255, 255, 255]


def test_a_file_cut_short_and_a_huge_one_are_explained(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = saved(tmp_path, Image.fromarray(noise))
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable image"):
        open_rgb(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="is too large"):
        open_rgb(path)


def test_data_urls_there_and_back():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(from_data_url(data_url(image))), image)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,%%%", "no data: URL in base64"),
        ("data:text/plain;base64,aGk=", "expected data:image/"),
        ("data:image/png;base64,aGk=", "is not a readable image"),
    ],
)
def test_bad_data_urls(url, message):
    with pytest.raises(ValueError, match=message):
        from_data_url(url)
