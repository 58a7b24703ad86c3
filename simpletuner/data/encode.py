"""Encodes shards of latents and of text features, each in fixed inner batches, and writes them.

Shapes: B inner batch, C latent channels, h w latent size, H W pixels.
"""

import ctypes
import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import torch
from torch import Tensor

from simpletuner.backends._base import Backend, open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.cache import Store, digest
from simpletuner.data.columns import cell
from simpletuner.data.geometry import Size, geometry
from simpletuner.data.identity import Encoding, ahead
from simpletuner.data.manifest import Manifest, Progress
from simpletuner.data.transforms import BadImage, open_rgb, to_pixels

NUM_DECODERS = max(2, min(16, os.cpu_count() or 1))
"""Threads that decode images."""

_DECODED_BATCHES = 3  # inner batches that decoding is ahead of encoding
_TEXT_BATCH_SIZE = 16


def in_parts(keys: Sequence[str], size: int) -> list[Sequence[str]]:
    """Returns the keys, so many at a time."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]


@dataclass(frozen=True)
class LatentShard:
    """The latents of one file: images of one bucket, in order."""

    store: Store
    manifest: Manifest
    target: Size
    keys: Sequence[str]
    rows: Sequence[int]
    mirrored: bool


def encode_latents(shards: Sequence[LatentShard], encoding: Encoding, progress: Progress | None) -> None:
    """Encodes and writes shards; images are decoded by other threads meanwhile."""
    if not shards:
        return
    encoders = encoding.load("vae")
    total, done = sum(len(shard.keys) for shard in shards), 0
    window = _DECODED_BATCHES * max(shard.manifest.dataset.vae_batch_size for shard in shards)
    backends: dict[str, Backend] = {}
    for shard in shards:
        backends.setdefault(shard.manifest.dataset.id, open_backend(shard.manifest.dataset))
    jobs = ((shard, row) for shard in shards for row in shard.rows)
    with ThreadPoolExecutor(NUM_DECODERS) as pool:
        decoded = ahead(pool, lambda job: _decode(backends[job[0].manifest.dataset.id], *job), jobs, window)
        for shard in shards:
            for count in _encode_shard(shard, decoded, encoding, encoders):
                done += count
                if progress:
                    progress(done, total, f"{shard.manifest.dataset.id}: encoding images")
    del encoders
    _free(encoding.device)


def _decode(backend: Backend, shard: LatentShard, row: int) -> Tensor | str | None:
    """Returns the pixels [3, H, W] of an image, why it is bad, or None when it cannot be read now."""
    entry = shard.manifest.rows.slice(row, 1).to_pylist()[0]
    try:
        with backend.open(entry["path"]) as file:
            content = file.read()
    except OSError:
        return None
    if digest(content) != entry["digest"]:
        return None  # it was changed since it was identified: the next start finds it under its new key
    try:
        size = entry["width"], entry["height"]
        return cut_image(shard.manifest.dataset, entry["path"], size, io.BytesIO(content), shard.mirrored)
    except BadImage as error:
        return str(error)


def cut_image(dataset: DatasetConfig, crop_id: str, size: Size, file: BinaryIO, mirrored: bool) -> Tensor:
    """Returns the pixels [3, H, W] of an image as it is trained on.

    Args:
        dataset: Says what is done to the image.
        crop_id: Decides a random crop: the image's own id, unless it is cut anew each time.
        size: Width and height as scanned.
        file: The image file.
        mirrored: Whether it is shown mirrored.

    Raises:
        BadImage: It is broken, or of another size.
    """
    pixels = to_pixels(open_rgb(file), geometry(dataset, crop_id, *size))
    return pixels.flip(-1) if mirrored else pixels


def _encode_shard(
    shard: LatentShard, decoded: Iterator[Tensor | str | None], encoding: Encoding, encoders: Any
) -> Iterator[int]:
    """Writes one shard; yields how many images each inner batch has dealt with."""
    kept: list[str] = []
    bad: dict[str, str] = {}
    parts: dict[str, list[Tensor]] = {}
    for keys in in_parts(shard.keys, shard.manifest.dataset.vae_batch_size):
        images = [next(decoded) for _ in keys]
        good = [number for number, image in enumerate(images) if isinstance(image, Tensor)]
        bad |= {key: image for key, image in zip(keys, images, strict=True) if isinstance(image, str)}
        if good:
            # Black stands in for a bad image: the others are encoded in a batch of the same size as without it.
            blank = torch.zeros(3, shard.target[1], shard.target[0])
            pixels = torch.stack([image if isinstance(image, Tensor) else blank for image in images])
            for name, values in posterior(pixels, encoding, encoders).items():
                parts.setdefault(name, []).append(values.cpu()[good])
            kept.extend(keys[number] for number in good)
            _require_finite(shard, keys, good, [values[-1] for values in parts.values()])
        yield len(keys)
    shard.store.write(shard.keys, {name: torch.cat(values) for name, values in parts.items()}, kept, bad)


def posterior(pixels: Tensor, encoding: Encoding, encoders: Any) -> dict[str, Tensor]:
    """Returns mean and, where the encoder has one, std, [B, C, h, w] on the encoder's device."""
    with torch.no_grad():
        mean, std = encoding.family.encode_image(encoders, pixels.to(encoding.device, non_blocking=True))
    return {"mean": mean} if std is None else {"mean": mean, "std": std}


def _require_finite(shard: LatentShard, keys: Sequence[str], good: Sequence[int], moments: Sequence[Tensor]) -> None:
    """Raises UserError naming the first image whose latents are not numbers."""
    for row, number in enumerate(good):
        if not all(bool(values[row].isfinite().all()) for values in moments):
            path = cell(shard.manifest.rows, "path", shard.rows[shard.keys.index(keys[number])])
            raise UserError(
                f"dataset '{shard.manifest.dataset.id}': the VAE gives NaN or infinity for '{path}': "
                "set vae_dtype to fp32 or bf16 (some VAEs overflow in fp16)"
            )


def encode_text(
    chunks: Sequence[Sequence[str]], texts: dict[str, str], store: Store, encoding: Encoding, progress: Progress | None
) -> None:
    """Encodes and writes shards of text features."""
    if not chunks:
        return
    encoders = encoding.load("text")
    total, done = sum(len(keys) for keys in chunks), 0
    for shard in chunks:
        parts: dict[str, list[Tensor]] = {}
        for keys in in_parts(shard, _TEXT_BATCH_SIZE):
            with torch.no_grad():
                cond = encoding.family.encode_prompt(encoders, [texts[key] for key in keys])
            for name, values in cond.items():
                if values.is_floating_point() and not bool(values.isfinite().all()):
                    raise UserError("the text encoder gives NaN or infinity: set mixed_precision to bf16 or no")
                parts.setdefault(name, []).append(values.detach().cpu())
            done += len(keys)
            if progress:
                progress(done, total, "encoding captions")
        store.write(shard, {name: torch.cat(values) for name, values in parts.items()}, shard, {})
    del encoders
    _free(encoding.device)


def _free(device: torch.device) -> None:
    """Gives the memory of an encoder that nothing refers to any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def give_back_memory() -> None:
    """Gives what is free in this process back to the system: what was needed to fill the caches is not needed again."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # it is glibc's own
        libc.malloc_trim(0)
