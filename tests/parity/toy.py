"""A small conditional network and its family: every input counts, everything is float64, and peft can adapt it."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from simpletuner.batch import Batch, Cond
from simpletuner.config.fields import Section
from simpletuner.denoiser import Denoiser
from simpletuner.distillers._base import Setup
from simpletuner.schedules import NoiseSchedule

SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


class ToyNetwork(nn.Module):
    """Two convolutions, modulated by time, text and geometry."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.time_emb_proj = nn.Linear(3, 8)
        self.to_k = nn.Linear(5, 8)
        self.proj_in = nn.Linear(6, 8)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, geometry: Tensor) -> Tensor:
        time = t.to(x_t.dtype)[:, None] / 1000
        features = self.time_emb_proj(torch.cat([time, time.sin(), (7 * time).cos()], dim=1))
        features = features + self.to_k(torch.cat([tokens.mean(1), pooled], dim=1))
        features = features + self.proj_in(geometry.to(x_t.dtype) / 1024)
        hidden = torch.tanh(self.conv1(x_t) + features[:, :, None, None])
        return self.conv2(hidden) + 0.5 * x_t


class ToyFamily:
    """Counts its calls, so that a test can say how many forwards a step makes."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None
    ) -> Tensor:
        self.batch_sizes.append(len(x_t))
        return module(x_t, model_t, cond["tokens"], cond["pooled"], geometry)


def uncond(cond: Cond) -> Cond:
    return {name: torch.zeros_like(value) for name, value in cond.items()}


def add_lora(module: nn.Module, seed: int = 1) -> nn.Module:
    """Adds an adapter of rank 2, scaled by 3 / 2, whose two halves are both random: every gradient is there."""
    targets = ["conv1", "conv2", "to_k", "time_emb_proj", "proj_in"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    module.requires_grad_(False)
    inject_adapter_in_model(config, module, "default")
    fill_lora(module, seed)
    return module


def fill_lora(module: nn.Module, seed: int) -> None:
    """Fills all LoRA matrices with random numbers and makes them float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def toy_batch(size: int = 4, first: int = 0, dtype: torch.dtype = torch.float64, latent_px: int = 6) -> Batch:
    """Returns the samples first ... first + size - 1: equal samples in whatever batch they are asked for."""
    samples = [torch.Generator().manual_seed(100 + first + i) for i in range(size)]

    def normal(*shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=g, dtype=torch.float64) for g in samples])

    geometry = torch.tensor([[1365, 1024, 0, 16, 1024, 1024 - 64 * (first + i)] for i in range(size)])
    return Batch(
        mean=normal(4, latent_px, latent_px).to(dtype),
        std=(0.05 * normal(4, latent_px, latent_px).abs()).to(dtype),
        cond={"tokens": normal(3, 2).to(dtype), "pooled": normal(3).to(dtype)},
        dropped=torch.zeros(size, dtype=torch.bool),
        geometry=geometry.float(),
        position=torch.arange(first, first + size),
        weight=torch.ones(size),
        ids=tuple(str(first + i) for i in range(size)),
        global_weight=float(size),
    )


def toy_setup(
    config: Section, schedule: NoiseSchedule, prediction_type: str, module: nn.Module, family: ToyFamily | None = None
) -> Setup:
    """Returns what training/build.py makes for a LoRA run: three denoisers of one adapted network."""
    family = family or ToyFamily()

    def denoiser(adapter: str | None) -> Denoiser:
        return Denoiser(family, module, adapter, prediction_type, schedule, None)

    denoisers = {"student": denoiser("default"), "teacher": denoiser(None), "target": denoiser("default")}
    return Setup(config, denoisers, schedule, uncond)
