"""Consistency distillation, written from the papers one sample at a time; nothing of the package is used.

Networks are functions network(z, t, cond) -> raw prediction, for one sample z [1, C, h, w] and a number t.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Network = Callable[[Tensor, float, Any], Tensor]


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


def guidance_features(w: float, dim: int) -> Tensor:
    """What a network that embeds w is fed: [1, dim] sines and cosines of 1000 w, as in diffusers' pipelines."""
    half = dim // 2
    angles = [1000 * w * 10000 ** (-k / (half - 1)) for k in range(half)]
    return torch.tensor([[*map(math.sin, angles), *map(math.cos, angles)]], dtype=torch.float64)


def consistency_function(raw: Tensor, z: Tensor, t: int, acp: float, kind: str, scaling: float) -> Tensor:
    x0, _ = picture_and_noise(raw, z, acp, kind)
    scaled = scaling * t
    c_skip = 0.5**2 / (scaled**2 + 0.5**2)
    c_out = scaled / math.sqrt(scaled**2 + 0.5**2)
    return c_skip * z + c_out * x0


def half_way(high: int, low: int, acp: list[float]) -> tuple[float, float]:
    """The time, and its product of alphas, at which log(alpha / sigma) is the mean of that at two timesteps."""
    ratios = [0.5 * math.log(value / (1 - value)) if value > 0 else -math.inf for value in acp]
    mean = (ratios[high] + ratios[low]) / 2
    time = float(np.interp(-mean, [-ratio for ratio in ratios], np.arange(len(acp))))
    return time, 1 / (1 + math.exp(-2 * mean))


def phase_start(start: int, num_phases: int) -> int | None:
    """The timestep at which the phase of a timestep begins (arXiv 2405.18407), None for the picture itself."""
    width = 1000 // num_phases
    phase = math.ceil((start + 1) / width) - 1
    return width * phase - 1 if phase > 0 else None


def jump(raw: Tensor, z: Tensor, t: int, edge: int | None, acp: list[float], kind: str, scaling: float) -> Tensor:
    """The consistency function to the picture (arXiv 2310.04378) or to a timestep (arXiv 2402.19159, TCF(1))."""
    if edge is None:
        return consistency_function(raw, z, t, acp[t], kind, scaling)
    x0, noise = picture_and_noise(raw, z, acp[t], kind)
    return math.sqrt(acp[edge]) * x0 + math.sqrt(1 - acp[edge]) * noise


def dpm_solver_2s(
    guided: Callable[[Tensor, float, float], tuple[Tensor, Tensor]], z: Tensor, high: int, low: int, acp: list[float]
) -> Tensor:
    """One step of arXiv 2211.01095, algorithm 1, r = 1/2; guided(z, t, product of alphas) -> (x0, noise)."""

    def alpha_sigma(value: float) -> tuple[float, float]:
        return math.sqrt(value), math.sqrt(1 - value)

    middle, acp_middle = half_way(high, low, acp)
    (alpha_t, sigma_t), (alpha_m, sigma_m), (alpha_s, sigma_s) = map(alpha_sigma, (acp[high], acp_middle, acp[low]))
    h = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t)
    u = sigma_m / sigma_t * z - alpha_m * math.expm1(-h / 2) * guided(z, high, acp[high])[0]
    return sigma_s / sigma_t * z - alpha_s * math.expm1(-h) * guided(u, middle, acp_middle)[0]


def distance(output: Tensor, target: Tensor, loss_type: str, c: float) -> Tensor:
    squared = (output - target) ** 2
    if loss_type == "l2":
        return squared.mean()
    if loss_type == "cauchy":  # arXiv 2502.01441 with the paper's c^2 = c^2 times the number of elements
        return torch.log(1 + squared.sum() / (2 * c**2 * squared.numel()))
    assert loss_type == "huber"
    return (torch.sqrt(squared + c**2) - c).mean()


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
    edge: int | None = None,
    solver: str = "ddim",
    target: Network | None = None,
    teacher_embeds_w: bool = False,
) -> Tensor:
    """The loss of one sample; ``student`` carries gradient, also as its own target before it is detached.

    ``target`` is the student itself unless another is given. A teacher that embeds w has been told it by its caller.
    """
    stride = 1000 // num_ddim_timesteps
    start = stride * (index + 1) - 1
    end = max(start - stride, 0)
    acp_end = acp[0] if index == 0 else acp[start - stride]
    z_start = math.sqrt(acp[start]) * x0 + math.sqrt(1 - acp[start]) * noise

    def guided(z: Tensor, t: float, product: float) -> tuple[Tensor, Tensor]:
        x0_cond, noise_cond = picture_and_noise(teacher(z, t, cond), z, product, kind)
        if teacher_embeds_w:
            return x0_cond, noise_cond
        x0_uncond, noise_uncond = picture_and_noise(teacher(z, t, uncond), z, product, kind)
        return (1 + w) * x0_cond - w * x0_uncond, (1 + w) * noise_cond - w * noise_uncond

    if solver == "ddim":
        x0_guided, noise_guided = guided(z_start, start, acp[start])
        z_end = (math.sqrt(acp_end) * x0_guided + math.sqrt(1 - acp_end) * noise_guided).detach()
    else:
        assert solver == "dpm2s"
        z_end = dpm_solver_2s(guided, z_start, start, end, acp).detach()

    landed = jump((target or student)(z_end, end, cond), z_end, end, edge, acp, kind, scaling).detach()
    output = jump(student(z_start, start, cond), z_start, start, edge, acp, kind, scaling)
    return distance(output, landed, loss_type, huber_c)
