"""VAE, CLIP text encoders and tokenizers: from a folder, the hub, or a single file with configs from elsewhere.

Shapes: B batch, C latent channels, h w latent size, H W picture size in pixels, S tokens, D width of a text encoder.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Cond
from simpletuner.config.errors import UserError
from simpletuner.families._base import Part
from simpletuner.families._layout import Layout, marker
from simpletuner.families._source import ModelSource

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class ClipEncoders:
    """The parts that were asked for; the others are None."""

    vae: "AutoencoderKL | None" = None
    text_encoders: tuple[Any, ...] | None = None  # Any: transformers' modules, with and without projection
    tokenizers: tuple[Any, ...] | None = None  # Any: transformers' tokenizers are untyped


def load_encoders(
    source: ModelSource, layout: Layout, device: torch.device, dtype: torch.dtype, parts: frozenset[Part]
) -> ClipEncoders:
    """Returns the encoders of the parts, frozen, on the device. Raises UserError for a VAE of other models."""
    vae = _load_vae(source, layout, dtype) if "vae" in parts else None
    encoders, tokenizers = _load_text(source, layout, dtype) if "text" in parts else (None, None)
    for module in (vae, *(encoders or ())):
        if module is not None:
            nn.Module.to(module, device).requires_grad_(False).eval()
    return ClipEncoders(vae, encoders, tokenizers)


def _load_vae(source: ModelSource, layout: Layout, dtype: torch.dtype) -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    place, path = source.place("vae"), source.fetch("vae")
    if path.is_file():
        config = str(layout.configs(source))
        vae = AutoencoderKL.from_single_file(str(path), config=config, subfolder="vae", dtype=dtype)
    else:
        vae = AutoencoderKL.from_pretrained(path, use_safetensors=True, variant=place.variant, torch_dtype=dtype)
    for key in layout.unknown_to_pipeline:
        if vae.config.get(key):
            raise UserError(
                f"{place.key}: '{place.path}' is no {layout.title} VAE: {layout.title} pipelines know no {key}"
            )
    return vae


def _load_text(source: ModelSource, layout: Layout, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns text encoders and tokenizers; Any as in ``ClipEncoders``."""
    if source.main.kind == "file":
        import diffusers

        # diffusers converts the text encoders of a single file only on the way to a pipeline.
        options = {"unet": None, "vae": None, **layout.pipeline_options}
        pipeline: Any = getattr(diffusers, layout.pipeline)  # Any: a class by its name
        parts = pipeline.from_single_file(source.path, config=str(layout.configs(source)), dtype=dtype, **options)
        return (
            tuple(getattr(parts, name) for name in layout.text_encoders),
            tuple(getattr(parts, name) for name in layout.tokenizers),
        )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    keywords: dict[str, Any] = {"use_safetensors": True, "variant": source.variant, "dtype": dtype}
    return (
        tuple(classes[name].from_pretrained(source.fetch(name), **keywords) for name in layout.text_encoders),
        tuple(CLIPTokenizer.from_pretrained(source.fetch(name, marker(name))) for name in layout.tokenizers),
    )


@torch.no_grad()
def encode_image(encoders: ClipEncoders, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns posterior mean and standard deviation, [B, C, h, w] float32, as the UNet sees latents.

    The inverse of what the stock pipelines do before they decode.

    Args:
        encoders: With the VAE.
        pixels: [B, 3, H, W] in [-1, 1].
    """
    vae = encoders.vae
    assert vae is not None, "the encoders were loaded without the VAE"
    posterior: Any = vae.encode(pixels.to(vae.device, vae.dtype), return_dict=False)[0]
    mean, std = posterior.mean.float(), posterior.std.float()
    scale = vae.config["scaling_factor"]
    if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
        center, spread = (mean.new_tensor(vae.config[key]) for key in ("latents_mean", "latents_std"))
        scale = scale / spread[:, None, None]
        mean = mean - center[:, None, None]
    return mean * scale, std * scale


def latent_shape(width: int, height: int) -> tuple[int, int, int]:
    """Returns (C, h, w) of a picture's latents: the VAE's factor is 8."""
    return 4, height // 8, width // 8


@torch.no_grad()
def run_text_encoders(encoders: ClipEncoders, prompts: list[str]) -> list[Any]:  # Any: transformers' outputs
    """Returns each text encoder's output, all hidden states included; prompts are cut to S tokens, as in pipelines."""
    assert encoders.text_encoders is not None, "the encoders were loaded without the text part"
    assert encoders.tokenizers is not None
    outputs: list[Any] = []
    for tokenizer, encoder in zip(encoders.tokenizers, encoders.text_encoders, strict=True):
        length: int = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        outputs.append(encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True))
    return outputs


def like_empty(cond: Cond, empty: Cond | None) -> Cond:
    """Returns the features of the prompt "", ``empty`` [1, ...], in the shape of ``cond`` [B, ...]."""
    assert empty is not None, "this model's unconditional features are those of the empty prompt"
    return {key: empty[key].to(value).expand_as(value) for key, value in cond.items()}
