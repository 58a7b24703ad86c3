"""Batches of cached features in the sampler's order, prefetched by a thread, as this rank's share.

Shapes: B samples of this rank, C latent channels, h w latent size.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from simpletuner.batch import Batch, Cond
from simpletuner.data.cache import Reader
from simpletuner.data.identity import Ranks, ahead, text_key
from simpletuner.data.precompute import Cache
from simpletuner.data.sampler import Draw, Position, SampledDataset, Sampler, share
from simpletuner.randomness import Randomness

Uncond = Callable[[Cond, Cond], Cond]
"""(cond, features of the empty prompt) -> the unconditional features in the shape of cond."""

_PREFETCHED = 4


@dataclass(frozen=True, eq=False)
class _Images:
    """The usable images of one dataset, as arrays: a million of them take some tens of megabytes.

    n images in all; bucket b is ``starts[b] : starts[b + 1]``.
    """

    ids: tuple[str, ...]
    starts: tuple[int, ...]
    geometry: npt.NDArray[np.float32]
    """[ways, n, 6]; ways is 2 where images are shown mirrored too, otherwise 1."""
    latents: npt.NDArray[np.int32]
    """[ways, n, 2] shard and row."""
    caption_starts: npt.NDArray[np.int64]
    """[n + 1] where in ``captions`` an image's own begin."""
    captions: npt.NDArray[np.int32]
    """[number of captions, 2] shard and row of the text cache."""
    reader: Reader


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
    ) -> None:
        """Resolves where each image's features are; reads none.

        Args:
            cache: What ``precompute`` returned.
            uncond: ``family.uncond``.
            seed: Of the run.
            caption_dropout: Probability that a sample is shown without its caption.
            ranks: Which share of each batch is this process's.
            pin_memory: Page-lock batches, for faster copies to a CUDA device.
        """
        self._ranks = ranks or Ranks()
        self._uncond, self._dropout, self._pin = uncond, caption_dropout, pin_memory
        self._randomness = Randomness(seed)
        self._text = Reader(cache.text.shards)
        self._empty = cache.prompt("")
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
                )
                for manifest, images in zip(cache.manifests, self._images, strict=True)
            ],
            seed,
        )

    @property
    def batches_per_epoch(self) -> dict[str, int]:
        """Dataset id -> global batches of one of its epochs."""
        return {dataset.id: dataset.num_batches for dataset in self.sampler.datasets}

    def batches(self, position: Position | None = None) -> Iterator[tuple[Batch, Position]]:
        """Yields (batch of this rank, position behind it), for ever; later batches are read meanwhile by a thread.

        Save the position of the last batch that was trained on: what was only prefetched is not in it.

        Args:
            position: Where to go on; None: the beginning.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            yield from ahead(pool, lambda item: (self._batch(item[0]), item[1]), self._draws(position), _PREFETCHED)

    def _draws(self, position: Position | None) -> Iterator[tuple[Draw, Position]]:
        """Yields which images make each batch, and the position behind it."""
        after = self.sampler.start(position)
        while True:
            draw, after = self.sampler.next(after)
            yield draw, after

    def _batch(self, draw: Draw) -> Batch:
        """Returns this rank's share of a batch; one filler sample of weight 0 when there is nothing for it."""
        mine = share(len(draw.members), self._ranks.rank, self._ranks.world) or range(1)
        filler = not share(len(draw.members), self._ranks.rank, self._ranks.world)
        images = self._images[draw.dataset]
        rows = images.starts[draw.bucket] + draw.members[mine.start : mine.stop]
        positions = torch.arange(mine.start, mine.stop) + draw.first_sample
        ways = np.zeros(len(rows), np.int64)
        if len(images.latents) > 1:
            ways = self._randomness.integers("flip", positions, len(images.latents)).numpy()
        moments = [images.reader.row(*place) for place in images.latents[ways, rows].tolist()]
        cond, dropped = self._cond(images, rows, positions)
        batch = Batch(
            mean=torch.stack([moment["mean"] for moment in moments]),
            std=torch.stack([moment["std"] for moment in moments]) if "std" in moments[0] else None,
            cond=cond,
            dropped=dropped,
            geometry=torch.from_numpy(images.geometry[ways, rows]),  # pyright: ignore[reportUnknownMemberType]
            position=positions,
            weight=torch.full((len(rows),), 0.0 if filler else 1.0),
            ids=tuple(images.ids[row] for row in rows),
            global_weight=float(len(draw.members)),
        )
        return _pinned(batch) if self._pin else batch

    def _cond(self, images: _Images, rows: npt.NDArray[np.int64], positions: Tensor) -> tuple[Cond, Tensor]:
        """Returns the text features [B, ...] of one drawn caption each, and which were dropped [B]."""
        drawn: list[dict[str, Tensor]] = []
        for row, position in zip(rows.tolist(), positions, strict=True):
            first, count = int(images.caption_starts[row]), int(np.diff(images.caption_starts[row : row + 2])[0])
            choice = int(self._randomness.integers("caption", position[None], count)) if count > 1 else 0
            drawn.append(self._text.row(*images.captions[first + choice].tolist()))
        cond = {name: torch.stack([features[name] for features in drawn]) for name in drawn[0]}
        dropped = torch.zeros(len(rows), dtype=torch.bool)
        if self._dropout > 0:
            dropped = self._randomness.uniform("caption_dropout", positions) < self._dropout
        if bool(dropped.any()):
            uncond = self._uncond(cond, self._empty)
            shape = {name: (-1, *[1] * (values.ndim - 1)) for name, values in cond.items()}
            cond = {name: torch.where(dropped.view(shape[name]), uncond[name], cond[name]) for name in cond}
        return cond, dropped


