import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base

from simpletuner.data import transforms
from simpletuner.data.geometry import Geometry
from simpletuner.data.transforms import BadImage, open_rgb, read_size, to_pixels
from tests.unit.data.support import picture


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> Image.Image:
    return open_rgb(io.BytesIO(data))


# How a camera stores an upright picture under each EXIF orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(kind: str, orientation: int):
    upright = picture(48, 32, seed=5)
    how = STORED[orientation]
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(upright if how is None else upright.transpose(how), kind, exif=exif.tobytes(), **options)
    assert read_size(io.BytesIO(data)) == (48, 32)
    image = decoded(data)
    assert image.size == (48, 32)
    difference = np.abs(np.asarray(image, int) - np.asarray(upright, int))
    assert difference.max() <= (0 if kind in ("PNG", "TIFF", "WEBP") else 40)
    assert difference.mean() < 4


class Counting(io.BytesIO):
    """Counts the bytes that are read from it."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "BMP", "GIF"])
def test_only_the_header_is_read_for_the_size(kind: str):
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    file = Counting(encoded(Image.fromarray(noise), kind))
    assert read_size(file) == (640, 480)
    size = len(file.getvalue())
    assert file.count < size / 10 or kind == "WEBP"  # its library wants the whole file, but decodes nothing yet


def test_transparent_parts_are_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (0, 0, 255, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    expected = [(0, 0, 255), (127, 127, 127), (255, 255, 255)]
    image = decoded(encoded(rgba, "PNG"))
    assert [image.getpixel((x, 0)) for x in range(3)] == expected
    gray = Image.new("LA", (2, 1), (0, 0))
    assert decoded(encoded(gray, "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palette_images_with_and_without_transparency():
    flat = Image.new("P", (2, 1))
    flat.putpalette([255, 0, 0, 0, 255, 0])
    flat.putpixel((1, 0), 1)
    image = decoded(encoded(flat, "PNG"))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (0, 255, 0)]
    image = decoded(encoded(flat, "GIF", transparency=1))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (255, 255, 255)]


def test_cmyk():
    image = decoded(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = image.getpixel((8, 8))
    assert (red > 240, green < 15, blue < 15) == (True, True, True)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_gray_values(kind: str):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = decoded(encoded(Image.fromarray(values), kind))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_one_bit_and_gray():
    assert decoded(encoded(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(encoded(Image.new("L", (2, 2), 77), "BMP")).getpixel((0, 0)) == (77, 77, 77)


def test_float_images_are_refused_by_name():
    with pytest.raises(BadImage, match="pixel format 'F'"):
        decoded(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_truncated_images_have_a_size_and_no_pixels(kind: str):
    data = encoded(picture(256, 256).resize((256, 256), Image.Resampling.NEAREST), kind)
    half = data[: len(data) // 2]
    if kind not in ("TIFF", "WEBP"):  # these keep their directory or length where the cut shows at once
        assert read_size(io.BytesIO(half)) == (256, 256)
    with pytest.raises(BadImage, match="truncated or corrupt"):
        decoded(half)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM" + bytes(60)])
def test_other_bytes_are_no_image(data: bytes):
    with pytest.raises(BadImage, match="not an image"):
        read_size(io.BytesIO(data))


def test_a_postscript_file_is_not_handed_to_an_interpreter():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"  # Pillow alone would take it
    with pytest.raises(BadImage, match="not an image"):
        read_size(io.BytesIO(data))


def test_decompression_bombs_are_refused_by_their_header():
    tall = encoded(Image.new("1", (20000, 20000)), "PNG")
    assert len(tall) < 200_000
    for read in (read_size, open_rgb):
        with pytest.raises(BadImage, match="decompression bomb"):
            read(io.BytesIO(tall))


def test_a_failing_disk_is_no_bad_image():
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        read_size(Failing())


def test_pixels_are_the_cut_of_the_scaled_image():
    image = picture(120, 80, seed=3)
    cut = Geometry((120, 80), (96, 64), 20, 0, (64, 64))
    pixels = to_pixels(image, cut)
    assert (pixels.shape, pixels.dtype) == ((3, 64, 64), torch.float32)
    scaled = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS))
    expected = torch.from_numpy(scaled[:, 20:84].copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels, expected)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_an_image_of_another_size_than_its_header_said_is_bad():
    with pytest.raises(BadImage, match="another size"):
        to_pixels(picture(10, 10), Geometry((10, 12), (10, 12), 0, 0, (8, 8)))


def test_every_suffix_that_is_listed_can_be_decoded(tmp_path: Path):
    from simpletuner.backends._base import IMAGE_SUFFIXES, UNREAD_SUFFIXES

    for suffix in IMAGE_SUFFIXES - UNREAD_SUFFIXES:
        path = tmp_path / f"x{suffix}"
        picture(16, 16).save(path)
        with path.open("rb") as file:
            assert open_rgb(file).size == (16, 16), suffix
    assert len(transforms._FORMATS) == 7
