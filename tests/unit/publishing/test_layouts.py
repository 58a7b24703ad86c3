"""Names of other programs' files, held against diffusers' own conversion and the published UNets' names."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from simpletuner.publishing.layouts import (
    CHECKPOINT_PREFIX,
    Blocks,
    NoLayout,
    checkpoint_unet,
    effective_alphas,
    kohya_lora,
    original_module,
)

SDXL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "use_linear_projection": True,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
SD15: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}


@pytest.mark.parametrize("config", [SDXL, SD15], ids=["sdxl", "sd15"])
def test_diffusers_reads_every_tensor_of_a_checkpoint_back(config: dict[str, Any]) -> None:
    unet = UNet2DConditionModel(**config)
    state = dict(unet.state_dict())
    written = checkpoint_unet(state)
    assert len(written) == len(state)
    assert all(name.startswith(CHECKPOINT_PREFIX) for name in written)
    again = convert_ldm_unet_checkpoint(written, dict(unet.config))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("name", "original"),
    [  # as in sd_xl_base_1.0.safetensors
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.2", "middle_block.1.transformer_blocks.9.ff.net.2"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.2.proj_out", "output_blocks.5.1.proj_out"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_names_of_the_published_sdxl(name: str, original: str) -> None:
    assert original_module(name, Blocks.of(UNet2DConditionModel(**SDXL).state_dict())) == original


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0.conv9", "motion_modules.0.proj", "mid_block"])
def test_a_module_without_original_is_said(name: str) -> None:
    with pytest.raises(NoLayout, match=name):
        original_module(name, Blocks(2, frozenset()))


def test_alphas_are_what_the_adapter_is_scaled_by() -> None:
    state = {f"{module}.lora_A.weight": torch.zeros(4, 2) for module in ("a.to_q", "a.to_k")}
    assert effective_alphas(state, {"lora_alpha": 8}) == {"a.to_q": 8.0, "a.to_k": 8.0}
    assert effective_alphas(state, {"lora_alpha": 8, "use_rslora": True}) == {"a.to_q": 16.0, "a.to_k": 16.0}
    assert effective_alphas(state, {"lora_alpha": 8, "alpha_pattern": {"to_k": 2}}) == {"a.to_q": 8.0, "a.to_k": 2.0}
    assert effective_alphas(state, {}) == {"a.to_q": 4.0, "a.to_k": 4.0}


def test_what_an_adapter_of_kohya_has_no_place_for_is_said() -> None:
    state = {"a.lora_A.weight": torch.zeros(1, 1), "a.lora_magnitude_vector": torch.zeros(1)}
    with pytest.raises(NoLayout, match="a.lora_magnitude_vector"):
        kohya_lora(state, {"a": 1.0}, {})
