"""What the plan says of a dataset: its images, buckets and batches."""

from dataclasses import dataclass, replace

from simpletuner.config.backends import DatasetConfig
from simpletuner.data.buckets import assign
from simpletuner.data.manifest import Manifest, Problems
from simpletuner.data.sampler import SampledDataset


@dataclass(frozen=True)
class BucketSize:
    """A bucket's name, such as ``1344x768``, and how many images are in it."""

    name: str
    num_images: int

    def __len__(self) -> int:
        """Returns the number of images."""
        return self.num_images


@dataclass(frozen=True, eq=False)
class DatasetSummary:
    """One dataset as scanned."""

    manifest: Manifest
    num_images: int
    """Images to train on."""
    buckets: tuple[BucketSize, ...]

    def without_rows(self) -> "DatasetSummary":
        """Returns what is said of the dataset, without the images themselves."""
        return replace(self, manifest=self.manifest.without_rows())

    @property
    def config(self) -> DatasetConfig:
        """The dataset's own section."""
        return self.manifest.dataset

    @property
    def complete(self) -> bool:
        """Whether all images have been counted."""
        return self.manifest.complete

    @property
    def problems(self) -> Problems:
        """Reason -> images left out."""
        return self.manifest.problems

    def batches_per_epoch(self, world: int) -> int:
        """Returns the batches, of all ranks together, in which each image is shown 1 + repeats times."""
        sizes = tuple(len(bucket) for bucket in self.buckets)
        return SampledDataset(
            self.config.id, sizes, self.config.train_batch_size * world, self.config.repeats
        ).num_batches

    def num_short(self, world: int) -> int:
        """Returns how many buckets have too few images for one full batch."""
        images = 1 + self.config.repeats
        return sum(len(bucket) * images < self.config.train_batch_size * world for bucket in self.buckets)


def summarise(manifest: Manifest) -> DatasetSummary:
    """Returns the summary of a manifest that has its captions."""
    buckets = tuple(BucketSize(bucket.name, len(bucket)) for bucket in assign(manifest))
    return DatasetSummary(manifest, manifest.rows.num_rows, buckets)
