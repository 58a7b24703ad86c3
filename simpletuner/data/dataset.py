"""Batches of features in the sampler's order, prefetched by threads, as this rank's share.

Features are read from the caches; those of datasets that are not cached are made when their batch is taken.

Shapes: B samples of this rank, C latent channels, h w latent size, H W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import count, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from simpletuner.batch import Batch, Cond
from simpletuner.config.backends import DatasetConfig
from simpletuner.data.cache import Reader
from simpletuner.data.columns import Column, cell, integers
from simpletuner.data.columns import compute as pc
from simpletuner.data.encode import NUM_DECODERS
from simpletuner.data.geometry import Size, cut_anew
from simpletuner.data.identity import Encoding, Ranks, ahead, text_keys
from simpletuner.data.precompute import Cache
from simpletuner.data.sampler import Draw, Position, SampledDataset, Sampler, Window, share
from simpletuner.data.streaming import LiveEncoders, Pictures, live_parts
from simpletuner.randomness import Randomness

Uncond = Callable[[Cond, Cond], Cond]
"""(cond, features of the empty prompt) -> the unconditional features in the shape of cond."""

_PREFETCHED = 4

Integers = npt.NDArray[np.integer[Any]]
"""Whole numbers of the smallest type that holds them."""


@dataclass(frozen=True, eq=False)
class _Images:
    """The usable images of one dataset, as arrays of 24 bytes an image.

    n images in all; bucket b is ``starts[b] : starts[b + 1]``.
    """

    paths: Column
    """Of all files, mapped from the manifest."""
    numbers: Integers
    """[n] which of the paths is an image's id."""
    starts: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    """Height, width of each bucket."""
    geometry: Integers
    """[ways, n, 4] original height, width; crop top, left. Ways are 2 where images are shown mirrored too, else 1."""
    latents: Integers
    """[ways, n] places of the latents."""
    reader: Reader
    pictures: Pictures | None
    """In place of ``latents``, which are then empty, where these are not cached."""
    cut_anew: DatasetConfig | None
    """The dataset, where an image is cut anew each time it is shown."""
    vae_batch_size: int
    caption_starts: Integers
    """[n + 1] where in ``captions``, or ``texts``, an image's own begin."""
    captions: Integers
    """[number of captions] places of their features."""
    texts: Column | None
    """The captions themselves, in place of ``captions``, where text features are not cached."""


@dataclass(frozen=True)
class _Read:
    """A batch as the threads bring it."""

    batch: Batch
    """What is not cached is still empty."""
    images: _Images
    pixels: Tensor | None
    """[B, 3, H, W], where latents are not cached."""
    texts: tuple[str, ...]
    """One caption a sample, where text features are not cached."""


