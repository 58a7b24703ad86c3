"""What identifies cached features: the content of files, what is done to them, and who encodes them."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from simpletuner.backends._base import Backend, open_backend
from simpletuner.config.backends import DatasetConfig, TextCacheConfig
from simpletuner.data.buckets import Bucket, assign
from simpletuner.data.cache import Keys, Store, digest, key_array, write_atomically
from simpletuner.data.columns import Column, booleans, each, integers, strings
from simpletuner.data.columns import compute as pc
from simpletuner.data.geometry import Size, cuts, time_ids
from simpletuner.data.manifest import Manifest, Progress, manifest_path
from simpletuner.data.transforms import TRANSFORM_VERSION
from simpletuner.families._base import Encoders, ModelFamily, Part
from simpletuner.families._source import ModelSource
from simpletuner.quantization import quantize

_FORMAT = "1"  # of what a shard holds
_NUM_READERS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Encoding:
    """Who encodes, from which files, how."""

    family: ModelFamily
    source: ModelSource
    device: torch.device = torch.device("cpu")
    vae_dtype: torch.dtype = torch.float32
    text_dtype: torch.dtype = torch.float32
    text_precisions: tuple[str, ...] = ()
    """How each text encoder is quantized; none given: not at all."""

    def load(self, part: Part) -> Encoders:
        """Returns the encoders of a part on the device, quantized as they shall be."""
        dtype = self.vae_dtype if part == "vae" else self.text_dtype
        encoders = self.family.load_encoders(self.source, self.device, dtype, frozenset({part}))
        if part == "text" and self.text_precisions:
            for encoder, precision in zip(encoders.text_encoders or (), self.text_precisions, strict=True):
                quantize(encoder, precision, self.device)
        return encoders

    def latent_store(self, dataset: DatasetConfig) -> Store:
        """Returns where the latents of a dataset are."""
        vae = self.family.fingerprint(self.source, "vae")
        fingerprint = digest(_FORMAT, vae, str(self.vae_dtype), TRANSFORM_VERSION)
        return Store(dataset.cache_dir_vae, "latents", fingerprint, dataset.latents_remote)

    def text_store(self, text_cache: TextCacheConfig) -> Store:
        """Returns where the text features are."""
        text = self.family.fingerprint(self.source, "text")
        fingerprint = digest(_FORMAT, text, str(self.text_dtype), *self.text_precisions)
        return Store(text_cache.cache_dir, "text", fingerprint, text_cache.remote)


@dataclass(frozen=True)
class Ranks:
    """Which part of the work is this process's; every rank calls the same functions in the same order."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None
    """Returns when all ranks have called it."""


def text_key(caption: str) -> str:
    """Returns the key of a caption's features."""
    return digest(caption)


def text_keys(captions: Column) -> Keys:
    """Returns the keys of the features of a column of captions."""
    return key_array(map(text_key, each(captions)))


def prompt_key(prompt: str) -> str:
    """Returns the key of a prompt's features, which are encoded alone, as a pipeline does.

    In a batch they would differ in the last bits, so a caption of the same words has a key of its own.
    """
    return digest("prompt", prompt)


def latent_key(content: str, cut: Sequence[int], target: Size) -> str:
    """Returns the key of an image's latents: what is in the file, and what is done to it.

    Args:
        content: Digest of the file.
        cut: Resized width, height, crop left, top.
        target: Size that is cut.
    """
    return digest(content, f"{cut[0]}x{cut[1]}-{cut[2]}-{cut[3]}-{target[0]}x{target[1]}")


def mirrored_key(key: str) -> str:
    """Returns the key of the latents of the mirrored image; they are encoded, for mirrored latents are no image's."""
    return digest(key, "mirrored") if key else ""


@dataclass(frozen=True, eq=False)
class KeyedBucket:
    """A bucket with the keys of its latents."""

    bucket: Bucket
    keys: Keys
    """One an entry; b"" where the content is not known."""
    geometry: npt.NDArray[np.float32]
    """[n, 6] original height, width; crop top, left; target height, width."""
    mirrored: "KeyedBucket | None" = None
    """The same images mirrored, where they are shown so too; what is cut off on the right is then on the left."""


