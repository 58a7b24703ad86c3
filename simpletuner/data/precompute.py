"""Fills the caches: latents as posterior mean and standard deviation, and text features, each encoded once.

What to encode is decided from the full ordered list of what is missing, in shards of fixed membership that are encoded
in fixed inner batches (encoders give slightly different numbers for other batch sizes). Finished shards drop out of
that list whole, so a killed run goes on to the very bytes of an undisturbed one.

Datasets say that they are not to be cached by ``vae_cache_disable`` and ``text_cache_disable``: see ``streaming.py``.

Shapes: B inner batch, C latent channels, h w latent size, H W pixels.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch

from simpletuner.batch import Cond
from simpletuner.config.backends import DatasetConfig, TextCacheConfig
from simpletuner.config.errors import UserError, printable
from simpletuner.data.buckets import Bucket, assign
from simpletuner.data.cache import Index, Keys, Reader, Store, digest, key_array, remove_stale
from simpletuner.data.captions import read_captions
from simpletuner.data.columns import Column, cell, each
from simpletuner.data.columns import compute as pc
from simpletuner.data.encode import LatentShard, encode_latents, encode_text, in_parts
from simpletuner.data.identity import (
    Encoding,
    KeyedBucket,
    Ranks,
    identify,
    keyed_buckets,
    prompt_key,
    text_key,
    text_keys,
)
from simpletuner.data.manifest import Manifest, Progress, scan

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prompts:
    """The features of the prompts that were encoded beside the captions."""

    reader: Reader = field(repr=False)
    places: Mapping[str, int]

    def __call__(self, text: str) -> Cond:
        """Returns the features [1, ...] of a prompt. Raises KeyError for one that was not encoded."""
        return {name: value.unsqueeze(0) for name, value in self.reader.row(self.places[text]).items()}


@dataclass(frozen=True)
class Cache:
    """The cached features of all datasets; the same on all ranks."""

    manifests: tuple[Manifest, ...]
    buckets: tuple[tuple[KeyedBucket, ...], ...]
    """One tuple a manifest."""
    latents: tuple[Index, ...]
    """One a manifest; empty where latents are not cached."""
    text: Index
    prompt: Prompts


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
    manifests = [read_captions(scan(dataset, progress=progress), write=True) for dataset in datasets if ranks.rank == 0]
    ranks.barrier()
    if ranks.rank > 0:
        manifests = [scan(dataset.model_copy(update={"skip_file_discovery": True})) for dataset in datasets]
        return [read_captions(manifest) for manifest in manifests]
    return manifests


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
    wanted = _text_keys(manifests, prompts)
    plan = zip(stores, manifests, buckets, strict=True)
    shards = [shard for store, manifest, kept in plan if store for shard in _missing_latents(store, manifest, kept)]
    # Datasets that share a folder may share images too.
    shards = list({(shard.store.folder, digest(*shard.keys)): shard for shard in shards}.values())
    missing = text_store.index().missing(wanted)
    texts = _texts(manifests, prompts, missing)
    alone = {prompt_key(text) for text in ("", *prompts)}
    chunks = [[key] for key in missing if key in alone]
    chunks += in_parts([key for key in missing if key not in alone], text_cache.write_batch_size)
    ranks.barrier()  # all have planned from the same state; only now may it change
    encode_latents(shards[ranks.rank :: ranks.world], encoding, progress)
    encode_text(chunks[ranks.rank :: ranks.world], texts, text_store, encoding, progress)
    ranks.barrier()
    text = text_store.index()
    latents = tuple(store.index() if store else Index() for store in stores)
    for store, manifest, kept, index in zip(stores, manifests, buckets, latents, strict=True):
        if store:
            _name_left_out(manifest, kept, index, aloud=ranks.rank == 0)
    places = text.places(key_array(map(prompt_key, ("", *prompts)))).tolist()
    found = Prompts(Reader(text), dict(zip(("", *prompts), places, strict=True)))
    return Cache(manifests, buckets, latents, text, found)


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
    wanted = _text_keys(manifests, prompts)
    missing, size_bytes = len(index.missing(wanted)), cond_numbers * encoding.text_dtype.itemsize
    total = len(np.unique(wanted))
    folder, total_bytes = text_cache.cache_dir, total * size_bytes
    found.append(Outstanding("captions", text_cache.id, folder, total, missing, total_bytes, missing * size_bytes))
    return found


def _missing_by_bucket(manifest: Manifest, index: Index) -> list[tuple[Bucket, int]]:
    """Returns the buckets, and how many of the latents of each are not in the index."""
    if not index.shards:  # nothing to look up: the keys of a million images take seconds to make
        upright = [(bucket, len(bucket)) for bucket in assign(manifest)]
        return upright * 2 if manifest.dataset.random_flip else upright
    ways = [way for kept in keyed_buckets(manifest) for way in (kept, kept.mirrored) if way]
    bad = key_array(index.bad)
    return [(way.bucket, int(((index.places(way.keys) < 0) & ~np.isin(way.keys, bad)).sum())) for way in ways]


def _text_keys(manifests: Iterable[Manifest], prompts: Iterable[str]) -> Keys:
    """Returns the keys of the empty prompt, the extra ones, and all captions that are cached, in order."""
    alone = key_array(map(prompt_key, ("", *prompts)))
    return np.concatenate([alone, *(text_keys(column) for column in _cached_captions(manifests))])


def _texts(manifests: Iterable[Manifest], prompts: Iterable[str], keys: Sequence[str]) -> dict[str, str]:
    """Returns key -> text of some of these."""
    wanted, texts = set(keys), {prompt_key(text): text for text in ("", *prompts)}
    for column in _cached_captions(manifests) if wanted else ():
        texts |= {key: caption for caption in each(column) if (key := text_key(caption)) in wanted}
    return texts


def _cached_captions(manifests: Iterable[Manifest]) -> Iterator[Column]:
    """Yields all captions of each dataset whose captions are cached."""
    for manifest in manifests:
        if not manifest.dataset.text_cache_disable:
            yield pc.list_flatten(manifest.rows["captions"])


def _missing_latents(store: Store, manifest: Manifest, buckets: Iterable[KeyedBucket]) -> Iterator[LatentShard]:
    """Yields the shards to encode: the missing latents of each bucket, ``write_batch_size`` to a shard."""
    index = store.index()
    upright = list(buckets)
    ways = [(kept, False) for kept in upright] + [(kept.mirrored, True) for kept in upright if kept.mirrored]
    for kept, mirrored in ways:
        missing = index.missing(kept.keys)
        if not missing:
            continue
        names = map(bytes.decode, reversed(kept.keys.tolist()))
        row_of = dict(zip(names, reversed(kept.bucket.entries.tolist()), strict=True))
        for keys in in_parts(missing, manifest.dataset.write_batch_size):
            yield LatentShard(store, manifest, kept.bucket.target, keys, [row_of[key] for key in keys], mirrored)


def _name_left_out(manifest: Manifest, buckets: Sequence[KeyedBucket], index: Index, aloud: bool) -> None:
    """Says which images could not be encoded. Raises UserError when that is all of a dataset."""
    left_out: dict[str, list[str]] = {}
    for kept in buckets:
        absent = index.places(kept.keys) < 0
        for key, row in zip(kept.keys[absent].tolist(), kept.bucket.entries[absent].tolist(), strict=True):
            reason = index.bad.get(key.decode(), "cannot be read")
            left_out.setdefault(reason, []).append(cell(manifest.rows, "path", row))
    where, count = f"dataset '{manifest.dataset.id}'", sum(map(len, left_out.values()))
    if count == sum(len(kept.keys) for kept in buckets):
        raise UserError(
            f"{where}: instance_data_dir: none of its {count} images can be used: {', '.join(sorted(left_out))}"
        )
    for reason, ids in left_out.items() if aloud else ():
        _LOG.warning(printable(f"{where}: {len(ids)} left out: {reason} (such as {ids[0]})"))