def _resolve(cache: Cache, number: int) -> tuple[_Images, dict[str, tuple[str, ...]]]:
    """Returns the images of a dataset that have latents, and why the others have none."""
    manifest, index = cache.manifests[number], cache.latents[number]
    paths = manifest.ids
    rows: list[int] = []
    keys: list[tuple[str, ...]] = []
    geometry: list[npt.NDArray[np.float32]] = []
    starts = [0]
    problems: dict[str, list[str]] = {}
    for kept in cache.buckets[number]:
        ways = [kept, kept.mirrored] if kept.mirrored else [kept]
        together = list(zip(*(way.keys for way in ways), strict=True))
        usable = [place for place, own in enumerate(together) if all(key in index.rows for key in own)]
        for place in sorted({*range(len(together))} - {*usable}):
            reason = index.bad.get(kept.keys[place], "could not be read when it was to be encoded")
            problems.setdefault(reason, []).append(paths[kept.bucket.entries[place]])
        rows.extend(int(kept.bucket.entries[place]) for place in usable)
        keys.extend(together[place] for place in usable)
        geometry.append(np.stack([way.geometry[usable] for way in ways]))
        starts.append(len(rows))
    all_captions = manifest.captions
    captions = [all_captions[row] for row in rows]
    flat = [cache.text.rows[text_key(caption)] for own in captions for caption in own]
    images = _Images(
        ids=tuple(paths[row] for row in rows),
        starts=tuple(starts),
        geometry=np.concatenate(geometry, axis=1),
        latents=np.asarray([[index.rows[key] for key in way] for way in zip(*keys, strict=True)], np.int32),
        caption_starts=np.cumsum([0, *map(len, captions)], dtype=np.int64),
        captions=np.asarray(flat, np.int32).reshape(-1, 2),
        reader=Reader(index.shards),
    )
    return images, {reason: tuple(ids) for reason, ids in problems.items()}


def _pinned(batch: Batch) -> Batch:
    """Returns the batch in page-locked memory."""
    tensors = {f.name: v.pin_memory() for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors, cond={name: values.pin_memory() for name, values in batch.cond.items()})