class CachedDataset:
    """All datasets of a run as one endless stream of batches."""

    def __init__(
        self,
        cache: Cache,
        uncond: Uncond,
        seed: int,
        caption_dropout: float = 0.0,
        ranks: Ranks | None = None,
        pin_memory: bool = False,
        encoding: Encoding | None = None,
        windows: Mapping[str, Window] | None = None,
    ) -> None:
        """Resolves where each image's features are, and reads none; loads the encoders of what is not cached.

        Args:
            cache: What ``precompute`` returned.
            uncond: ``family.uncond``.
            seed: Of the run.
            caption_dropout: Probability that a sample is shown without its caption.
            ranks: Which share of each batch is this process's.
            pin_memory: Page-lock batches, for faster copies to a CUDA device.
            encoding: Who encodes what is not cached; None: everything is.
            windows: Dataset id -> when it is shown; those that are not named always are.
        """
        self._ranks = ranks or Ranks()
        self._uncond, self._dropout, self._pin = uncond, caption_dropout, pin_memory
        self._randomness = Randomness(seed)
        self._text = Reader(cache.text)
        self.prompt = cache.prompt
        """Text -> features [1, ...] of a prompt that was encoded beside the captions."""
        self._empty = self.prompt("")
        parts = live_parts(manifest.dataset for manifest in cache.manifests)
        assert encoding is not None or not parts
        self._encoders = LiveEncoders(encoding, parts) if encoding is not None else None
        resolved = [_resolve(cache, number) for number in range(len(cache.manifests))]
        self._images = [images for images, _ in resolved]
        self.problems = {
            manifest.dataset.id: {**manifest.problems, **problems}
            for manifest, (_, problems) in zip(cache.manifests, resolved, strict=True)
        }
        """Dataset id -> reason -> ids of the images left out, those that turned out bad when decoded included."""
        self.sampler = Sampler(
            [
                SampledDataset(
                    manifest.dataset.id,
                    tuple(int(n) for n in np.diff(images.starts)),
                    manifest.dataset.train_batch_size * self._ranks.world,
                    manifest.dataset.repeats,
                    manifest.dataset.probability,
                    (windows or {}).get(manifest.dataset.id, Window()),
                )
                for manifest, images in zip(cache.manifests, self._images, strict=True)
            ],
            seed,
        )

    @property
    def batches_per_epoch(self) -> dict[str, int]:
        """Dataset id -> global batches of one of its epochs."""
        return {dataset.id: dataset.num_batches for dataset in self.sampler.datasets}

    def examples(self, num_images: int, num_buckets: int) -> Iterator[tuple[str, Size, int, list[str]]]:
        """Yields dataset, width and height, number of images, and the ids of some, of the largest buckets of each."""
        for dataset, images in zip(self.sampler.datasets, self._images, strict=True):
            sizes = dataset.bucket_sizes
            for bucket in sorted(range(len(sizes)), key=lambda number: -sizes[number])[:num_buckets]:
                start = images.starts[bucket]
                numbers = images.numbers[start : start + min(num_images, sizes[bucket])].tolist()
                height, width = images.targets[bucket]
                ids = [images.paths[number].as_py() for number in numbers]
                yield dataset.id, (width, height), sizes[bucket], ids

    def batches(self, position: Position | None = None, drawn: int = 0) -> Iterator[tuple[Batch, Position]]:
        """Yields (batch of this rank, position behind it), as long as a dataset is shown.

        Later batches are read meanwhile by a thread.

        Save the position of the last batch that was trained on: what was only prefetched is not in it.

        Args:
            position: Where to go on; None: the beginning.
            drawn: Batches that the run has drawn before.
        """
        draws = self._draws(position, drawn)
        with (
            ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="pictures") as decoders,
            ThreadPoolExecutor(1, thread_name_prefix="batches") as pool,
            closing(ahead(pool, lambda item: self._read(*item, decoders), draws, _PREFETCHED)) as read,
        ):
            for batch, after in read:
                yield self._encoded(batch), after

    def _draws(self, position: Position | None, drawn: int) -> Iterator[tuple[Draw, Position]]:
        """Yields which images make each batch, and the position behind it."""
        after = self.sampler.start(position)
        for number in takewhile(self.sampler.shows, count(drawn)):
            draw, after = self.sampler.next(after, number)
            yield draw, after

    def _read(self, draw: Draw, after: Position, decoders: ThreadPoolExecutor) -> tuple[_Read, Position]:
        """Returns this rank's share of a batch as far as it can be read, and the position behind it."""
        images = self._images[draw.dataset]
        batch, rows, ways = self._share(draw, images)
        choices = self._captions(images, rows, batch.position)
        pixels, texts = None, tuple(images.texts[choice].as_py() for choice in choices) if images.texts else ()
        if images.pictures is None:
            batch = replace(
                batch, **stacked([images.reader.row(place) for place in images.latents[ways, rows].tolist()])
            )
        else:
            crop_ids = self._crop_ids(batch.position) if images.cut_anew else batch.ids
            mirrored = ways.astype(bool).tolist()
            pixels, good = images.pictures.read(batch.ids, crop_ids, batch.geometry, mirrored, decoders)
            batch = replace(batch, weight=batch.weight * good)
        if not texts:
            cond = stacked([self._text.row(place) for place in images.captions[choices].tolist()])
            batch = replace(batch, cond=self._with_dropped(cond, batch.dropped))
        read = _Read(batch, images, pixels, texts)
        return (_pinned(read) if self._pin else read), after

    def _share(self, draw: Draw, images: _Images) -> tuple[Batch, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns this rank's share of a batch without features, and which images, [B] rows and [B] ways.

        When there is nothing for this rank it is one filler sample of weight 0.
        """
        mine = share(len(draw.members), self._ranks.rank, self._ranks.world)
        weight, mine = float(len(mine) > 0), mine or range(1)
        rows = images.starts[draw.bucket] + draw.members[mine.start : mine.stop]
        positions = torch.arange(mine.start, mine.stop) + draw.first_sample
        ways = np.zeros(len(rows), np.int64)
        if len(images.geometry) > 1:
            ways = self._randomness.integers("flip", positions, len(images.geometry)).numpy()
        dropped = torch.zeros(len(rows), dtype=torch.bool)
        if self._dropout > 0:
            dropped = self._randomness.uniform("caption_dropout", positions) < self._dropout
        target = np.broadcast_to(images.targets[draw.bucket], (len(rows), 2))
        geometry = np.concatenate([images.geometry[ways, rows], target], axis=1).astype(np.float32)
        if images.cut_anew is not None:
            geometry = cut_anew(images.cut_anew, self._crop_ids(positions), geometry, ways.astype(bool))
        batch = Batch(
            mean=torch.empty(0),
            std=None,
            cond={},
            dropped=dropped,
            geometry=torch.from_numpy(geometry),  # pyright: ignore[reportUnknownMemberType]
            position=positions,
            weight=torch.full((len(rows),), weight),
            ids=tuple(images.paths[number].as_py() for number in images.numbers[rows].tolist()),
            global_weight=float(len(draw.members)),
        )
        return batch, rows, ways

    def _crop_ids(self, positions: Tensor) -> list[str]:
        """Returns what decides the crops of samples whose images are cut anew: their places in the run."""
        return [f"{self._randomness.seed}/{position}" for position in positions.tolist()]

    def _encoded(self, read: _Read) -> Batch:
        """Returns a batch with what is not cached encoded."""
        batch = read.batch
        if self._encoders is None:
            return batch
        if read.pixels is not None:
            batch = replace(batch, **self._encoders.latents(read.pixels, read.images.vae_batch_size))
        if read.texts:
            batch = replace(batch, cond=self._with_dropped(self._encoders.text(read.texts), batch.dropped))
        return batch

    def _captions(self, images: _Images, rows: npt.NDArray[np.int64], positions: Tensor) -> list[int]:
        """Returns the number of one drawn caption for each image."""
        drawn: list[int] = []
        for row, position in zip(rows.tolist(), positions, strict=True):
            first, end = images.caption_starts[row : row + 2].tolist()
            choice = int(self._randomness.integers("caption", position[None], end - first)) if end - first > 1 else 0
            drawn.append(first + choice)
        return drawn

    def _with_dropped(self, cond: Cond, dropped: Tensor) -> Cond:
        """Returns text features [B, ...] with the unconditional ones where captions are dropped [B]."""
        if not bool(dropped.any()):
            return cond
        uncond = self._uncond(cond, self._empty)
        shape = {name: (-1, *[1] * (values.ndim - 1)) for name, values in cond.items()}
        return {
            name: torch.where(dropped.to(values.device).view(shape[name]), uncond[name], values)
            for name, values in cond.items()
        }


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the features [B, ...] of B entries, by name.

    The bytes are copied by numpy in this thread. torch.stack shares them out to as many threads as there are cores, and
    waits for each: on a machine that was busy with training that took 8 ms a sample of 0.26 MB, instead of 0.05.
    """
    return {name: _copied([row[name] for row in rows]) for name in rows[0]}


def _copied(rows: Sequence[Tensor]) -> Tensor:
    """Returns [B, ...] of B contiguous tensors of at least one dimension."""
    together = np.stack([row.view(torch.uint8).numpy() for row in rows])
    return torch.from_numpy(together).view(rows[0].dtype)  # pyright: ignore[reportUnknownMemberType]


def _resolve(cache: Cache, number: int) -> tuple[_Images, dict[str, tuple[str, ...]]]:
    """Returns the images of a dataset that have latents, or will get them, and why the others have none."""
    manifest, index = cache.manifests[number], cache.latents[number]
    dataset, all_rows = manifest.dataset, manifest.rows
    rows: list[npt.NDArray[np.int64]] = []
    latents: list[npt.NDArray[np.int64]] = []
    geometry: list[npt.NDArray[np.float32]] = []
    problems: dict[str, list[str]] = {}
    for kept in cache.buckets[number]:
        ways = [kept, kept.mirrored] if kept.mirrored else [kept]
        places = np.stack([index.places(way.keys) for way in ways])
        usable = dataset.vae_cache_disable | (places >= 0).all(axis=0)
        for key, row in zip(kept.keys[~usable].tolist(), kept.bucket.entries[~usable].tolist(), strict=True):
            reason = index.bad.get(key.decode(), "could not be read when it was to be encoded")
            problems.setdefault(reason, []).append(cell(all_rows, "path", row))
        rows.append(kept.bucket.entries[usable])
        latents.append(places[:, usable])
        geometry.append(np.stack([way.geometry[usable, :4] for way in ways]))
    order = np.concatenate(rows)
    captions: Column = all_rows["captions"]
    captions = captions.take(pa.array(order))
    texts, lengths = pc.list_flatten(captions), np.asarray(pc.list_value_length(captions).to_numpy())
    places = np.zeros(0, np.int64)
    if not dataset.text_cache_disable:
        places = cache.text.places(text_keys(texts))
        assert (places >= 0).all()
    images = _Images(
        paths=manifest.files["path"],
        numbers=_small(integers(all_rows, "number")[order]),
        starts=tuple(np.cumsum([0, *map(len, rows)]).tolist()),
        targets=tuple((kept.bucket.target[1], kept.bucket.target[0]) for kept in cache.buckets[number]),
        geometry=_small(np.concatenate(geometry, axis=1)),
        latents=_small(np.concatenate(latents, axis=1)),
        reader=Reader(index),
        pictures=Pictures(dataset) if dataset.vae_cache_disable else None,
        cut_anew=dataset if dataset.vae_cache_clear_each_epoch else None,
        vae_batch_size=dataset.vae_batch_size,
        caption_starts=_small(np.cumsum([0, *lengths.tolist()], dtype=np.int64)),
        captions=_small(places),
        texts=texts if dataset.text_cache_disable else None,
    )
    return images, {reason: tuple(ids) for reason, ids in problems.items()}


def _small(numbers: npt.NDArray[Any]) -> Integers:
    """Returns whole numbers in a type that just holds them."""
    least, most = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
    fitting = (
        kind for kind in (np.uint16, np.int32, np.int64) if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max
    )
    return numbers.astype(next(fitting))


def _pinned(read: _Read) -> _Read:
    """Returns the batch in page-locked memory."""
    batch, pixels = read.batch, read.pixels
    tensors = {f.name: v.pin_memory() for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    cond = {name: values.pin_memory() for name, values in batch.cond.items()}
    pinned = pixels if pixels is None else pixels.pin_memory()
    return replace(read, batch=replace(batch, **tensors, cond=cond), pixels=pinned)
