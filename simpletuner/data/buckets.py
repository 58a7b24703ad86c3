"""Aspect buckets: the images of a dataset grouped by the size that they are trained at."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simpletuner.data.geometry import Size, target_size
from simpletuner.data.manifest import Manifest, integers


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
    width, height = integers(manifest.rows, "width"), integers(manifest.rows, "height")
    sizes, which = np.unique(np.stack([width, height]), axis=1, return_inverse=True)
    targets = [target_size(manifest.dataset, int(w), int(h)) for w, h in sizes.T]
    by_target: dict[Size, list[int]] = {}
    for number, target in enumerate(targets):
        by_target.setdefault(target, []).append(number)
    which = which.reshape(-1)  # numpy 2.0 gave it a second axis
    return [
        Bucket(manifest.dataset.id, target, np.flatnonzero(np.isin(which, by_target[target])))
        for target in sorted(by_target)
    ]
