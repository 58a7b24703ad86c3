"""From an image file to pixels: [3, H, W] float32 in [-1, 1], upright, cut as the geometry says."""

import struct
import zlib
from typing import BinaryIO

import numpy as np
import torch
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ExifTags import Base
from torch import Tensor

from simpletuner.data.geometry import Geometry

TRANSFORM_VERSION = "lanczos-1"
"""Part of every latent's key: to be changed with anything here that changes pixels."""

# Pillow picks a decoder by content, not by name, and some of its decoders start programs (EPS) or are rarely
# exercised; only these ever see a user's files. They are imported here because Pillow registers decoders when an image
# is first opened, and threads that open images at that moment are told that there is no decoder.
_FORMATS = tuple(
    str(decoder.format)
    for decoder in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        AvifImagePlugin.AvifImageFile,
    )
)

# What Pillow's decoders raise on damaged bytes, collected from their sources.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, the same for all files with the same defect."""


def read_size(file: BinaryIO) -> tuple[int, int]:
    """Returns (width, height) of the upright image; reads the header only. Raises BadImage, OSError."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            return _upright_size(image)
    except Image.DecompressionBombError as error:
        raise BadImage(_TOO_MANY_PIXELS) from error
    except _DAMAGED as error:
        raise _bad(error, _foreign(file)) from error


def _foreign(file: BinaryIO) -> str:
    """Returns what to say of a file that no decoder takes."""
    file.seek(0)
    head = file.read(32)
    if head[4:8] == b"ftyp" and b"hei" in head[8:]:
        return "HEIC, for which Pillow has no decoder: convert it to JPEG or PNG"
    if head.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return "JPEG XL, for which Pillow has no decoder: convert it to JPEG or PNG"
    return "not an image that can be read"


def open_rgb(file: BinaryIO) -> Image.Image:
    """Returns the decoded, upright image in 8-bit RGB; transparent parts are white. Raises BadImage."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            size, orientation = _upright_size(image), _orientation(image)
            image.load()
            rgb = _rgb(image)
    except Image.DecompressionBombError as error:
        raise BadImage(_TOO_MANY_PIXELS) from error
    except _DAMAGED as error:
        raise _bad(error, "truncated or corrupt") from error
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    if rgb.size != size:
        raise BadImage("it is of another size than its header or a table says")
    return rgb


def _bad(error: Exception, reason: str) -> Exception:
    """Returns the error to raise: a disk that fails (Pillow sets no errno) says nothing about the image."""
    return error if isinstance(error, OSError) and error.errno is not None else BadImage(reason)


_TOO_MANY_PIXELS = "more than 178 megapixels (a decompression bomb?)"  # where Pillow draws the line


def _upright_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage("not an image that can be read")
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _orientation(image: ImageFile.ImageFile) -> int:
    """Returns the EXIF orientation that is left to apply; damaged EXIF counts as upright."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and says the upright size from the start
    try:
        # Not image.getexif(): a PNG without EXIF would be decoded to look for it behind the pixels.
        return int(Image.Image.getexif(image).get(Base.Orientation, 1))
    except _DAMAGED:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Returns the image in 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_gray(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """Returns a 16-bit gray image in RGB; Pillow's own conversion would clip it at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage(f"pixel format '{image.mode}' (more than 16 bits a channel)")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def to_pixels(image: Image.Image, geometry: Geometry) -> Tensor:
    """Returns [3, H, W] float32 in [-1, 1]: the image scaled to cover the target and cut."""
    if image.size != geometry.original:
        raise BadImage("it is of another size than its header or a table says")
    if image.size != geometry.resized:
        image = image.resize(geometry.resized, Image.Resampling.LANCZOS)
    (left, top), (width, height) = (geometry.left, geometry.top), geometry.target
    array = np.array(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1.0  # pyright: ignore[reportUnknownMemberType]
