"""Stable Diffusion XL (arXiv 2307.01952): a UNet conditioned on two text encoders and on the picture's true geometry.

Shapes: B batch, C latent channels (4), h w latent size, H W picture size in pixels, S tokens (77), D = D1 + D2 width of
the two text encoders, P width of the pooled features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Cond
from simpletuner.config.errors import UserError
from simpletuner.families import _clip_encoders, _lora_file, _unet
from simpletuner.families._base import LORA_PRESETS, Facts, Part, PredictionType
from simpletuner.families._clip_encoders import ClipEncoders
from simpletuner.families._layout import BETAS, Layout
from simpletuner.families._source import Json, ModelSource
from simpletuner.schedules import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

_LAYOUT = Layout(
    title="SDXL",
    pipeline="StableDiffusionXLPipeline",
    pipeline_options={"add_watermarker": False},
    published="stabilityai/stable-diffusion-xl-base-1.0",
    published_scheduler={
        **BETAS,
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "timestep_spacing": "leading",
    },
    text_encoders=("text_encoder", "text_encoder_2"),
    text_prefix="conditioner.",
    unet_config={"addition_embed_type": "text_time"},
    unet_marks={"model.diffusion_model.label_emb.0.0.weight": True},
    unknown_to_pipeline=("shift_factor",),
)


@dataclass(frozen=True)
class SDXL:
    """The SDXL family; see ``ModelFamily`` for what its methods return."""

    zeros_for_empty_prompt: bool = True
    """``force_zeros_for_empty_prompt`` of model_index.json: unconditional features are zeros, else the encoded ""."""

    prediction_type: PredictionType = "epsilon"
    provides: frozenset[str] = frozenset({"uncond", "guidance_embedding", "lora", "epsilon", "v_prediction"})
    pipeline_class: str = _LAYOUT.pipeline
    usual_sampling: tuple[int, float] = (30, 5.0)
    guidance_range: tuple[float, float] = (3.0, 15.0)
    lora_targets: tuple[str, ...] = LORA_PRESETS["attention"]

    def facts(self, source: ModelSource) -> Facts:
        """Returns what headers and JSON files tell about the model."""
        return _LAYOUT.facts(source, _cond_numbers)

    def for_model(self, source: ModelSource) -> "SDXL":
        """Returns the family as the model's model_index.json configures it."""
        index = source.read_json("", "model_index.json") or {}
        return replace(self, zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True))

    def schedule(self, source: ModelSource) -> NoiseSchedule:
        """Returns the noise schedule of the model's own scheduler config."""
        return _LAYOUT.schedule(source)

    def load(
        self, source: ModelSource, dtype: torch.dtype = torch.float32, guidance_embed_dim: int | None = None
    ) -> "UNet2DConditionModel":
        """Returns the UNet in evaluation mode on the CPU."""
        return _unet.load_unet(source, _LAYOUT, dtype, guidance_embed_dim)

    def load_encoders(
        self, source: ModelSource, device: torch.device, dtype: torch.dtype, parts: frozenset[Part]
    ) -> ClipEncoders:
        """Returns the encoders of the parts, frozen, on the device.

        Raises:
            UserError: The VAE is asked for in float16, where the published one overflows.
        """
        encoders = _clip_encoders.load_encoders(source, _LAYOUT, device, dtype, parts)
        if encoders.vae is not None and dtype == torch.float16 and encoders.vae.config["force_upcast"]:
            raise UserError(
                f"vae_dtype: the VAE of '{source.place('vae').path}' overflows in fp16; use fp32 or bf16, or a VAE "
                "made for fp16 (pretrained_vae_model_name_or_path: madebyollin/sdxl-vae-fp16-fix)"
            )
        return encoders

    def encode_image(self, encoders: ClipEncoders, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns posterior mean and standard deviation, [B, C, h, w] float32, of pixels [B, 3, H, W] in [-1, 1]."""
        return _clip_encoders.encode_image(encoders, pixels)

    def encode_prompt(self, encoders: ClipEncoders, prompts: list[str]) -> Cond:
        """Returns ``prompt_embeds`` [B, S, D] and ``pooled_prompt_embeds`` [B, P].

        Tokens: the layer before the last of both encoders, side by side. Pooled: the second encoder's projection.
        Prompts are cut after 75 tokens, as in the pipeline.
        """
        outputs = _clip_encoders.run_text_encoders(encoders, prompts)
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": outputs[-1][0]}

    def uncond(self, cond: Cond, empty: Cond | None = None) -> Cond:
        """Returns zeros, tokens and pooled; or ``empty`` for a model whose files say that it wants the encoded ""."""
        if self.zeros_for_empty_prompt:
            return {key: torch.zeros_like(value) for key, value in cond.items()}
        return _clip_encoders.like_empty(cond, empty)

    def forward(
        self, module: nn.Module, x_t: Tensor, model_t: Tensor, cond: Cond, geometry: Tensor, w: Tensor | None = None
    ) -> Tensor:
        """Returns the UNet's raw prediction [B, C, h, w]."""
        pooled = cond["pooled_prompt_embeds"].to(next(module.parameters()).dtype)
        # time_ids stay float32: bfloat16 rounds 1365 to 1368.
        added = {"text_embeds": pooled, "time_ids": geometry.float()}
        return _unet.predict(module, x_t, model_t, cond["prompt_embeds"], w, added)

    def pipeline(
        self, module: nn.Module, scheduler: Any, vae: Any, encoders: ClipEncoders | None = None
    ) -> "StableDiffusionXLPipeline":  # Any: diffusers' schedulers share no public base with types
        """Returns a stock pipeline around the parts; without encoders it takes features only."""
        from diffusers import StableDiffusionXLPipeline

        text: tuple[Any, ...] = (encoders and encoders.text_encoders) or (None, None)
        tokenizers: tuple[Any, ...] = (encoders and encoders.tokenizers) or (None, None)
        unet: Any = module
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=text[0],
            text_encoder_2=text[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            **_LAYOUT.pipeline_options,
        )

    def pipeline_inputs(self, cond: Cond, uncond: Cond | None = None) -> dict[str, Tensor]:
        """Returns the features as the keyword arguments of the pipeline's call."""
        return {**cond, **{f"negative_{key}": value for key, value in (uncond or {}).items()}}

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], metadata: Json) -> Path:
        """Writes ``pytorch_lora_weights.safetensors`` in diffusers' format, atomically; returns the file."""
        return _lora_file.save_lora(_LAYOUT.pipeline, folder, state, metadata)

    def load_lora(self, module: nn.Module, path: Path, adapter: str) -> None:
        """Adds the adapter of a file (diffusers' or kohya's names) to the UNet, under a name."""
        _lora_file.load_lora(_LAYOUT.pipeline, module, path, adapter)

    def fingerprint(self, source: ModelSource, part: Part) -> str:
        """Returns a digest of the files that the part's features depend on; a hub id is downloaded first."""
        return _LAYOUT.fingerprint(source, part)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Returns (C, h, w) of a picture's latents."""
        return _clip_encoders.latent_shape(width, height)


def _cond_numbers(unet: Json, tokens: int) -> int:
    """Returns S tokens of width D, and P pooled numbers; the published model's widths when the config is not there."""
    pooled = unet.get("projection_class_embeddings_input_dim", 2816) - 6 * unet.get("addition_time_embed_dim", 256)
    return tokens * unet.get("cross_attention_dim", 2048) + pooled


PLUGIN = SDXL
