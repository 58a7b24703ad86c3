"""diffusers' UNet2DConditionModel: loading, its guidance embedding, and the call that a pipeline makes.

Shapes: B batch, C latent channels, h w latent size, S tokens, D width of the text features.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simpletuner.families._layout import Layout
from simpletuner.families._source import ModelSource
from simpletuner.schedules import wide

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def load_unet(
    source: ModelSource, layout: Layout, dtype: torch.dtype, guidance_embed_dim: int | None
) -> "UNet2DConditionModel":
    """Returns the UNet in evaluation mode on the CPU, with a guidance embedding of that width if it had none."""
    from diffusers import UNet2DConditionModel

    path = source.fetch("unet")
    if path.is_file():
        config = str(layout.configs(source))
        unet = UNet2DConditionModel.from_single_file(str(path), config=config, subfolder="unet", dtype=dtype)
    else:
        unet = UNet2DConditionModel.from_pretrained(
            path, use_safetensors=True, variant=source.place("unet").variant, torch_dtype=dtype
        )
    if guidance_embed_dim is not None and unet.config["time_cond_proj_dim"] is None:
        embedding = unet.time_embedding
        # diffusers would initialise it randomly; zeros keep the student equal to its teacher at step 0.
        embedding.cond_proj = nn.Linear(guidance_embed_dim, embedding.linear_1.in_features, bias=False, dtype=dtype)
        nn.init.zeros_(embedding.cond_proj.weight)
        unet.register_to_config(time_cond_proj_dim=guidance_embed_dim)
    return unet.eval()


def predict(
    module: nn.Module,
    x_t: Tensor,
    model_t: Tensor,
    tokens: Tensor,
    w: Tensor | None,
    added: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Returns the UNet's raw prediction [B, C, h, w].

    Args:
        module: The UNet, or its DistributedDataParallel wrapper.
        x_t: [B, C, h, w] noisy latents.
        model_t: [B] timesteps.
        tokens: [B, S, D] text features.
        w: [B] guidance scale of the paper, for a UNet that embeds it; others take no notice of it.
        added: ``added_cond_kwargs``, in the dtypes that the UNet wants them in.

    Raises:
        ValueError: The UNet embeds w, and there is none: diffusers would leave it out and run on, silently wrong.
    """
    unet: Any = module.module if isinstance(module, DistributedDataParallel) else module
    dtype = next(module.parameters()).dtype
    cond_proj = unet.time_embedding.cond_proj
    embedded = None
    if cond_proj is not None:
        if w is None:
            raise ValueError("this UNet embeds the guidance scale (time_cond_proj_dim): call it with w")
        embedded = guidance_embedding(w.to(wide(w, x_t)), cond_proj.in_features).to(dtype)
    return module(
        x_t.to(dtype),
        model_t,
        encoder_hidden_states=tokens.to(dtype),
        timestep_cond=embedded,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Returns [B, dim] in w's dtype: the sinusoidal embedding of 1000 w, as diffusers' pipelines feed it."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device, dtype=w.dtype) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w[:, None] * frequencies[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))