def keyed_buckets(manifest: Manifest) -> list[KeyedBucket]:
    """Returns the buckets of a manifest with the keys of their latents."""
    dataset, rows = manifest.dataset, manifest.rows
    widths, heights = integers(rows, "width"), integers(rows, "height")
    found: list[KeyedBucket] = []
    for bucket in assign(manifest):
        width, height = widths[bucket.entries], heights[bucket.entries]
        cut = cuts(dataset, each(rows["path"], bucket.entries), width, height, bucket.target)
        keys = key_array(
            latent_key(content, own.tolist(), bucket.target) if content else ""
            for content, own in zip(each(rows["digest"], bucket.entries), cut, strict=True)
        )
        upright, flipped = (
            time_ids(width, height, cut, bucket.target, np.full(len(bucket), way)) for way in (False, True)
        )
        mirrored = None
        if dataset.random_flip:
            mirrored = KeyedBucket(bucket, key_array(map(mirrored_key, map(bytes.decode, keys.tolist()))), flipped)
        found.append(KeyedBucket(bucket, keys, upright, mirrored))
    return found


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Generator[Result]:
    """Yields function(item) in order, with at most ``window`` of them under way or waiting to be taken."""
    remaining = iter(items)
    waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(remaining, window))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


def identify(manifest: Manifest, ranks: Ranks, progress: Progress | None = None) -> Manifest:
    """Returns the manifest with the content digest of every image; reads the files that have none yet.

    Ranks share the reading, and pass what they found on through files beside the manifest. A file that cannot be read
    keeps the digest "".
    """
    rows = manifest.rows
    unknown = list(each(rows["path"], np.flatnonzero(booleans(pc.equal(rows["digest"], "")))))
    found = _read_digests(manifest.dataset, unknown[ranks.rank :: ranks.world], progress)
    if ranks.world > 1:
        found = _exchange(manifest.dataset, found, ranks)
    if not found:
        return manifest
    pairs = zip(strings(manifest.files, "path"), strings(manifest.files, "digest"), strict=True)
    digests = pa.chunked_array([[found.get(path) or before for path, before in pairs]], pa.string())
    return manifest.with_files({"digest": digests}, write=ranks.rank == 0)


def _read_digests(dataset: DatasetConfig, paths: list[str], progress: Progress | None) -> dict[str, str]:
    """Returns path -> digest of the content."""
    if not paths:
        return {}
    backend = open_backend(dataset)
    found: dict[str, str] = {}
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for path, content in zip(paths, ahead(pool, lambda path: _content(backend, path), paths, 64), strict=True):
            found[path] = content
            if progress and (len(found) % 100 == 0 or len(found) == len(paths)):
                progress(len(found), len(paths), f"{dataset.id}: reading files")
    return found


def _content(backend: Backend, path: str) -> str:
    """Returns the digest of a file's content; "" when it cannot be read."""
    try:
        with backend.open(path) as file:
            return digest(file.read())
    except OSError:
        return ""


def _exchange(dataset: DatasetConfig, mine: dict[str, str], ranks: Ranks) -> dict[str, str]:
    """Returns what all ranks found."""
    parts = [manifest_path(dataset).with_suffix(f".part{rank}") for rank in range(ranks.world)]
    table = pa.table({"path": pa.array(list(mine), pa.string()), "digest": pa.array(list(mine.values()), pa.string())})
    write_atomically(parts[ranks.rank], lambda file: pq.write_table(table, file))
    ranks.barrier()
    found: dict[str, str] = {}
    for part in parts:
        with part.open("rb") as file:
            held = pq.read_table(file)
        found |= dict(zip(strings(held, "path"), strings(held, "digest"), strict=True))
    ranks.barrier()
    parts[ranks.rank].unlink()
    return found
