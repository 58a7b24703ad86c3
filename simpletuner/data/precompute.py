"""Fills the caches: latents as posterior mean and standard deviation, and text features, each encoded once.

What to encode is decided from the full ordered list of what is missing, in shards of fixed membership that are encoded
in fixed inner batches (encoders give slightly different numbers for other batch sizes). Finished shards drop out of
that list whole, so a killed run goes on to the very bytes of an undisturbed one.

Datasets say that they are not to be cached by ``vae_cache_disable`` and ``text_cache_disable``: see ``streaming.py``.

Shapes: B inner batch, C latent channels, h w latent size, H W pixels.
"""

import gc
import io
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from simpletuner.backends._base import Backend, open_backend
from simpletuner.batch import Cond
from simpletuner.config.backends import DatasetConfig, TextCacheConfig
from simpletuner.config.errors import UserError, printable
from simpletuner.data.buckets import Bucket, assign
from simpletuner.data.cache import Index, Reader, Store, digest, remove_stale
from simpletuner.data.captions import read_captions
from simpletuner.data.geometry import Size, geometry
from simpletuner.data.identity import Encoding, KeyedBucket, Ranks, ahead, identify, keyed_buckets, prompt_key, text_key
from simpletuner.data.manifest import Manifest, Progress, scan
from simpletuner.data.transforms import BadImage, open_rgb, to_pixels

_LOG = logging.getLogger(__name__)

NUM_DECODERS = max(2, min(16, os.cpu_count() or 1))
"""Threads that decode images."""

_DECODED_BATCHES = 3  # inner batches that decoding is ahead of encoding
_TEXT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Cache:
    """The cached features of all datasets; the same on all ranks."""

    manifests: tuple[Manifest, ...]
    buckets: tuple[tuple[KeyedBucket, ...], ...]
    """One tuple a manifest."""
    latents: tuple[Index, ...]
    """One a manifest; empty where latents are not cached."""
    text: Index
    text_reader: Reader = field(repr=False)

    def prompt(self, text: str) -> Cond:
        """Returns the features [1, ...] of a prompt that was encoded. Raises KeyError for another."""
        row = self.text_reader.row(*self.text.rows[prompt_key(text)])
        return {name: value.unsqueeze(0) for name, value in row.items()}


@dataclass(frozen=True)
class Outstanding:
    """What one cache holds and lacks, as far as it can be told without reading images."""

    what: str
    """``latents`` or ``captions``."""
    id: str
    """Of the dataset or of the text cache."""
    folder: Path
    total: int
    missing: int
    """At most so many: an image whose content was never read may turn out to be cached."""
    total_bytes: int
    missing_bytes: int


def prepare(
    datasets: Iterable[DatasetConfig], ranks: Ranks | None = None, progress: Progress | None = None
) -> list[Manifest]:
    """Returns the manifests of the datasets with captions; rank 0 scans, the others read what it wrote."""
    ranks = ranks or Ranks()
    datasets = list(datasets)
    manifests = [scan(dataset, progress=progress) for dataset in datasets] if ranks.rank == 0 else []
    ranks.barrier()
    if ranks.rank > 0:
        manifests = [scan(dataset.model_copy(update={"skip_file_discovery": True})) for dataset in datasets]
    return [read_captions(manifest) for manifest in manifests]


