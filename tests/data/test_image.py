"""Images decoded: more than 8 bits keep their range, EXIF turns where asked, what cannot be decoded is broken."""

import contextlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from vmoe_torch.data import read_image
from vmoe_torch.data.image import BrokenImageError, converted, image_suffixes

RAMP = np.linspace(0, 65535, 256).round().reshape(16, 16)
WANT = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path, ending, mode):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RAMP.astype(np.uint16)).save(path)
    got = np.asarray(read_image(path, mode))
    want = WANT if mode == "L" else np.repeat(WANT[..., None], 3, -1)
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.parametrize(
    "array",
    [
        RAMP.astype(np.uint16),
        RAMP.astype(np.int32),
        RAMP.astype(np.float32),
        (RAMP / 65535).astype(np.float32),
        (RAMP / 257).astype(np.float32),
        (RAMP * 16).astype(np.float32),
    ],
)
def test_modes_of_more_bits_keep_their_shades(array):
    got = np.asarray(converted(Image.fromarray(array), "L"))
    assert np.abs(got.astype(int) - WANT).max() <= 1


def test_byte_orders_agree(tmp_path):
    data = RAMP.astype(">u2").tobytes()
    image = Image.frombytes("I;16B", (16, 16), data)
    assert np.abs(np.asarray(converted(image, "L")).astype(int) - WANT).max() <= 1


def test_dark_images_stay_dark():
    dark = np.full((4, 4), 257 * 3, np.uint16)
    assert np.asarray(converted(Image.fromarray(dark), "L")).tolist() == np.full((4, 4), 3).tolist()


def test_numbers_that_are_none_are_black():
    array = np.array([[np.nan, np.inf], [-1.0, 1.0]], np.float32)
    assert np.asarray(converted(Image.fromarray(array), "L")).tolist() == [[0, 0], [0, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_where_asked(tmp_path, orientation):
    path = tmp_path / "a.png"
    array = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(array).save(path, exif=exif)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(read_image(path, "L")), array)
    assert np.array_equal(np.asarray(read_image(path, "L", exif=True)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning", "ignore:Truncated:UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_an_image_is_not_broken_because_its_exif_is(tmp_path, exif):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (4, 3)).save(path, exif=exif)
    assert read_image(path, exif=True).size == (4, 3)


def test_an_image_whose_exif_raises_is_left_as_it_is(monkeypatch):
    def fail(image):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert converted(Image.new("RGB", (4, 3)), "L", exif=True).size == (4, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"])
def test_other_modes_are_as_pillow_has_them(mode):
    image = Image.new("RGB", (4, 3), (200, 40, 90))
    image = Image.new("LAB", (4, 3), (50, 100, 100)) if mode == "LAB" else image.convert(mode)
    for wanted in ("RGB", "L"):
        if mode == "LAB" and wanted == "L":
            continue
        assert np.array_equal(np.asarray(converted(image, wanted)), np.asarray(image.convert(wanted)))


def test_endings_are_those_that_pillow_decodes_by_itself():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".ppm"} <= image_suffixes()
    assert not {".eps", ".h5", ".mpg", ".wmf", ".pdf", ".txt", ""} & image_suffixes()


# Pillow warns of what it repairs, and of large sizes.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "ending", ["png", "jpg", "gif", "tif", "bmp", "webp", "jp2", "ppm", "tga", "qoi", "ico", "pcx"]
)
def test_damaged_files_are_broken_images_or_images(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    for number in range(60):
        content = bytearray(whole)
        for place in random.integers(0, min(len(content), 200), 4):
            content[place] = random.integers(256)
        path.write_bytes(content[: random.integers(1, len(content))] if number % 2 else content)
        with contextlib.suppress(BrokenImageError):
            assert read_image(path).mode == "RGB"
