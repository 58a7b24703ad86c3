# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false
# (diffusers and transformers are typed in part: most of what their objects return is unknown to a type checker)
"""SDXL's VAE, text encoders and tokenizers: from a folder, the hub, or a single file with configs from elsewhere."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from simpletuner.config.errors import UserError
from simpletuner.families._base import Part
from simpletuner.families._source import ModelSource

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PUBLISHED = "stabilityai/stable-diffusion-xl-base-1.0"
PARTS: dict[Part, tuple[str, ...]] = {
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}
"""What each part consists of, by the names of diffusers' folders."""


@dataclass(frozen=True)
class SDXLEncoders:
    """The parts that were asked for; the others are None."""

    vae: "AutoencoderKL | None" = None
    text_encoders: "tuple[CLIPTextModel, CLIPTextModelWithProjection] | None" = None
    tokenizers: "tuple[CLIPTokenizer, CLIPTokenizer] | None" = None


def marker(component: str) -> str:
    """Returns the file that shows a component's folder to be one."""
    return "tokenizer_config.json" if component.startswith("tokenizer") else "config.json"


def config_patterns() -> list[str]:
    """Returns the files of a repository that a single file's components need: no weights."""
    components = ("unet", *PARTS["vae"], *PARTS["text"], "scheduler")
    return ["model_index.json", *(f"{name}/*.{end}" for name in components for end in ("json", "txt"))]


def load_vae(source: ModelSource, device: torch.device, dtype: torch.dtype) -> "AutoencoderKL":
    """Returns the VAE, frozen, on the device. Raises UserError for one that would overflow or that SDXL cannot use."""
    from diffusers import AutoencoderKL

    place, path = source.place("vae"), source.fetch("vae")
    if path.is_file():
        config = str(source.config_place(PUBLISHED).fetch(config_patterns()))
        vae = AutoencoderKL.from_single_file(str(path), config=config, subfolder="vae", dtype=dtype)
    else:
        vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, variant=place.variant, torch_dtype=dtype)
    if dtype == torch.float16 and vae.config["force_upcast"]:
        raise UserError(
            f"vae_dtype: the VAE of '{place.path}' overflows in fp16; use fp32 or bf16, or a VAE made for fp16 "
            "(pretrained_vae_model_name_or_path: madebyollin/sdxl-vae-fp16-fix)"
        )
    if vae.config.get("shift_factor"):
        raise UserError(f"{place.key}: '{place.path}' is no SDXL VAE: SDXL pipelines know no shift_factor")
    nn.Module.to(vae, device)
    return vae.requires_grad_(False).eval()


def load_text(
    source: ModelSource, dtype: torch.dtype
) -> "tuple[tuple[CLIPTextModel, CLIPTextModelWithProjection], tuple[CLIPTokenizer, CLIPTokenizer]]":
    """Returns both text encoders and both tokenizers."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    if source.main.kind == "file":
        from diffusers import StableDiffusionXLPipeline

        config = str(source.config_place(PUBLISHED).fetch(config_patterns()))
        # diffusers converts the text encoders of a single file only on the way to a pipeline.
        parts = StableDiffusionXLPipeline.from_single_file(
            source.path, config=config, unet=None, vae=None, dtype=dtype, add_watermarker=False
        )
        return (parts.text_encoder, parts.text_encoder_2), (parts.tokenizer, parts.tokenizer_2)
    keywords: dict[str, Any] = {"use_safetensors": True, "variant": source.variant, "dtype": dtype}
    encoders = (
        CLIPTextModel.from_pretrained(source.fetch("text_encoder"), **keywords),
        CLIPTextModelWithProjection.from_pretrained(source.fetch("text_encoder_2"), **keywords),
    )
    first, second = (source.fetch(name, marker(name)) for name in ("tokenizer", "tokenizer_2"))
    return encoders, (CLIPTokenizer.from_pretrained(first), CLIPTokenizer.from_pretrained(second))
