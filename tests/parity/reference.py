"""Latent consistency distillation, written from arXiv 2310.04378 one sample at a time; nothing of the package is used.

Networks are functions network(z, t, cond) -> raw prediction, for one sample z [1, C, h, w] and an int t.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Network = Callable[[Tensor, int, Any], Tensor]


def alphas_cumprod(zero_terminal_snr: bool = False) -> list[float]:
    """Stable Diffusion's schedule in double precision."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    acp = np.cumprod(1.0 - betas)
    if zero_terminal_snr:  # arXiv 2305.08891, algorithm 1
        root = np.sqrt(acp)
        first, last = root[0], root[-1]
        acp = ((root - last) * first / (first - last)) ** 2
    return [float(value) for value in acp]


def picture_and_noise(raw: Tensor, z: Tensor, acp: float, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "epsilon":
        return (z - math.sqrt(1 - acp) * raw) / math.sqrt(acp), raw
    assert kind == "v_prediction"
    return math.sqrt(acp) * z - math.sqrt(1 - acp) * raw, math.sqrt(acp) * raw + math.sqrt(1 - acp) * z


def consistency_function(raw: Tensor, z: Tensor, t: int, acp: float, kind: str, scaling: float) -> Tensor:
    x0, _ = picture_and_noise(raw, z, acp, kind)
    scaled = scaling * t
    c_skip = 0.5**2 / (scaled**2 + 0.5**2)
    c_out = scaled / math.sqrt(scaled**2 + 0.5**2)
    return c_skip * z + c_out * x0


def lcm_loss(
    *,
    x0: Tensor,
    noise: Tensor,
    index: int,
    w: float,
    cond: Any,
    uncond: Any,
    student: Network,
    teacher: Network,
    num_ddim_timesteps: int,
    scaling: float,
    kind: str,
    loss_type: str,
    huber_c: float,
    acp: list[float],
) -> Tensor:
    """The loss of one sample; ``student`` carries gradient, also as its own target before it is detached."""
    stride = 1000 // num_ddim_timesteps
    start = stride * (index + 1) - 1
    end = max(start - stride, 0)
    acp_end = acp[0] if index == 0 else acp[start - stride]
    z_start = math.sqrt(acp[start]) * x0 + math.sqrt(1 - acp[start]) * noise

    x0_cond, noise_cond = picture_and_noise(teacher(z_start, start, cond), z_start, acp[start], kind)
    x0_uncond, noise_uncond = picture_and_noise(teacher(z_start, start, uncond), z_start, acp[start], kind)
    x0_guided = (1 + w) * x0_cond - w * x0_uncond
    noise_guided = (1 + w) * noise_cond - w * noise_uncond
    z_end = (math.sqrt(acp_end) * x0_guided + math.sqrt(1 - acp_end) * noise_guided).detach()

    target = consistency_function(student(z_end, end, cond), z_end, end, acp[end], kind, scaling).detach()
    output = consistency_function(student(z_start, start, cond), z_start, start, acp[start], kind, scaling)
    squared = (output - target) ** 2
    if loss_type == "l2":
        return squared.mean()
    assert loss_type == "huber"
    return (torch.sqrt(squared + huber_c**2) - huber_c).mean()
