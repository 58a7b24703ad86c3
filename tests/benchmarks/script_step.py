"""A plain re-statement of a training step of diffusers' latent consistency LoRA script, to compare ours with.

Written from its description: pictures and captions are encoded in every step; the teacher is asked twice, with and
without caption; adapters are switched by peft's own functions; the loss is read from the device in every step.

The encoders are stand-ins of SDXL's proportions, counted in floating point operations: encoding a picture costs 0.72 of
a forward of the UNet (4.9 of 6.76 TFLOP at 1024 px), its caption 0.019. Their results are not used: latents and
features are drawn at random, in the shapes that the UNet takes.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from simpletuner.training.meter import FlopCounter

IMAGE_PART, TEXT_PART = 0.72, 0.019
NUM_STEPS, TIMESTEP_SCALING, SIGMA_DATA, HUBER_C = 50, 10.0, 0.5, 0.001


class ScriptStep:
    """One step of the script, called again and again."""

    def __init__(self, unet: Path, rank: int, targets: list[str], tokens: tuple[int, ...], latent_px: int) -> None:
        self.unet: Any = UNet2DConditionModel.from_pretrained(unet).requires_grad_(False).train()
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        batch_size = tokens[0]
        config = self.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        self.latents = torch.randn(batch_size, 4, latent_px, latent_px)
        self.tokens, self.no_tokens = torch.randn(2, *tokens)
        self.added = {
            "text_embeds": torch.randn(batch_size, pooled),
            "time_ids": torch.full((batch_size, 6), float(8 * latent_px)),
        }
        self.no_added = {**self.added, "text_embeds": torch.zeros(batch_size, pooled)}
        self.pixels = torch.randn(batch_size, 3, 8 * latent_px, 8 * latent_px)
        self.ids = torch.ones(tokens[:2], dtype=torch.long)
        forward = flop(lambda: self.predict(self.latents, torch.full((batch_size,), 999), self.tokens, self.added))
        self.vae: Any = nearest(
            map(make_vae, range(8, 264, 8)), lambda vae: vae.encode(self.pixels), IMAGE_PART * forward
        )
        texts = (make_text_encoder(width) for width in range(32, 1056, 32))
        self.text: Any = nearest(texts, lambda text: text(self.ids), TEXT_PART * forward)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.acp = (1 - betas).cumprod(0).float()
        self.grid = torch.arange(1, NUM_STEPS + 1) * (1000 // NUM_STEPS) - 1
        self.previous = torch.cat([self.acp[:1], self.acp[self.grid[:-1]]])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)

    def predict(self, z: Tensor, t: Tensor, tokens: Tensor, added: dict[str, Tensor]) -> Tensor:
        """Returns the predicted noise [B, C, h, w]."""
        return self.unet(z, t, encoder_hidden_states=tokens, added_cond_kwargs=added).sample

    def origin(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns x0 [B, C, h, w]."""
        acp = self.acp[t].reshape(-1, 1, 1, 1)
        return (z - (1 - acp).sqrt() * noise) / acp.sqrt()

    def consistent(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns c_skip z + c_out x0."""
        scaled = TIMESTEP_SCALING * t.reshape(-1, 1, 1, 1).float()
        total = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / total * z + scaled / total.sqrt() * self.origin(z, noise, t)

    def encode(self) -> None:
        """Encodes pictures and captions."""
        with torch.no_grad():
            self.vae.encode(self.pixels).latent_dist.sample()
            self.text(self.ids)

    def __call__(self, encodes: bool = True) -> float:
        """Makes a step and returns its loss."""
        if encodes:
            self.encode()
        size = len(self.latents)
        index = torch.randint(0, NUM_STEPS, (size,))
        start = self.grid[index]
        end = (start - 1000 // NUM_STEPS).clamp_min(0)
        acp = self.acp[start].reshape(-1, 1, 1, 1)
        z = acp.sqrt() * self.latents + (1 - acp).sqrt() * torch.randn_like(self.latents)
        w = (3 + 12 * torch.rand(size)).reshape(-1, 1, 1, 1)
        student = self.consistent(z, self.predict(z, start, self.tokens, self.added), start)
        with torch.no_grad():
            self.unet.disable_adapters()
            cond = self.predict(z, start, self.tokens, self.added)
            uncond = self.predict(z, start, self.no_tokens, self.no_added)
            cond_x0, uncond_x0 = self.origin(z, cond, start), self.origin(z, uncond, start)
            x0, noise = cond_x0 + w * (cond_x0 - uncond_x0), cond + w * (cond - uncond)
            before = self.previous[index].reshape(-1, 1, 1, 1)
            reached = before.sqrt() * x0 + (1 - before).sqrt() * noise
            self.unet.enable_adapters()
            target = self.consistent(reached, self.predict(reached, end, self.tokens, self.added), end)
        loss = (((student - target) ** 2 + HUBER_C**2).sqrt() - HUBER_C).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def make_vae(channels: int) -> AutoencoderKL:
    """Returns a VAE in the shape of SDXL's, whose narrowest level has so many channels."""
    return AutoencoderKL(
        block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
    ).requires_grad_(False)


def make_text_encoder(width: int) -> nn.Module:
    """Returns a text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4
        )
    ).requires_grad_(False)


def flop(work: Callable[[], object]) -> int:
    """Returns the floating point operations of a piece of work, without gradient."""
    with torch.no_grad(), FlopCounter() as counter:
        work()
    return counter.total


def nearest(models: Iterable[Any], work: Callable[[Any], object], wanted: float) -> Any:
    """Returns, of models that grow, the first one whose work reaches a number of operations, or the one before it."""
    before, before_flop = None, 0
    for model in models:
        found = flop(lambda model=model: work(model))
        if found >= wanted:
            return model if before is None or found - wanted < wanted - before_flop else before
        before, before_flop = model, found
    return before
