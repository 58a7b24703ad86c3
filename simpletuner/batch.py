"""What travels between data, family and distiller.

Shapes: B batch, C latent channels, h w latent size in latent pixels.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Cond = dict[str, Tensor]
"""A family's text features, [B, ...] each; only that family reads the keys."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; all pictures have the same latent size."""

    mean: Tensor
    """[B, C, h, w] posterior mean of the latents, shifted and scaled by the family."""
    std: Tensor | None
    """[B, C, h, w] posterior standard deviation, scaled likewise; None for encoders without one."""
    cond: Cond
    dropped: Tensor
    """[B] bool: the caption was dropped, so ``cond`` holds the unconditional features; geometry is unchanged."""
    geometry: Tensor
    """[B, 6] float32: original height, width; crop top, left; target height, width, in pixels, as really cut."""
    position: Tensor
    """[B] int64 global sample position: the seed of every draw for the sample."""
    weight: Tensor
    """[B] float32: 1, or 0 for filler that keeps ranks even and for an image that turned out broken."""
    ids: tuple[str, ...]
    global_weight: float
    """Samples of the same micro-batch on all ranks, a broken image included: known without asking the other ranks."""

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """Returns the batch with every tensor on the device."""
        moved: dict[str, Tensor | Cond] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        moved["cond"] = {key: value.to(device, non_blocking=non_blocking) for key, value in self.cond.items()}
        return replace(self, **moved)  # pyright: ignore[reportArgumentType]  (the values have the fields' own types)
