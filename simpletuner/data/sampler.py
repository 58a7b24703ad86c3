"""Which images make which batch: a pure function of the seed and the epoch.

An epoch of a dataset shows each image exactly 1 + repeats times. Every bucket's images are shuffled and cut into
batches (the last may be short), and all batches of the epoch are shuffled. Datasets take turns by their probability. A
place in this endless order is a small dictionary: finding the next batch takes no replay of those before, and a bucket
of ten million images no memory.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

LARGEST_SORTED = 4096
"""Orders up to here are sorted and held: that takes 0.3 ms, and 32 KiB."""
_NUM_ROUNDS = 4


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
class Window:
    """When a dataset is shown, in batches of all ranks since the beginning of the run."""

    start: int = 0
    """So many batches are drawn before."""
    end: int | None = None
    """So many have been drawn when it is over; None: it is shown to the end."""

    def __contains__(self, drawn: int) -> bool:
        """Returns whether the dataset may be shown after so many batches."""
        return self.start <= drawn and (self.end is None or drawn < self.end)


@dataclass(frozen=True)
class SampledDataset:
    """What the sampler knows of a dataset."""

    id: str
    bucket_sizes: tuple[int, ...]
    global_batch_size: int
    """Images of a batch on all ranks together."""
    repeats: int = 0
    probability: float = 1.0
    window: Window = field(default_factory=Window)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return sum(map(self.batches_of, self.bucket_sizes))

    def batches_of(self, bucket_size: int) -> int:
        """Returns the batches of an epoch that come from a bucket."""
        return -(-bucket_size * (1 + self.repeats) // self.global_batch_size)

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


class _Epoch:
    """The order of one epoch of one dataset."""

    def __init__(self, dataset: SampledDataset, seed: int, epoch: int) -> None:
        """Shuffles the batches; a bucket is shuffled when its first batch is drawn."""
        self._dataset, self._key = dataset, f"{seed}/{dataset.id}/{epoch}"
        self.number = epoch
        self._ends = np.cumsum([dataset.batches_of(size) for size in dataset.bucket_sizes])
        self._batches = Shuffle(dataset.num_batches, f"{self._key}/-1")
        self._members: dict[int, Shuffle] = {}

    def batch(self, number: int) -> tuple[int, Ints]:
        """Returns the bucket of a batch, and the indices in it."""
        chosen = int(self._batches[np.array([number])][0])
        bucket = int(np.searchsorted(self._ends, chosen, side="right"))
        size, most = self._dataset.bucket_sizes[bucket], self._dataset.global_batch_size
        start = (chosen - (int(self._ends[bucket - 1]) if bucket else 0)) * most
        count = size * (1 + self._dataset.repeats)
        if bucket not in self._members:
            self._members[bucket] = Shuffle(count, f"{self._key}/{bucket}")
        return bucket, self._members[bucket][np.arange(start, min(start + most, count))] % size


class Sampler:
    """The endless order of batches of several datasets."""

    def __init__(self, datasets: Sequence[SampledDataset], seed: int) -> None:
        """Shuffles nothing yet. ``seed`` is the run's."""
        self.datasets = tuple(datasets)
        self._seed = seed
        self._epochs: dict[int, _Epoch] = {}  # the one that each dataset is in

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

    def shows(self, drawn: int) -> bool:
        """Returns whether any dataset is shown after so many batches."""
        return any(drawn in dataset.window for dataset in self.datasets if dataset.probability > 0)

    def next(self, position: Position, drawn: int = 0) -> tuple[Draw, Position]:
        """Returns the batch at a position, and the position behind it; the argument is not changed.

        Args:
            position: As ``start`` or an earlier call returned it.
            drawn: Batches that the run has drawn so far; some dataset is shown after these.
        """
        number, turns = self._turn(position, drawn)
        dataset = self.datasets[number]
        at = position["datasets"][dataset.id]
        epoch, batch = (at["epoch"], at["batch"]) if at["batch"] < dataset.num_batches else (at["epoch"] + 1, 0)
        if number not in self._epochs or self._epochs[number].number != epoch:
            self._epochs[number] = _Epoch(dataset, self._seed, epoch)
        bucket, members = self._epochs[number].batch(batch)
        after = DatasetPosition(epoch=epoch, batch=batch + 1, turns=turns + 1)
        return Draw(number, bucket, members, position["samples"]), Position(
            samples=position["samples"] + len(members), datasets={**position["datasets"], dataset.id: after}
        )

    def _turn(self, position: Position, drawn: int) -> tuple[int, int]:
        """Returns whose turn it is, and how many turns that dataset has had.

        It is the dataset that would be least ahead of its probability afterwards. One whose window has just opened
        counts as having had the turns that it would have had, as one that joins a run does.
        """
        had = {d.id: position["datasets"][d.id]["turns"] for d in self.datasets}
        shown = [(n, d) for n, d in enumerate(self.datasets) if d.probability > 0 and drawn in d.window]
        pace = min((had[d.id] / d.probability for _, d in shown if had[d.id] or not d.window.start), default=0.0)
        for _, dataset in shown:
            if dataset.window.start and not had[dataset.id]:
                had[dataset.id] = int(pace * dataset.probability)
        _, number, turns = min(((had[d.id] + 1) / d.probability, n, had[d.id]) for n, d in shown)
        return number, turns


class Shuffle:
    """0..count-1 in an order that the key decides: on every machine and with every numpy.

    numpy keeps the right to change its own shuffles from version to version, and a resumed run must go on in the same
    order. A short one is sorted by splitmix64 of a counter (Steele et al. 2014, fig. 17): any order can come out. A
    long one is not held at all: a place's number is computed from it by a bijection of the next power of two, again
    and again until it is below ``count`` (cycle walking: Black and Rogaway 2002, section 3).
    """

    def __init__(self, count: int, key: str) -> None:
        """Sorts a short one."""
        self._count, bits = count, max(1, (count - 1).bit_length())
        start = hashlib.blake2b(key.encode(), digest_size=8).digest()
        self._state = np.frombuffer(start, dtype="<u8")
        self._sorted: Ints | None = None
        if count <= LARGEST_SORTED:
            self._sorted = np.argsort(self._random(count), kind="stable").astype(np.int64)
        else:
            added, factors = self._random(2 * _NUM_ROUNDS).reshape(2, -1)
            self._rounds = tuple(zip(added, factors | np.uint64(1), strict=True))
            self._mask, self._half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)

    def _random(self, count: int) -> npt.NDArray[np.uint64]:
        """Returns [count] the first numbers of splitmix64."""
        state = self._state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))

    def __getitem__(self, places: Ints) -> Ints:
        """Returns [n] what stands at [n] places."""
        if self._sorted is not None:
            return self._sorted[places]
        numbers = self._mixed(places.astype(np.uint64))
        while (outside := numbers >= self._count).any():
            numbers[outside] = self._mixed(numbers[outside])
        return numbers.astype(np.int64)

    def _mixed(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Returns [n] numbers below 2^bits, each from one alone: every step of a round can be undone."""
        for added, factor in self._rounds:
            numbers = (numbers + added) * factor & self._mask
            numbers = numbers ^ (numbers >> self._half)
        return numbers


def share(count: int, rank: int, world: int) -> range:
    """Returns which of ``count`` samples are a rank's: as even as can be, the first ranks get the extra ones."""
    least, extra = divmod(count, world)
    start = rank * least + min(rank, extra)
    return range(start, start + least + (rank < extra))
