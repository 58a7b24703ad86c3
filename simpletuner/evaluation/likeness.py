"""How alike pictures are, and how sharp: numbers that need no weights to be downloaded.

P pictures of one size; all numbers are of RGB pictures, scaled down to 256 px where they are larger.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from simpletuner.quickstart.frechet import as_tensor, stages

_EDGE_PX = 256
_NEAR_NOTHING = 1e-10
_LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])
_MOST_DB = 100.0
"""Of pictures that are the same."""


def psnr_db(first: Image.Image, second: Image.Image) -> float:
    """Returns the peak signal-to-noise ratio of 8-bit pictures of one size, in dB."""
    one, two = (np.asarray(picture.convert("RGB"), np.float64) for picture in (first, second))
    error = float(((one - two) ** 2).mean())
    return min(_MOST_DB, 10 * np.log10(255**2 / error)) if error else _MOST_DB


def feature_distance(first: Image.Image, second: Image.Image) -> float:
    """Returns how differently two pictures look: 0 for the same, towards 1 for those that have nothing in common.

    As LPIPS (arXiv 1801.03924) it compares the features of a network place by place, in several stages; but the network
    is random (that of the Frechet distance): it sees edges, shapes and textures as they are, and has not learned what
    people find alike. Of each stage it is the squared difference over the sum of the squares, so that where both
    pictures are flat hardly counts.
    """
    pairs = zip(_stages(first), _stages(second), strict=True)
    found = [(a - b).square().sum() / (a.square().sum() + b.square().sum() + _NEAR_NOTHING) for a, b in pairs]
    return float(torch.stack(found).mean())


def diversity(pictures: Sequence[Image.Image]) -> float:
    """Returns the mean feature distance of all pairs of pictures."""
    found = [feature_distance(first, second) for first, second in combinations(pictures, 2)]
    return sum(found) / len(found)


def sharpness(picture: Image.Image) -> float:
    """Returns the deviation of the luminance's Laplacian, in 8-bit steps: blur lowers it, noise raises it."""
    luminance = ((as_tensor(picture) + 1) * 127.5 * _LUMINANCE[:, None, None]).sum(0)
    return float(functional.conv2d(luminance[None, None], _LAPLACIAN[None, None]).std())


def _stages(picture: Image.Image) -> list[Tensor]:
    scale = _EDGE_PX / max(picture.size)
    if scale < 1:
        size = max(8, round(picture.width * scale)), max(8, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    with torch.inference_mode():
        return list(stages(as_tensor(picture)[None]))
