# pyright: reportArgumentType=false, reportPrivateImportUsage=false, reportUnknownMemberType=false
# (diffusers declares tuple[int] where it takes tuples of any length)
"""A complete SDXL in a few megabytes: every component of the real one with random weights, as a diffusers folder.

It runs through the code that every user's model runs through. Its pictures are noise until it has been trained.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.atomic import new_folder
from simpletuner.quickstart.vocabulary import make_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_TEXT_WIDTHS = (32, 64)
"""Of the two text encoders: different, as in SDXL, where 768 and 1280 tell them apart in a single file."""
_TIME_ID_WIDTH = 16


def write_model(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Writes the model into a folder, once, and returns the folder; the weights are a function of the seed.

    The folder appears whole or not at all.
    """
    if (folder / "model_index.json").is_file():
        return folder
    with new_folder(folder) as made:
        make_pipeline(prediction_type, seed).save_pretrained(made, safe_serialization=True)
    return folder


def make_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> "StableDiffusionXLPipeline":
    """Returns the model as a pipeline, on the CPU in float32; the global random state is left as it was."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = make_tokenizer(), make_tokenizer(pad_token="!")  # SDXL pads its second encoder with "!"
        text = _make_text_encoders(tokenizers[0])
        return StableDiffusionXLPipeline(
            vae=_make_vae(),
            text_encoder=text[0],
            text_encoder_2=text[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=_make_unet(),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type=prediction_type,
                steps_offset=1,
                timestep_spacing="leading",
            ),
            add_watermarker=False,
        )


def _make_unet() -> "UNet2DConditionModel":
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        cross_attention_dim=sum(_TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * _TIME_ID_WIDTH + _TEXT_WIDTHS[1],
    )


def _make_vae() -> "AutoencoderKL":
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.13025,
    )


def _make_text_encoders(tokenizer: "CLIPTokenizer") -> "tuple[CLIPTextModel, CLIPTextModelWithProjection]":
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def _config(width: int, activation: str) -> Any:  # Any: transformers' configs are untyped
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    first, second = (_config(width, act) for width, act in zip(_TEXT_WIDTHS, ("quick_gelu", "gelu"), strict=True))
    return CLIPTextModel(first).eval(), CLIPTextModelWithProjection(second).eval()
