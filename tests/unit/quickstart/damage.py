"""What a VAE and a compression do to pictures, stronger than they should."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def jpeg(picture: Image.Image, quality: int = 50) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def blurred(picture: Image.Image, sigma_px: float = 0.7) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(sigma_px))


def noisy(picture: Image.Image, sigma: float = 8.0, seed: int = 0) -> Image.Image:
    pixels = np.asarray(picture, np.float32)
    pixels = pixels + np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def coarsened(picture: Image.Image, factor: float = 1.5) -> Image.Image:
    small = picture.resize([round(edge / factor) for edge in picture.size], Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.BICUBIC)


def noise_only(picture: Image.Image, seed: int = 0) -> Image.Image:
    shape = (picture.height, picture.width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


MILD: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda picture: picture,
    "JPEG of quality 50": jpeg,
    "blur of 0.7 px": blurred,
    "noise of sigma 8": noisy,
    "1.5 times smaller and back": coarsened,
    "all of them": lambda picture: jpeg(noisy(coarsened(blurred(picture)))),
}
