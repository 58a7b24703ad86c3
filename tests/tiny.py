"""Tiny models and picture folders for the tests: real components, small numbers."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.quickstart.model import write_model

tiny_sdxl = write_model
"""``tiny_sdxl(folder, prediction_type="epsilon", seed=0)`` writes a complete diffusers SDXL folder."""

SIZES = ((96, 96), (128, 80), (80, 128), (112, 84), (84, 112))


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
    from simpletuner.quickstart.model import make_pipeline

    pipeline = make_pipeline(prediction_type, seed)
    components = {
        "model.diffusion_model": _unet(pipeline.unet),
        "first_stage_model": _vae(pipeline.vae),
        "conditioner.embedders.0.transformer": _text(pipeline.text_encoder),
        "conditioner.embedders.1.model": _open_clip(pipeline.text_encoder_2),
    }
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
    """Returns the first text encoder's weights under transformers' old names, which the original uses."""
    state = encoder.state_dict().items()
    return {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in state}


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
    """Returns the second text encoder's weights under OpenCLIP's names: q, k, v are one matrix."""
    state = encoder.state_dict()
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


RECIPES = {"sdxl": tiny_sdxl}
"""Family -> what writes a tiny model of it into a folder; the conformance tests want one for each family."""
