"""Stateless randomness: every draw of a run is a pure function of (run seed, stream name, global sample position).

So one rank with batch 4 draws what two ranks with batch 2 draw, a resumed run needs no saved generator state, and
workers and validation cannot disturb training. Draws are made on the CPU: the same numbers on every device.

torch's CPU generator uses 32 bits of its seed, so of a million draws about a hundred pairs are the same noise on other
pictures: harmless, and cheaper than a generator of our own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE_LEVELS = frozenset({"timestep", "index"})
"""The streams from which methods draw how noisy a sample is: a share of the way, or a step of a grid."""


def generator(seed: int, stream: str, position: int) -> torch.Generator:
    """Returns the CPU generator of one sample's stream."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{position}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Randomness:
    """The draws of one run for a batch of samples; ``positions`` is [B] int64 everywhere."""

    seed: int

    def normal(self, stream: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns [B, *shape] float32 standard normal numbers on the CPU."""
        draws = [torch.randn(*shape, generator=generator(self.seed, stream, int(p))) for p in positions]
        return torch.stack(draws)

    def uniform(self, stream: str, positions: Tensor) -> Tensor:
        """Returns [B] float32 numbers in [0, 1) on the CPU."""
        return torch.cat([torch.rand(1, generator=generator(self.seed, stream, int(p))) for p in positions])

    def integers(self, stream: str, positions: Tensor, high: int) -> Tensor:
        """Returns [B] int64 numbers in [0, high) on the CPU."""
        return torch.cat([torch.randint(high, (1,), generator=generator(self.seed, stream, int(p))) for p in positions])
