"""Which images make which batch: a pure function of the seed and the epoch.

An epoch of a dataset shows each image exactly 1 + repeats times. Every bucket's images are shuffled and cut into
batches (the last may be short), and all batches of the epoch are shuffled. Datasets take turns by their probability. A
place in this endless order is a small dictionary: finding the next batch takes no replay of those before.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class DatasetPosition(TypedDict):
    """Where a dataset is."""

    epoch: int
    batch: int
    """Number of batches of the epoch that were consumed."""
    turns: int
    """Number of batches that count for its probability."""


class Position(TypedDict):
    """Where a run is in its data; JSON as it is."""

    samples: int
    """Number of samples consumed on all ranks: the global position of the next sample."""
    datasets: dict[str, DatasetPosition]


@dataclass(frozen=True)
class SampledDataset:
    """What the sampler knows of a dataset."""

    id: str
    bucket_sizes: tuple[int, ...]
    global_batch_size: int
    """Images of a batch on all ranks together."""
    repeats: int = 0
    probability: float = 1.0

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return sum(-(-size * (1 + self.repeats) // self.global_batch_size) for size in self.bucket_sizes)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch: each image 1 + repeats times."""
        return sum(self.bucket_sizes) * (1 + self.repeats)


@dataclass(frozen=True)
class Draw:
    """The images of one batch of all ranks."""

    dataset: int
    bucket: int
    members: Ints
    """Indices within the bucket."""
    first_sample: int
    """Global position of the first member; the others follow."""


@dataclass(frozen=True)
class _Epoch:
    """The order of one epoch of one dataset."""

    members: tuple[Ints, ...]
    """For each bucket, its images in shuffled order."""
    buckets: Ints
    starts: Ints
    """For each batch, its bucket and where in the bucket's order it starts."""


class Sampler:
    """The endless order of batches of several datasets."""

    def __init__(self, datasets: Sequence[SampledDataset], seed: int) -> None:
        """Sorts nothing yet. ``seed`` is the run's."""
        self.datasets = tuple(datasets)
        self._seed = seed
        self._epochs: dict[int, tuple[int, _Epoch]] = {}  # the epoch that each dataset is in, so as to sort it once

    def start(self, position: Position | None = None) -> Position:
        """Returns the position to begin at: the given one, fitted to the datasets of this run.

        A dataset that joins starts with as many turns as its probability would have given it, so that it does not
        crowd out the others until it has caught up.
        """
        old: Mapping[str, DatasetPosition] = position["datasets"] if position else {}
        known = [old[d.id]["turns"] / d.probability for d in self.datasets if d.id in old and d.probability > 0]
        pace = min(known, default=0.0)
        return Position(
            samples=position["samples"] if position else 0,
            datasets={
                d.id: DatasetPosition(**old[d.id])
                if d.id in old
                else DatasetPosition(epoch=0, batch=0, turns=int(pace * d.probability))
                for d in self.datasets
            },
        )

    def next(self, position: Position) -> tuple[Draw, Position]:
        """Returns the batch at a position, and the position behind it; the argument is not changed."""
        number = self._turn(position)
        dataset = self.datasets[number]
        at = position["datasets"][dataset.id]
        epoch, batch = (at["epoch"], at["batch"]) if at["batch"] < dataset.num_batches else (at["epoch"] + 1, 0)
        bucket, members = self._members(number, epoch, batch)
        after = DatasetPosition(epoch=epoch, batch=batch + 1, turns=at["turns"] + 1)
        return Draw(number, bucket, members, position["samples"]), Position(
            samples=position["samples"] + len(members), datasets={**position["datasets"], dataset.id: after}
        )

    def _turn(self, position: Position) -> int:
        """Returns whose turn it is: the dataset that would be least ahead of its probability afterwards."""
        ahead = [
            ((position["datasets"][d.id]["turns"] + 1) / d.probability, number)
            for number, d in enumerate(self.datasets)
            if d.probability > 0
        ]
        return min(ahead)[1]

    def _members(self, number: int, epoch: int, batch: int) -> tuple[int, Ints]:
        """Returns the bucket of a batch and the indices in it."""
        dataset = self.datasets[number]
        cached = self._epochs.get(number)
        if cached is None or cached[0] != epoch:
            cached = (epoch, _order(dataset, self._seed, epoch))
            self._epochs[number] = cached
        order = cached[1]
        bucket, start = int(order.buckets[batch]), int(order.starts[batch])
        return bucket, order.members[bucket][start : start + dataset.global_batch_size]


def _order(dataset: SampledDataset, seed: int, epoch: int) -> _Epoch:
    """Returns the order of one epoch."""
    members: list[Ints] = []
    buckets: list[Ints] = []
    starts: list[Ints] = []
    for bucket, size in enumerate(dataset.bucket_sizes):
        count = size * (1 + dataset.repeats)
        members.append(_shuffled(count, seed, dataset.id, epoch, bucket) % size if size else np.zeros(0, np.int64))
        starts.append(np.arange(0, count, dataset.global_batch_size, dtype=np.int64))
        buckets.append(np.full(len(starts[-1]), bucket, dtype=np.int64))
    order = _shuffled(dataset.num_batches, seed, dataset.id, epoch, -1)
    return _Epoch(tuple(members), np.concatenate(buckets)[order], np.concatenate(starts)[order])


def _shuffled(count: int, seed: int, name: str, epoch: int, stream: int) -> Ints:
    """Returns 0..count-1 in an order that the arguments decide: on every machine and with every numpy.

    Sorts by splitmix64 of a counter (Steele et al. 2014, fig. 17), because numpy keeps the right to change its own
    shuffles from version to version, and a resumed run must go on in the same order.
    """
    start = hashlib.blake2b(f"{seed}/{name}/{epoch}/{stream}".encode(), digest_size=8).digest()
    state = np.frombuffer(start, dtype="<u8") + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int64)


def share(count: int, rank: int, world: int) -> range:
    """Returns which of ``count`` samples are a rank's: as even as can be, the first ranks get the extra ones."""
    least, extra = divmod(count, world)
    start = rank * least + min(rank, extra)
    return range(start, start + least + (rank < extra))
