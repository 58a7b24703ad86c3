"""Tiny models and picture folders for the tests: real components, small numbers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.quickstart.model import TINY, make_pipeline, make_tokenizers, write_model

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

tiny_sdxl = write_model
"""``tiny_sdxl(folder, prediction_type="epsilon", seed=0)`` writes a complete diffusers SDXL folder."""

SIZES = ((96, 96), (128, 80), (80, 128), (112, 84), (84, 112))


def tiny_sd1x(folder: Path, prediction_type: str = "epsilon", seed: int = 0, version: int = 1) -> Path:
    """Writes a complete diffusers folder of an SD 1.x, or 2.x, into a folder; returns the folder."""
    make_sd1x(prediction_type, seed, version).save_pretrained(folder, safe_serialization=True)
    return folder


def make_sd1x(prediction_type: str = "epsilon", seed: int = 0, version: int = 1) -> "StableDiffusionPipeline":
    """Returns an SD 1.x, or 2.x, as a pipeline: SDXL's VAE and first (second) text encoder, and a UNet of its own."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    xl = make_pipeline(prediction_type, seed)
    xl.vae.register_to_config(scaling_factor=0.18215)
    text, tokenizer = (xl.text_encoder, xl.tokenizer) if version == 1 else (xl.text_encoder_2, xl.tokenizer_2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4 if version == 1 else (2, 4),
            norm_num_groups=8,
            use_linear_projection=version == 2,
            cross_attention_dim=text.config.hidden_size,
        )
        encoder = CLIPTextModel(text.config).eval()
    return StableDiffusionPipeline(
        vae=xl.vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_clip(folder: Path) -> Path:
    """Writes a CLIP model of random weights, with its processor, into a folder; returns the folder."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tokenizer = make_tokenizers(TINY)[0]
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def image_folder(folder: Path, count: int = 6, sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> Path:
    """Writes ``count`` noisy PNG pictures 000.png, ... of the sizes (width, height) in turn, with captions 000.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        coarse = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(f"a picture number {index}\n", encoding="utf8")
    return folder


def tiny_single_file(path: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Writes the weights of ``tiny_sdxl`` into one file under the original SDXL names; returns the path."""
    pipeline = make_pipeline(prediction_type, seed)
    components = {
        "model.diffusion_model": _unet(pipeline.unet),
        "first_stage_model": _vae(pipeline.vae),
        "conditioner.embedders.0.transformer": _text(pipeline.text_encoder),
        "conditioner.embedders.1.model": _open_clip(pipeline.text_encoder_2),
    }
    return _write_single_file(path, components, prediction_type)


def tiny_sd1x_file(path: Path, prediction_type: str = "epsilon", seed: int = 0, version: int = 1) -> Path:
    """Writes the weights of ``tiny_sd1x`` into one file under the original names; returns the path."""
    pipeline = make_sd1x(prediction_type, seed, version)
    text = {"transformer": _text} if version == 1 else {"model": _open_clip}
    components = {
        "model.diffusion_model": _unet(pipeline.unet),
        "first_stage_model": _vae(pipeline.vae),
        **{f"cond_stage_model.{name}": rename(pipeline.text_encoder) for name, rename in text.items()},
    }
    return _write_single_file(path, components, prediction_type)


def _write_single_file(path: Path, components: dict[str, dict[str, Tensor]], prediction_type: str) -> Path:
    state = {f"{prefix}.{name}": value for prefix, part in components.items() for name, value in part.items()}
    if prediction_type == "v_prediction":
        state["v_pred"] = torch.empty(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous() for name, value in state.items()}, path)
    return path


def _renamed(name: str, rules: dict[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


_RESNET = {
    r"\.norm1\.": ".in_layers.0.",
    r"\.conv1\.": ".in_layers.2.",
    r"\.norm2\.": ".out_layers.0.",
    r"\.conv2\.": ".out_layers.3.",
    r"\.time_emb_proj\.": ".emb_layers.1.",
    r"\.conv_shortcut\.": ".skip_connection.",
}
_UNET_ENDS = {
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^add_embedding\.linear_1": "label_emb.0.0",
    r"^add_embedding\.linear_2": "label_emb.0.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"^mid_block\.resnets\.0": "middle_block.0",
    r"^mid_block\.attentions\.0": "middle_block.1",
    r"^mid_block\.resnets\.1": "middle_block.2",
}


def _unet(unet: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the UNet's weights under the original names: the blocks are numbered through."""
    layers = unet.config["layers_per_block"] + 1
    has_attention = [kind.startswith("CrossAttn") for kind in unet.config["up_block_types"]]

    def block(match: re.Match[str]) -> str:
        side, number, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        slot = {"resnets": "0", "attentions": "1", "downsamplers": "0.op", "upsamplers": ""}[kind]
        if kind == "upsamplers":
            slot = f"{1 + has_attention[number]}.conv"
        last = kind.endswith("samplers")
        index = number * layers + (layers - 1 if last else layer)
        return f"input_blocks.{1 + index}.{slot}" if side == "down" else f"output_blocks.{index}.{slot}"

    names = r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:(?<=samplers\.\d)\.conv)?"
    renamed: dict[str, Tensor] = {}
    for name, value in unet.state_dict().items():
        name = _renamed(name, _RESNET) if ".resnets." in name else name
        renamed[_renamed(re.sub(names, block, name), _UNET_ENDS)] = value
    return renamed


_VAE_RULES = {
    r"encoder\.down_blocks\.(\d)\.resnets\.": r"encoder.down.\1.block.",
    r"encoder\.down_blocks\.(\d)\.downsamplers\.0": r"encoder.down.\1.downsample",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.to_([qkv])": r"attn_1.\1",
    r"attn_1\.to_out\.0": "attn_1.proj_out",
    r"conv_shortcut": "nin_shortcut",
    r"conv_norm_out": "norm_out",
}


def _vae(vae: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the VAE's weights under the original names: decoder levels count down, attention is a 1x1 convolution."""
    last = len(vae.config["up_block_types"]) - 1
    renamed: dict[str, Tensor] = {}
    for name, value in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)\.", lambda match: f"up.{last - int(match[1])}.", name)
        name = name.replace(".resnets.", ".block.") if ".up." in name else name
        name = _renamed(name.replace("upsamplers.0", "upsample"), _VAE_RULES)
        convolution = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        renamed[name] = value[:, :, None, None] if convolution else value
    return renamed


def _text(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Returns a text encoder's weights under transformers' old names, which the original uses."""
    state = encoder.state_dict().items()
    whole = ("text_model.", "text_projection.")
    return {name if name.startswith(whole) else f"text_model.{name}": value for name, value in state}


_OPEN_CLIP_RULES = {
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_model\.embeddings\.token_embedding": "token_embedding",
    r"^text_model\.final_layer_norm": "ln_final",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    r"\.self_attn\.": ".attn.",
    r"\.layer_norm([12])\.": r".ln_\1.",
    r"\.fc1\.": ".c_fc.",
    r"\.fc2\.": ".c_proj.",
    r"\.c_(fc|proj)\.": r".c_\1.",
}


def _open_clip(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Returns a text encoder's weights under OpenCLIP's names: q, k, v are one matrix."""
    state = _text(encoder)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif name == "text_projection.weight":
            name, value = "text_projection", value.T
        renamed[_renamed(name, _OPEN_CLIP_RULES)] = value
    return renamed


RECIPES = {"sdxl": tiny_sdxl, "sd1x": tiny_sd1x}
"""Family -> what writes a tiny model of it into a folder; the conformance tests want one for each family."""
