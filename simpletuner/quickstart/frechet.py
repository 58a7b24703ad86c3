"""The Frechet distance between two sets of pictures, in the features of a small fixed network (arXiv 1706.08500).

The network is random and never trained: nothing to download, and the same numbers everywhere. Random filters see
edges, corners and textures of all frequencies, so blur, noise and smears of colour move their responses, which a judge
that reads captions forgives.

N pictures, D features; the covariances and the matrix root are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

_WIDTHS = (16, 24, 32)
"""Filters of the three stages, each at half the resolution of the one before."""
_SEED = 0
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Moments:
    """What the distance needs of a set of pictures: worth keeping for the real ones."""

    mean: Tensor
    """[D]"""
    covariance: Tensor
    """[D, D]"""


def frechet_distance(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> float:
    """Returns the distance between two sets of RGB pictures: 0 for equal sets, squared units of the features.

    It falls with the number of pictures even when both sets are real, so compare it with what as many real ones have.
    """
    return distance(moments(first), moments(second))


def moments(pictures: Sequence[Image.Image]) -> Moments:
    """Returns mean and covariance of the features of at least two pictures, in any order."""
    values = features(pictures)
    return Moments(values.mean(0), torch.cov(values.T))


def distance(first: Moments, second: Moments) -> float:
    """Returns |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))."""
    root = _root(first.covariance)
    # C1 C2 is not symmetric, but has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2).
    overlap = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))


def _root(matrix: Tensor) -> Tensor:
    """Returns the square root of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def features(pictures: Sequence[Image.Image]) -> Tensor:
    """Returns [N, D] float64 features of RGB pictures of any sizes, in their order."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(index)
    network = _network()
    rows: dict[int, Tensor] = {}
    with torch.inference_mode():
        for indices in by_size.values():
            for start in range(0, len(indices), _BATCH_SIZE):
                batch = indices[start : start + _BATCH_SIZE]
                pixels = torch.stack([_tensor(pictures[index]) for index in batch])
                rows.update(zip(batch, _pooled(network, pixels), strict=True))
    return torch.stack([rows[index] for index in range(len(pictures))])


def _tensor(picture: Image.Image) -> Tensor:
    """Returns [3, h, w] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _pooled(network: nn.ModuleList, pixels: Tensor) -> Tensor:
    """Returns [B, D] of [B, 3, h, w]: each filter's mean and deviation over the picture, and the stages' layout."""
    pooled: list[Tensor] = [pixels.mean((2, 3))]
    for stage in network:
        pixels = stage(pixels)
        pooled += [pixels.mean((2, 3)), pixels.std((2, 3))]
    return torch.cat(pooled, 1).double()


@lru_cache(maxsize=1)
def _network() -> nn.ModuleList:
    """Returns the stages; the global random state is left as it was."""
    generator = torch.Generator().manual_seed(_SEED)
    stages: list[nn.Module] = []
    width_before = 3
    for width in _WIDTHS:
        convolution = nn.utils.skip_init(nn.Conv2d, width_before, width, 5, padding=2, padding_mode="reflect", stride=2)
        weight = torch.randn(convolution.weight.shape, generator=generator)
        # Half of the filters see changes only, whatever the level.
        weight[::2] -= weight[::2].mean((1, 2, 3), keepdim=True)
        weight *= (2**0.5) / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        convolution.weight.data = weight
        convolution.bias = None
        stages.append(nn.Sequential(convolution, nn.LeakyReLU(0.2)))
        width_before = width
    return nn.ModuleList(stages).eval().requires_grad_(False)
