"""Resize rule, reading of files and bytes, and conversions."""

import base64
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from alphagrpo_jax.runtime.images import (
    ImageError,
    ImageSizes,
    both_sizes,
    count_pages,
    data_url,
    fitted,
    fitted_size,
    from_data_url,
    grid,
    open_rgb,
    readable_endings,
    readable_formats,
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
    pixels = np.asarray(to_rgb(image))
    assert pixels.shape == (1, 2, 3)
    assert pixels[0, 0].tolist() == value


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
    pixels = np.asarray(fitted(Image.new("RGB", size, (0, 0, 255)), 48, 32))
    assert pixels.shape == (32, 48, 3)
    assert (pixels == (0, 0, 255)).all(axis=-1).sum() == coloured
    assert (pixels == 255).all(axis=-1).sum() == 48 * 32 - coloured  # no other colour


@pytest.mark.parametrize("size", [(47, 31), (7, 40), (90, 33), (31, 90), (49, 32), (24, 16)])
def test_fitting_is_pillows_padding(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    expected = ImageOps.pad(image, (48, 32), Image.Resampling.BICUBIC, color=(255, 255, 255))
    np.testing.assert_array_equal(np.asarray(fitted(image, 48, 32)), np.asarray(expected))


def test_the_whole_image_is_kept_on_white():
    pixels = np.asarray(fitted(Image.new("RGB", (10, 40), (0, 0, 255)), 40, 40))
    assert pixels[20, 20].tolist() == [0, 0, 255]
    assert pixels[20, 0].tolist() == [255, 255, 255]


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


def encoded(image: Image.Image, form: str, **options) -> bytes:
    """The contents of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def hidden(mode: str, **options) -> bytes:
    """A PNG whose second pixel is black and transparent, the first one red or light."""
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        return encoded(image, "PNG", transparency=1)
    if mode == "I;16":
        image = Image.fromarray(np.array([[200 << 8, 0]], np.uint16))
        return encoded(image, "PNG", transparency=0)
    values = {"RGBA": [(255, 0, 0, 255), (0, 0, 0, 0)], "LA": [(200, 255), (0, 0)],
              "RGB": [(255, 0, 0), (0, 0, 0)], "L": [200, 0]}[mode]  # fmt: skip
    image = Image.new(mode, (2, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return encoded(image, "PNG", **options)


@pytest.mark.parametrize(
    ("contents", "first"),
    [
        (hidden("RGBA"), [255, 0, 0]),
        (hidden("LA"), [200, 200, 200]),
        (hidden("P"), [255, 0, 0]),
        (hidden("RGB", transparency=(0, 0, 0)), [255, 0, 0]),
        (hidden("L", transparency=0), [200, 200, 200]),
        (hidden("I;16"), [200, 200, 200]),
    ],
    ids=["rgba", "grey and alpha", "palette", "a color", "a grey", "16 bits"],
)
def test_what_is_transparent_is_white_whatever_color_hides_there(contents, first):
    assert np.asarray(open_rgb(contents)).tolist() == [[first, [255, 255, 255]]]


@pytest.mark.parametrize(
    ("contents", "pixel"),
    [
        (encoded(Image.fromarray(np.full((1, 2), 200 << 8, np.uint16)), "PNG"), 200),
        (encoded(Image.fromarray(np.full((1, 2), 200 << 8, np.uint16)), "TIFF"), 200),
        (b"P5 2 1 65535 " + bytes([0, 200] * 2), 0),  # nearly black: all values below 256
        (b"P5 2 1 65535 " + bytes([200, 0] * 2), 200),
        (encoded(Image.new("CMYK", (2, 1), (0, 0, 0, 55)), "TIFF"), 200),
        (encoded(Image.new("L", (2, 1), 200), "BMP"), 200),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "dark 16-bit PGM", "16-bit PGM", "CMYK", "grey"],
)
def test_files_of_any_depth(contents, pixel):
    assert np.asarray(open_rgb(contents)).tolist() == [[[pixel] * 3] * 2]


@pytest.mark.parametrize(("code", "size"), [(1, (4, 2)), (3, (4, 2)), (5, (2, 4)), (8, (2, 4))])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_files_and_bytes_and_urls_are_read_alike_and_upright(tmp_path, code, size, form):
    noise = np.random.default_rng(0).integers(0, 256, (2, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = code
    contents = encoded(Image.fromarray(noise), form, exif=exif)
    (tmp_path / "x").write_bytes(contents)
    image = open_rgb(tmp_path / "x")
    assert image.size == size
    url = f"data:image/{form.lower()};base64," + base64.b64encode(contents).decode()
    for again in (open_rgb(contents), from_data_url(url)):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(again))


@pytest.mark.parametrize("height", [1, 2, 3, 4])
def test_thin_images_keep_their_shape(tmp_path, height):
    noise = np.random.default_rng(height).integers(0, 256, (height, 50, 3), np.uint8)
    path = saved(tmp_path, Image.fromarray(noise))
    np.testing.assert_array_equal(np.asarray(open_rgb(path)), noise)
    np.testing.assert_array_equal(np.asarray(from_data_url(data_url(noise))), noise)


def test_avif_is_read_where_pillow_can():
    has_avif = features.check("avif")
    assert (".avif" in readable_endings()) == has_avif
    if not has_avif:
        pytest.skip("this build of Pillow has no AVIF")
    pixels = np.asarray(open_rgb(encoded(Image.new("RGB", (8, 8), (200, 30, 30)), "AVIF")))
    assert np.abs(pixels.astype(int) - (200, 30, 30)).max() < 8


@pytest.mark.parametrize(("name", "form"), [("x.tiff", "TIFF"), ("x.gif", "GIF")])
def test_the_first_of_several_pages_is_read(tmp_path, name, form):
    pages = [Image.new("L", (3, 2), value) for value in (10, 90, 200)]
    path = saved(tmp_path, pages[0], name, format=form, save_all=True, append_images=pages[1:])
    assert np.asarray(open_rgb(path))[0, 0].tolist() == [10, 10, 10]
    assert count_pages(path) == 3
    assert count_pages(saved(tmp_path, pages[0])) == 1


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (encoded(Image.new("F", (3, 3)), "TIFF"), "floating-point pixels"),
        (encoded(Image.new("RGB", (3, 3)), "EPS"), "is not a readable image"),  # runs programs
        (encoded(Image.new("RGB", (11, 10)), "PNG"), "11x10 pixels, at most 100 in all"),
        (b"", "is not a readable image"),
    ],
    ids=["floats", "eps", "too many pixels", "empty"],
)
def test_bytes_that_cannot_be_read_are_explained(contents, message):
    with pytest.raises(ValueError, match=message):
        open_rgb(contents, max_pixels=100)


@pytest.mark.parametrize(
    "head", ["image/jpg", "image/pjpeg", "IMAGE/JPEG", "image/x-png", "image/png;charset=utf-8"]
)
def test_common_spellings_of_data_urls(head):
    image = np.random.default_rng(0).integers(0, 256, (9, 70, 3), np.uint8)
    body = base64.encodebytes(encoded(Image.fromarray(image), "PNG")).decode()  # in lines
    assert "\n" in body.strip()
    np.testing.assert_array_equal(np.asarray(from_data_url(f"data:{head};base64,{body}")), image)


def damaged(contents, rng):
    """Cut, or with some bytes changed, or both."""
    damage = rng.choice(("cut", "changed", "both"))
    buffer = bytearray(contents)
    if damage != "changed":
        del buffer[rng.randrange(1, len(buffer)) :]
    if damage != "cut":
        for _ in range(rng.randrange(1, 9)):
            # Heads matter most.
            buffer[rng.randrange(min(len(buffer), rng.choice((400, 10**9))))] = rng.randrange(256)
    return bytes(buffer)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_a_damaged_file_is_read_or_explained_whatever_its_decoder_raises(tmp_path, form):
    if form not in readable_formats():
        pytest.skip(f"this build of Pillow has no {form}")
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)) for _ in range(3)]
    with_pages = {"save_all": True, "append_images": pages[1:]}
    sources = [encoded(pages[0], form)]
    if form in ("PNG", "WEBP", "GIF", "TIFF", "AVIF"):
        sources.append(encoded(pages[0], form, **with_pages))
        (tmp_path / "good").write_bytes(sources[1])
        assert count_pages(tmp_path / "good") == 3
    refused = 0
    mutations = random.Random(0)
    for number in range(120):
        contents = damaged(sources[number % len(sources)], mutations)
        try:
            open_rgb(contents)
        except ImageError:
            refused += 1
        (tmp_path / "x").write_bytes(contents)
        count = count_pages(tmp_path / "x")
        assert count is None or count >= 1
    assert refused > 20


@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), TypeError("x"), IndexError("x"), KeyError("x"), ZeroDivisionError("x")],
    ids=lambda error: type(error).__name__,
)
def test_kinds_of_errors_that_decoders_raise(tmp_path, monkeypatch, error):
    path = saved(tmp_path, Image.new("RGB", (4, 4)))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match="is not a readable image"):
        open_rgb(path)
    assert count_pages(path) is None


@pytest.mark.parametrize("form", ["TIFF", "GIF"])
def test_pages_of_a_file_cut_short_are_counted_or_not_known(tmp_path, form):
    pages = [Image.new("L", (16, 16), value) for value in (10, 90, 200)]
    contents = encoded(pages[0], form, save_all=True, append_images=pages[1:])
    counts = set()
    for length in range(0, len(contents), 3):
        (tmp_path / "x").write_bytes(contents[:length])
        counts.add(count_pages(tmp_path / "x"))
    assert None in counts
    assert counts <= {None, 1, 2, 3}
