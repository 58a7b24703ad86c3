# pyright: reportArgumentType=false, reportPrivateImportUsage=false, reportUnknownMemberType=false
# (diffusers declares tuple[int] where it takes tuples of any length)
"""Complete SDXLs in a few megabytes: every component of the real one, with random weights, as a diffusers folder.

They run through the code that every user's model runs through. Their pictures are noise until they have been trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.atomic import new_folder
from simpletuner.quickstart.vocabulary import make_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    Tokenizers = tuple[CLIPTokenizer, CLIPTokenizer]
    TextEncoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]


@dataclass(frozen=True)
class Architecture:
    """The sizes of all components."""

    vae_channels: tuple[int, int, int, int]
    """One level more than halvings: the latents are an eighth of the picture."""
    text_widths: tuple[int, int]
    """Different, as in SDXL, where 768 and 1280 tell the encoders of a single file apart."""
    text_layers: int
    """The UNet is shown the layer before the last."""
    unet_channels: tuple[int, int]
    unet_heads: tuple[int, int]
    """Attention heads of each level; only the second level has attention."""
    num_tokens: int = 77
    norm_groups: int = 8
    """Of the UNet."""
    vae_norm_groups: int = 8
    time_id_width: int = 16
    """Of the embedding of each of the six numbers that tell the picture's geometry."""
    sample_size_px: int = 64


TINY = Architecture((8, 16, 16, 16), (32, 64), text_layers=2, unet_channels=(32, 64), unet_heads=(2, 4))
"""1.3 million parameters: for tests, where what is drawn does not matter."""
TEACHER = Architecture(
    # More than (16, 32, 32, 48), which rounded the corners of squares and small stars off.
    (16, 32, 48, 64),
    (48, 80),
    text_layers=3,
    unet_channels=(64, 128),
    unet_heads=(4, 8),
    # The longest of 20,000 captions has 17, start and end included; with 77, text features take 2.4 times the space.
    num_tokens=32,
    norm_groups=16,
    vae_norm_groups=4,
)
"""5.4 million parameters: for the model that learns to draw the quickstart's scenes (config/examples/teacher)."""


def write_model(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Writes the tiny model into a folder, once, and returns the folder; the weights are a function of the seed.

    The folder appears whole or not at all.
    """
    if (folder / "model_index.json").is_file():
        return folder
    with new_folder(folder) as made:
        make_pipeline(prediction_type, seed).save_pretrained(made, safe_serialization=True)
    return folder


def make_pipeline(
    prediction_type: str = "epsilon", seed: int = 0, architecture: Architecture = TINY
) -> "StableDiffusionXLPipeline":
    """Returns a model as a pipeline, on the CPU in float32; the global random state is left as it was."""
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = make_tokenizers(architecture)
        text_encoders = make_text_encoders(architecture, tokenizers[0])
        return StableDiffusionXLPipeline(
            vae=make_vae(architecture),
            text_encoder=text_encoders[0],
            text_encoder_2=text_encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=make_unet(architecture),
            scheduler=make_scheduler(prediction_type),
            add_watermarker=False,
        )


def make_scheduler(prediction_type: str = "epsilon") -> "EulerDiscreteScheduler":
    """Returns SDXL's own scheduler."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        timestep_spacing="leading",
    )


def make_unet(architecture: Architecture) -> "UNet2DConditionModel":
    """Returns a UNet with SDXL's conditioning, its weights drawn from the global random state."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=architecture.sample_size_px // 8,
        block_out_channels=architecture.unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=architecture.unet_heads,  # diffusers' name for their number
        norm_num_groups=architecture.norm_groups,
        use_linear_projection=True,
        cross_attention_dim=sum(architecture.text_widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=architecture.time_id_width,
        projection_class_embeddings_input_dim=6 * architecture.time_id_width + architecture.text_widths[1],
    )


def make_vae(architecture: Architecture) -> "AutoencoderKL":
    """Returns a VAE with SDXL's scaling factor, its weights drawn from the global random state."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=architecture.sample_size_px,
        block_out_channels=architecture.vae_channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=architecture.vae_norm_groups,
        latent_channels=4,
        scaling_factor=0.13025,
    )


def make_tokenizers(architecture: Architecture) -> "Tokenizers":
    """Returns both tokenizers; SDXL pads its second encoder's texts with "!"."""
    tokenizers = make_tokenizer(), make_tokenizer(pad_token="!")
    for tokenizer in tokenizers:
        tokenizer.model_max_length = architecture.num_tokens
    return tokenizers


def make_text_encoders(architecture: Architecture, tokenizer: "CLIPTokenizer") -> "TextEncoders":
    """Returns both text encoders, their weights drawn from the global random state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def _config(width: int, activation: str) -> Any:  # Any: transformers' configs are untyped
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=architecture.text_layers,
            num_attention_heads=2,
            max_position_embeddings=architecture.num_tokens,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    activations = ("quick_gelu", "gelu")
    first, second = (_config(width, name) for width, name in zip(architecture.text_widths, activations, strict=True))
    return CLIPTextModel(first).eval(), CLIPTextModelWithProjection(second).eval()
