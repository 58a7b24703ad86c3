"""Noise schedules: how much picture and how much noise a noise time holds, and the one solver step between two times.

Every schedule is x_t = alpha(t) x0 + sigma(t) noise. The mathematics runs in promote(dtype, float32): bfloat16 would
make the noise of SDXL's grid at t = 19 wrong by 4.8 %.

Shapes: B batch, C latent channels, h w latent size in latent pixels, N solver steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simpletuner.config.errors import UserError

CLEAN_EDGE = -1
"""The noise time of the picture itself: alpha 1, sigma 0. A discrete schedule's t = 0 still has a little noise."""

SIGMA_DATA = 0.5
"""Standard deviation of the data that the consistency models' boundary scalings assume (arXiv 2303.01469, app. C)."""


class NoiseSchedule(ABC):
    """x_t = alpha(t) x0 + sigma(t) noise; t is [B] noise times, and every number is float32 or wider."""

    prediction_types: frozenset[str]
    """What a network may predict under this schedule."""
    num_train_timesteps: int

    @abstractmethod
    def for_size(self, height: int, width: int) -> "NoiseSchedule":
        """Returns the schedule of pictures of a latent size."""

    @abstractmethod
    def grid(self, num_steps: int) -> Tensor:
        """Returns [N + 1] solver times on the CPU, the cleanest first; methods work in grid indices."""

    @abstractmethod
    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns [B] how much of the picture x_t holds."""

    @abstractmethod
    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns [B] the standard deviation of the noise in x_t."""

    @abstractmethod
    def model_t(self, t: Tensor) -> Tensor:
        """Returns [B] the times in units of diffusers' schedulers, from 0 to num_train_timesteps."""

    @abstractmethod
    def time(self, u: Tensor) -> Tensor:
        """Returns [B] the training times of uniform random numbers u in [0, 1)."""

    @abstractmethod
    def boundary(self, t: Tensor, scaling: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Returns ([B] c_skip, [B] c_out) of the consistency function c_skip x_t + c_out x0.

        Args:
            t: [B] noise times.
            scaling: ``timestep_scaling_factor`` of the method, ``timestep_scaling`` of LCMScheduler.
            dtype: Of the result.
        """

    @abstractmethod
    def split(self, prediction: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
        """Returns ([B, C, h, w] x0, [B, C, h, w] noise) that a network's prediction at x_t stands for."""

    @abstractmethod
    def prediction_target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """Returns [B, C, h, w] what a perfect network would predict: the inverse of split."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns [B, C, h, w] x_t = alpha(t) x0 + sigma(t) noise."""
        dtype = wide(x0, noise)
        return _column(self.alpha(t, dtype), x0) * x0.to(dtype) + _column(self.sigma(t, dtype), x0) * noise.to(dtype)

    def ddim_step(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns [B, C, h, w] the sample at time t on the straight line of an (x0, noise) estimate.

        DDIM with eta 0 (arXiv 2010.02502, eq. 12), and for flow matching the Euler step x_s = x_t + (s - t) v: one
        solver serves both.
        """
        return self.add_noise(x0, noise, t)

    def _check(self, prediction_type: str) -> None:
        if prediction_type not in self.prediction_types:
            raise UserError(
                f"prediction_type: '{prediction_type}' does not go with this model's noise schedule "
                f"(allowed: {', '.join(sorted(self.prediction_types))})"
            )


class DiscreteSchedule(NoiseSchedule):
    """A variance preserving schedule over integer training timesteps (SD 1.x, SDXL, ...); t is [B] int64.

    Solvers also stop between two timesteps: a floating-point t means log(alpha / sigma) on the line between them.
    """

    prediction_types = frozenset({"epsilon", "v_prediction", "sample"})

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Makes a schedule of [T] products of alphas in float64, one a training timestep."""
        self.num_train_timesteps = len(alphas_cumprod)
        clean = torch.ones(1, dtype=torch.float64)
        acp = torch.cat([clean, alphas_cumprod.to("cpu", torch.float64)])
        # Row t + 1 is timestep t, so that CLEAN_EDGE = -1 is row 0.
        self._alpha, self._sigma = acp.sqrt(), (1 - acp).clamp(min=0).sqrt()
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise, so that epsilon says nothing about the picture there."""
        return float(self._alpha[-1]) == 0.0

    def for_size(self, height: int, width: int) -> "DiscreteSchedule":
        """Returns itself: these schedules do not depend on the size."""
        return self

    def grid(self, num_steps: int) -> Tensor:
        """Returns [N + 1] int64 times [0, k - 1, 2 k - 1, ..., N k - 1] with k = T // N, as LCMScheduler samples them.

        Index 0 is t = 0, where DDIM's last step ends (with the product of alphas of t = 0), not the clean edge.

        Raises:
            ValueError: There are more steps than training timesteps.
        """
        stride = self.num_train_timesteps // num_steps
        if stride < 1:
            raise ValueError(f"{num_steps} solver steps on {self.num_train_timesteps} timesteps")
        return (torch.arange(num_steps + 1) * stride - 1).clamp(min=0)

    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns [B] sqrt of the product of alphas."""
        if t.is_floating_point():
            return torch.sigmoid(2 * self._log_ratio(t, dtype)).sqrt()
        return self._tables(t.device, dtype)[0][t + 1]

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns [B] sqrt(1 - product of alphas)."""
        if t.is_floating_point():
            return torch.sigmoid(-2 * self._log_ratio(t, dtype)).sqrt()
        return self._tables(t.device, dtype)[1][t + 1]

    def half_way(self, start: Tensor, end: Tensor) -> Tensor:
        """Returns [B] float64 times between two, where log(alpha / sigma) is the mean of theirs; on the CPU.

        DPM-Solver's middle (arXiv 2211.01095, with r = 1/2). In units of t it is far from the middle at low noise.
        """
        alpha, sigma = self._tables(start.device, torch.float64)
        table = (alpha[1:] / sigma[1:]).log()
        wanted = (table[start] + table[end]) / 2
        # The table falls with t, and searchsorted wants one that rises.
        after = torch.searchsorted(-table, -wanted).clamp(1, self.num_train_timesteps - 1)
        high, low = table[after - 1], table[after]
        return after - 1 + (high - wanted) / (high - low)

    def model_t(self, t: Tensor) -> Tensor:
        """Returns [B] the timesteps themselves."""
        return t

    def time(self, u: Tensor) -> Tensor:
        """Returns [B] int64 timesteps in [0, T)."""
        return (u * self.num_train_timesteps).long()

    def boundary(self, t: Tensor, scaling: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Returns ([B] c_skip, [B] c_out) with s = scaling t; (1, 0) at t = 0 (arXiv 2310.04378, app. D)."""
        s = scaling * t.clamp(min=0).to(dtype)
        total = s**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / total, s / total.sqrt()

    def split(self, prediction: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
        """Returns ([B, C, h, w] x0, [B, C, h, w] noise); v is alpha noise - sigma x0 (arXiv 2202.00512)."""
        self._check(prediction_type)
        dtype = wide(prediction, x_t)
        prediction, x_t = prediction.to(dtype), x_t.to(dtype)
        alpha, sigma = _column(self.alpha(t, dtype), x_t), _column(self.sigma(t, dtype), x_t)
        if prediction_type == "epsilon":
            return (x_t - sigma * prediction) / alpha, prediction
        if prediction_type == "v_prediction":
            return alpha * x_t - sigma * prediction, alpha * prediction + sigma * x_t
        return prediction, (x_t - alpha * prediction) / sigma

    def prediction_target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """Returns [B, C, h, w] noise, alpha noise - sigma x0, or x0."""
        self._check(prediction_type)
        dtype = wide(x0, noise)
        if prediction_type == "epsilon":
            return noise.to(dtype)
        if prediction_type == "sample":
            return x0.to(dtype)
        alpha, sigma = _column(self.alpha(t, dtype), x0), _column(self.sigma(t, dtype), x0)
        return alpha * noise.to(dtype) - sigma * x0.to(dtype)

    def _log_ratio(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns [B] log(alpha / sigma) between timesteps."""
        alpha, sigma = self._tables(t.device, dtype)
        before = t.long().clamp(max=self.num_train_timesteps - 2)
        high, low = ((alpha[i + 1] / sigma[i + 1]).log() for i in (before, before + 1))
        return high + (t - before).to(dtype) * (low - high)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the [T + 1] alphas and sigmas on a device; copied once, because a copy a step would wait for it."""
        key = (device, dtype)
        if key not in self._on_device:
            self._on_device[key] = (self._alpha.to(dtype).to(device), self._sigma.to(dtype).to(device))
        return self._on_device[key]


@dataclass(frozen=True)
class DynamicShift:
    """How a flow schedule's shift follows the number of tokens of a picture; diffusers' own key names."""

    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int
    exponential: bool
    patch_size: int = 2
    """Latent pixels along the edge of a token: 2 for all published models with a dynamic shift."""

    def shift(self, height: int, width: int) -> float:
        """Returns the shift of a latent size."""
        tokens = math.ceil(height / self.patch_size) * math.ceil(width / self.patch_size)
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (tokens - self.base_image_seq_len)
        return math.exp(mu) if self.exponential else mu


class FlowSchedule(NoiseSchedule):
    """Rectified flow (arXiv 2209.03003): alpha 1 - sigma; t is [B] sigma in [0, 1], floating point."""

    prediction_types = frozenset({"flow_prediction"})

    def __init__(
        self, shift: float = 1.0, dynamic: DynamicShift | None = None, num_train_timesteps: int = 1000
    ) -> None:
        self.shift = shift
        self.dynamic = dynamic
        self.num_train_timesteps = num_train_timesteps

    def for_size(self, height: int, width: int) -> "FlowSchedule":
        """Returns the schedule with the shift of a latent size."""
        if self.dynamic is None:
            return self
        return FlowSchedule(self.dynamic.shift(height, width), None, self.num_train_timesteps)

    def grid(self, num_steps: int) -> Tensor:
        """Returns [N + 1] float64 shifted sigmas, 0 and 1 included."""
        return self.time(torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)

    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns [B] 1 - sigma."""
        return 1 - self.sigma(t, dtype)

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns [B] t, and 0 at the clean edge."""
        return t.to(dtype).clamp(min=0)

    def model_t(self, t: Tensor) -> Tensor:
        """Returns [B] num_train_timesteps times sigma; families that are fed something else convert it."""
        return t * self.num_train_timesteps

    def time(self, u: Tensor) -> Tensor:
        """Returns [B] shift u / (1 + (shift - 1) u) (arXiv 2403.03206, eq. 23)."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def boundary(self, t: Tensor, scaling: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Returns ([B] zeros, [B] ones): x_t - sigma v is x_t at sigma = 0 by itself."""
        return torch.zeros_like(t, dtype=dtype), torch.ones_like(t, dtype=dtype)

    def split(self, prediction: Tensor, x_t: Tensor, t: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
        """Returns ([B, C, h, w] x0, [B, C, h, w] noise) of the velocity noise - x0."""
        self._check(prediction_type)
        dtype = wide(prediction, x_t)
        prediction, x_t = prediction.to(dtype), x_t.to(dtype)
        sigma = _column(self.sigma(t, dtype), x_t)
        return x_t - sigma * prediction, x_t + (1 - sigma) * prediction

    def prediction_target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str) -> Tensor:
        """Returns [B, C, h, w] noise - x0."""
        self._check(prediction_type)
        dtype = wide(x0, noise)
        return noise.to(dtype) - x0.to(dtype)


def from_scheduler_config(config: Mapping[str, Any]) -> NoiseSchedule:  # Any: values of a scheduler's JSON
    """Returns the schedule of a diffusers scheduler's config; a missing key has diffusers' own default.

    Raises:
        UserError: The config names a beta schedule that is not known.
    """
    num_train_timesteps = int(config.get("num_train_timesteps", 1000))
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        dynamic = None
        if config.get("use_dynamic_shifting"):
            dynamic = DynamicShift(
                float(config.get("base_shift") or 0.5),
                float(config.get("max_shift") or 1.15),
                int(config.get("base_image_seq_len") or 256),
                int(config.get("max_image_seq_len") or 4096),
                config.get("time_shift_type", "exponential") == "exponential",
            )
        return FlowSchedule(float(config.get("shift", 1.0)), dynamic, num_train_timesteps)
    acp = torch.cumprod(1 - _betas(config, num_train_timesteps), dim=0)
    if config.get("rescale_betas_zero_snr"):
        root = acp.sqrt()
        # arXiv 2305.08891, algorithm 1: shift the last root to 0, keep the first.
        acp = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return DiscreteSchedule(acp)


def wide(*tensors: Tensor) -> torch.dtype:
    """Returns promote(dtypes, float32): the dtype of schedule mathematics and of losses."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _betas(config: Mapping[str, Any], num: int) -> Tensor:
    """Returns [T] float64 betas."""
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    # 1e-4, 0.02 and linear are the defaults of diffusers' DDPM, DDIM and Euler schedulers.
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if name == "linear":
        return torch.linspace(start, end, num, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), num, dtype=torch.float64) ** 2
    if name == "squaredcos_cap_v2":
        edges = torch.arange(num + 1, dtype=torch.float64) / num
        bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise UserError(
        f"beta_schedule '{name}' in the model's scheduler_config.json is not known "
        "(known: linear, scaled_linear, squaredcos_cap_v2)"
    )


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Returns [B, 1, 1, 1] the [B] values, to be multiplied with the latents."""
    return values.reshape(-1, *(1 for _ in like.shape[1:]))
