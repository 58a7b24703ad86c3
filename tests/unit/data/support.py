"""Small image folders, and an encoder whose features tell exactly what was encoded."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simpletuner.config.backends import DatasetConfig, TextCacheConfig


class CountingFamily:
    """Eightfold average pooling as VAE, a digest as text encoder; remembers what it was given.

    Like real encoders, its numbers depend a little on the size of the batch.
    """

    def __init__(self, vae: str = "vae", text: str = "text") -> None:
        self.names = {"vae": vae, "text": text}
        self.loaded: list[str] = []
        self.images: list[Tensor] = []
        self.prompts: list[str] = []
        self.batch_sizes: list[int] = []

    def load_encoders(self, source: Any, device: Any, dtype: Any, parts: frozenset[str], vae_dtype: Any = None) -> str:
        self.loaded += sorted(parts)
        return "encoders"

    def encode_image(self, encoders: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.images += list(pixels)
        self.batch_sizes.append(len(pixels))
        mean = torch.nn.functional.avg_pool2d(pixels, 8) + 1e-6 * len(pixels)
        return mean, mean.abs() + 1

    def encode_prompt(self, encoders: str, prompts: list[str]) -> dict[str, Tensor]:
        self.prompts += prompts
        numbers = [list(hashlib.sha256(prompt.encode()).digest()[:6]) for prompt in prompts]
        return {"tokens": torch.tensor(numbers).float().view(-1, 3, 2), "pooled": torch.tensor(numbers).float()}

    def uncond(self, cond: dict[str, Tensor], empty: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {name: torch.zeros_like(values) for name, values in cond.items()}

    def fingerprint(self, source: Any, part: str) -> str:
        return self.names[part]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return 3, height // 8, width // 8

    def cond_bytes(self, bytes_per_number: int) -> int:
        return 12 * bytes_per_number


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Returns a picture with structure that differs by seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def add_image(folder: Path, name: str, size: tuple[int, int], seed: int = 0, caption: str | None = "") -> Path:
    """Writes a picture and its caption (None: no caption file; "": one made of the name)."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(*size, seed).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption or f"caption of {name}")
    return path


def dataset(root: Path, **values: Any) -> DatasetConfig:
    """Returns a dataset of 64-pixel images in ``root/images``."""
    settings: dict[str, Any] = {
        "id": "pictures",
        "instance_data_dir": root / "images",
        "cache_dir_vae": root / "cache" / "vae",
        "resolution": 64,
        "resolution_type": "pixel",
        "alignment": 8,
        "train_batch_size": 2,
        "vae_batch_size": 2,
        "write_batch_size": 4,
    }
    return DatasetConfig(**{**settings, **values})


def text_cache(root: Path, **values: Any) -> TextCacheConfig:
    """Returns a text cache under ``root/cache/text``."""
    return TextCacheConfig(**{"cache_dir": root / "cache" / "text", "write_batch_size": 4, **values})
