"""What was found of one way to draw, and how sure that is.

S training seeds, P prompts. Intervals are of 95 %, from resampled prompts and seeds; every row is resampled with the
same draws, because every row has the same prompts from the same noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]
_NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Row:
    """The pictures of one sampler, judged."""

    label: str
    num_inference_steps: int
    right: npt.NDArray[np.bool_]
    """[S, P] whether the picture shows all that its caption says."""
    frechet: Mapping[int, tuple[float, ...]]
    """Number of pictures -> distance to real ones, of each seed: it depends on the number."""

    @property
    def accuracy(self) -> float:
        """The part of pictures that is right, mean over the seeds."""
        return float(self.right.mean())

    @property
    def interval(self) -> Interval:
        """Of the accuracy."""
        return _interval(self._resampled)

    @property
    def distance(self) -> float:
        """Frechet distance of all pictures, mean over the seeds."""
        return float(np.mean(self.frechet[self.right.shape[1]]))

    def ratio(self, other: "Row") -> tuple[float, Interval]:
        """Returns this accuracy as a part of another row's, with its interval; of one that is 0, infinity."""
        if not other.accuracy:
            return float("inf"), (0.0, float("inf"))
        # A resample without any right picture of the other counts as one with half a picture.
        least = 0.5 / other.right.size
        return self.accuracy / other.accuracy, _interval(self._resampled / np.maximum(other._resampled, least))

    def lead(self, other: "Row") -> tuple[float, Interval]:
        """Returns by how much this accuracy is above another row's, with its interval."""
        return self.accuracy - other.accuracy, _interval(self._resampled - other._resampled)

    def first(self, num_prompts: int) -> "Row":
        """Returns the row of the first prompts alone."""
        return Row(self.label, self.num_inference_steps, self.right[:, :num_prompts], self.frechet)

    def to_json(self) -> dict[str, Any]:  # Any: JSON
        """Returns the row as JSON: a string of 0 and 1 for each seed."""
        return {
            "label": self.label,
            "num_inference_steps": self.num_inference_steps,
            "accuracy": round(self.accuracy, 4),
            "interval": [round(end, 4) for end in self.interval],
            "frechet": {str(count): [round(each, 4) for each in found] for count, found in self.frechet.items()},
            "right": ["".join("01"[int(each)] for each in seed) for seed in self.right],
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> "Row":  # Any: JSON
        """Returns the row of a JSON object."""
        right = np.array([[each == "1" for each in seed] for seed in document["right"]], np.bool_)
        frechet = {int(count): tuple(found) for count, found in document["frechet"].items()}
        return Row(document["label"], document["num_inference_steps"], right, frechet)

    @cached_property
    def _resampled(self) -> npt.NDArray[np.float64]:
        """Returns the accuracy of each resample."""
        num_seeds, num_prompts = self.right.shape
        by_prompt = self.right[_seeds(num_seeds)].mean(1)  # [R, P]
        return np.take_along_axis(by_prompt, _prompts(num_prompts), axis=1).mean(1)


def best(rows: Sequence[Row], num_inference_steps: int) -> Row:
    """Returns the most accurate row of a number of steps."""
    return max((row for row in rows if row.num_inference_steps == num_inference_steps), key=lambda row: row.accuracy)


@lru_cache(maxsize=4)
def _prompts(count: int) -> npt.NDArray[np.int64]:
    """Returns [R, count] the prompts of each resample."""
    return np.random.default_rng(0).integers(0, count, (_NUM_RESAMPLES, count))


@lru_cache(maxsize=4)
def _seeds(count: int) -> npt.NDArray[np.int64]:
    """Returns [R, count] the seeds of each resample."""
    return np.random.default_rng(1).integers(0, count, (_NUM_RESAMPLES, count))


def _interval(values: npt.NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