def precompute(
    manifests: Sequence[Manifest],
    text_cache: TextCacheConfig,
    encoding: Encoding,
    prompts: Iterable[str] = (),
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Returns the caches with all that is to be cached; an encoder is loaded only for what is missing, and then freed.

    Args:
        manifests: With captions (``prepare``).
        text_cache: Where text features go.
        encoding: Who encodes.
        prompts: To encode beside the captions, one by one; the empty prompt always is.
        ranks: The share of this process; None: everything.
        progress: Told what was encoded by this rank.

    Raises:
        UserError: An encoder gives numbers that are not finite, a cache folder cannot be written, or no image of a
            dataset could be decoded.
    """
    ranks, prompts = ranks or Ranks(), tuple(prompts)
    manifests = tuple(m if m.dataset.vae_cache_disable else identify(m, ranks, progress) for m in manifests)
    buckets = tuple(tuple(keyed_buckets(manifest)) for manifest in manifests)
    stores = [None if m.dataset.vae_cache_disable else encoding.latent_store(m.dataset) for m in manifests]
    text_store = encoding.text_store(text_cache)
    for store in (*filter(None, stores), text_store):
        remove_stale(store.folder)
        if ranks.rank == 0:
            store.synchronise()
    ranks.barrier()
    texts = _texts(manifests, prompts)
    plan = zip(stores, manifests, buckets, strict=True)
    shards = [shard for store, manifest, kept in plan if store for shard in _missing_latents(store, manifest, kept)]
    # Datasets that share a folder may share images too.
    shards = list({(shard.store.folder, digest(*shard.keys)): shard for shard in shards}.values())
    missing = text_store.index().missing(texts)
    alone = {prompt_key(text) for text in ("", *prompts)}
    chunks = [[key] for key in missing if key in alone]
    chunks += _chunks([key for key in missing if key not in alone], text_cache.write_batch_size)
    ranks.barrier()  # all have planned from the same state; only now may it change
    _encode_latents(shards[ranks.rank :: ranks.world], encoding, progress)
    _encode_text(chunks[ranks.rank :: ranks.world], texts, text_store, encoding, progress)
    ranks.barrier()
    text = text_store.index()
    latents = tuple(store.index() if store else Index() for store in stores)
    for store, manifest, kept, index in zip(stores, manifests, buckets, latents, strict=True):
        if store:
            _name_left_out(manifest, kept, index, aloud=ranks.rank == 0)
    return Cache(manifests, buckets, latents, text, Reader(text.shards))


def outstanding(
    manifests: Sequence[Manifest],
    text_cache: TextCacheConfig,
    encoding: Encoding,
    cond_numbers: int,
    prompts: Iterable[str] = (),
    encoders_here: bool = True,
) -> list[Outstanding]:
    """Returns what each cache lacks and how large it gets; loads no weights, reads no image, writes nothing.

    Args:
        manifests: With captions (``prepare``).
        text_cache: Where text features go.
        encoding: Who would encode.
        cond_numbers: How many numbers the features of one prompt are.
        prompts: To encode beside the captions.
        encoders_here: False when the encoders' files are still to be downloaded: then everything counts as missing,
            because what was cached cannot be told to be theirs.
    """
    family = encoding.family
    found: list[Outstanding] = []
    for manifest in manifests:
        if manifest.dataset.vae_cache_disable:
            continue
        index = encoding.latent_store(manifest.dataset).index() if encoders_here else Index()
        total = missing = total_bytes = missing_bytes = 0
        for bucket, absent in _missing_by_bucket(manifest, index):
            size_bytes = prod(family.latent_shape(*bucket.target)) * 2 * torch.float32.itemsize  # mean and std
            total, total_bytes = total + len(bucket), total_bytes + len(bucket) * size_bytes
            missing, missing_bytes = missing + absent, missing_bytes + absent * size_bytes
        folder = manifest.dataset.cache_dir_vae
        found.append(Outstanding("latents", manifest.dataset.id, folder, total, missing, total_bytes, missing_bytes))
    index = encoding.text_store(text_cache).index() if encoders_here else Index()
    texts = _texts(manifests, prompts)
    missing, size_bytes = len(index.missing(texts)), cond_numbers * encoding.text_dtype.itemsize
    total = len(texts)
    folder, total_bytes = text_cache.cache_dir, total * size_bytes
    found.append(Outstanding("captions", text_cache.id, folder, total, missing, total_bytes, missing * size_bytes))
    return found


def _missing_by_bucket(manifest: Manifest, index: Index) -> list[tuple[Bucket, int]]:
    """Returns the buckets, and how many of the latents of each are not in the index."""
    if not index.rows and not index.bad:  # nothing to look up: the keys of a million images take seconds to make
        upright = [(bucket, len(bucket)) for bucket in assign(manifest)]
        return upright * 2 if manifest.dataset.random_flip else upright
    ways = [way for kept in keyed_buckets(manifest) for way in (kept, kept.mirrored) if way]
    return [
        (way.bucket, sum(not key or (key not in index.rows and key not in index.bad) for key in way.keys))
        for way in ways
    ]


def _texts(manifests: Iterable[Manifest], prompts: Iterable[str]) -> dict[str, str]:
    """Returns key -> text of the empty prompt, the extra ones, and all captions that are cached, in order."""
    texts = {prompt_key(text): text for text in ("", *prompts)}
    for manifest in (manifest for manifest in manifests if not manifest.dataset.text_cache_disable):
        texts |= {text_key(caption): caption for captions in manifest.captions for caption in captions}
    return texts


def _chunks(keys: Sequence[str], size: int) -> list[Sequence[str]]:
    return [keys[start : start + size] for start in range(0, len(keys), size)]


@dataclass(frozen=True)
class _Shard:
    """The latents of one file: images of one bucket, in order."""

    store: Store
    manifest: Manifest
    target: Size
    keys: Sequence[str]
    rows: Sequence[int]
    mirrored: bool


def _missing_latents(store: Store, manifest: Manifest, buckets: Iterable[KeyedBucket]) -> Iterator[_Shard]:
    """Yields the shards to encode: the missing latents of each bucket, ``write_batch_size`` to a shard."""
    index = store.index()
    upright = list(buckets)
    ways = [(kept, False) for kept in upright] + [(kept.mirrored, True) for kept in upright if kept.mirrored]
    for kept, mirrored in ways:
        row_of = dict(zip(reversed(kept.keys), reversed(kept.bucket.entries.tolist()), strict=True))
        for keys in _chunks(index.missing(filter(None, kept.keys)), manifest.dataset.write_batch_size):
            yield _Shard(store, manifest, kept.bucket.target, keys, [row_of[key] for key in keys], mirrored)


def _encode_latents(shards: Sequence[_Shard], encoding: Encoding, progress: Progress | None) -> None:
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


def _decode(backend: Backend, shard: _Shard, row: int) -> Tensor | str | None:
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
    shard: _Shard, decoded: Iterator[Tensor | str | None], encoding: Encoding, encoders: Any
) -> Iterator[int]:
    """Writes one shard; yields how many images each inner batch has dealt with."""
    kept: list[str] = []
    bad: dict[str, str] = {}
    parts: dict[str, list[Tensor]] = {}
    for keys in _chunks(shard.keys, shard.manifest.dataset.vae_batch_size):
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


def _require_finite(shard: _Shard, keys: Sequence[str], good: Sequence[int], moments: Sequence[Tensor]) -> None:
    """Raises UserError naming the first image whose latents are not numbers."""
    for row, number in enumerate(good):
        if not all(bool(values[row].isfinite().all()) for values in moments):
            path = shard.manifest.rows["path"][shard.rows[shard.keys.index(keys[number])]].as_py()
            raise UserError(
                f"dataset '{shard.manifest.dataset.id}': the VAE gives NaN or infinity for '{path}': "
                "set vae_dtype to fp32 or bf16 (some VAEs overflow in fp16)"
            )


def _encode_text(
    chunks: Sequence[Sequence[str]], texts: dict[str, str], store: Store, encoding: Encoding, progress: Progress | None
) -> None:
    """Encodes and writes shards of text features."""
    if not chunks:
        return
    encoders = encoding.load("text")
    total, done = sum(len(keys) for keys in chunks), 0
    for shard in chunks:
        parts: dict[str, list[Tensor]] = {}
        for keys in _chunks(shard, _TEXT_BATCH_SIZE):
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


def _name_left_out(manifest: Manifest, buckets: Sequence[KeyedBucket], index: Index, aloud: bool) -> None:
    """Says which images could not be encoded. Raises UserError when that is all of a dataset."""
    paths, left_out = manifest.ids, dict[str, list[str]]()
    for kept in buckets:
        for key, row in zip(kept.keys, kept.bucket.entries.tolist(), strict=True):
            if key not in index.rows:
                left_out.setdefault(index.bad.get(key, "cannot be read"), []).append(paths[row])
    where, count = f"dataset '{manifest.dataset.id}'", sum(map(len, left_out.values()))
    if count == sum(len(kept.keys) for kept in buckets):
        raise UserError(
            f"{where}: instance_data_dir: none of its {count} images can be used: {', '.join(sorted(left_out))}"
        )
    for reason, ids in left_out.items() if aloud else ():
        _LOG.warning(printable(f"{where}: {len(ids)} left out: {reason} (such as {ids[0]})"))
