"""Aspect buckets: the images of a dataset grouped by the size that they are trained at."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simpletuner.data.columns import integers
from simpletuner.data.geometry import Size, target_sizes
from simpletuner.data.manifest import Manifest


@dataclass(frozen=True, eq=False)
class Bucket:
    """The images of one dataset that are trained at the same size."""

    dataset_id: str
    target: Size
    entries: npt.NDArray[np.int64]
    """Row numbers in ``manifest.rows``, ascending."""

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.entries)

    @property
    def name(self) -> str:
        """Width and height, such as ``1344x768``."""
        return f"{self.target[0]}x{self.target[1]}"


def assign(manifest: Manifest) -> list[Bucket]:
    """Returns the buckets of a dataset, ordered by target; each row of the manifest is in exactly one."""
    if manifest.rows.num_rows == 0:  # so far: none is counted yet
        return []
    width, height = integers(manifest.rows, "width"), integers(manifest.rows, "height")
    targets = target_sizes(manifest.dataset, width, height)
    found, which = np.unique(targets[:, 0] << 32 | targets[:, 1], return_inverse=True)
    order = np.argsort(which, kind="stable")
    entries = np.split(order, np.cumsum(np.bincount(which, minlength=len(found)))[:-1])
    sizes = [(int(both >> 32), int(both & 0xFFFFFFFF)) for both in found]
    return [Bucket(manifest.dataset.id, size, rows) for size, rows in zip(sizes, entries, strict=True)]
