"""An exponential average of a network's weights, which is itself a network (a method's target)."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Average:
    """Follows ``online`` after each optimizer step: average = decay average + (1 - decay) online."""

    online: nn.Module
    network: nn.Module
    """Of the same shape; float32, since at a decay of 0.999 a bfloat16 average would stand still."""
    decay: float

    @torch.no_grad()
    def update(self) -> None:
        """Makes one step of the average; nothing waits for the device."""
        # One by one: float32 copies of all weights at once would be 10 GB for SDXL.
        for average, online in zip(self.network.parameters(), self.online.parameters(), strict=True):
            average.lerp_(online.to(torch.float32), 1 - self.decay)
