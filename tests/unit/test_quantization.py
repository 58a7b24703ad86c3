"""Packed weights: how near they are, what a step through them keeps in memory, what is refused."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.errors import UserError
from simpletuner.config.sections import ModelSection, Precision
from simpletuner.families._source import ModelSource
from simpletuner.families.sdxl import SDXL
from simpletuner.quantization import NONE, SCHEMES, check_precisions, num_bytes, quantize, text_precisions
from simpletuner.training.adapters import attach_lora, trainable_parameters

CPU = torch.device("cpu")
ERRORS = {
    "int8-quanto": 0.01,
    "int8-torchao": 0.01,
    "fp8-quanto": 0.04,
    "fp8-torchao": 0.04,
    "int4-quanto": 0.12,
    "int4-torchao": 0.12,
    "nf4-bnb": 0.12,
    "int2-quanto": 0.6,
}
"""Scheme -> largest relative error of normal weights, in rows of 64 to 288 numbers."""
here = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            (scheme.package is not None and find_spec(scheme.package) is None)
            or (scheme.needs_cuda and not torch.cuda.is_available()),
            reason="an extra, or a device, is missing",
        ),
    )
    for name, scheme in SCHEMES.items()
]


class Block(nn.Module):
    """A convolution and a linear layer, as they stand inside of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.linear = nn.Linear(48, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(nn.functional.silu(self.conv(x)).flatten(2).mT)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict({"block": Block()}).to(dtype).requires_grad_(False)


def sample(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def test_the_config_knows_the_table() -> None:
    assert {*SCHEMES, NONE} == set(get_args(Precision))
    assert ERRORS.keys() == SCHEMES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", here)
def test_a_packed_weight_is_near_and_computes_as_a_plain_one(name: str, dtype: torch.dtype) -> None:
    original, packed, plain = network(dtype), network(dtype), network(dtype)
    quantize(packed, name, CPU)
    with torch.no_grad():
        for layer in ("conv", "linear"):
            weight = getattr(packed["block"], layer).weight
            expected = getattr(original["block"], layer).weight
            assert weight.shape == expected.shape
            assert weight.dtype == dtype
            assert 0 < (weight - expected).norm() < ERRORS[name] * expected.norm()
            getattr(plain["block"], layer).weight.copy_(weight)
    found, reference = sample(dtype), sample(dtype)
    one, two = packed["block"](found), plain["block"](reference)
    assert torch.equal(one, two)
    for output in (one, two):
        output.square().sum().backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad, reference.grad)


@pytest.mark.parametrize("name", here)
def test_rows_without_spread_stay_numbers(name: str) -> None:
    module = network()
    with torch.no_grad():
        module["block"].linear.weight[:2] = torch.tensor([[0.0], [0.25]])
    quantize(module, name, CPU)
    rows = module["block"].linear.weight[:2]
    torch.testing.assert_close(rows, torch.tensor([[0.0], [0.25]]).expand_as(rows), rtol=0.01, atol=1e-6)


def library_dequantized(name: str, weight: Tensor) -> Tensor:
    """Returns a weight as the library itself quantizes and dequantizes it."""
    if name.endswith("quanto"):
        from optimum.quanto import AbsmaxOptimizer, qtypes, quantize_weight

        kind = qtypes[{"int8-quanto": "qint8", "fp8-quanto": "qfloat8"}[name]]
        return quantize_weight(weight, kind, axis=0, scale=AbsmaxOptimizer()(weight, kind, axis=0)).dequantize()
    import torchao.quantization as ao

    config = {"int8-torchao": ao.Int8WeightOnlyConfig(), "fp8-torchao": ao.Float8WeightOnlyConfig()}[name]
    layer = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    ao.quantize_(layer, config)
    return layer.weight.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [case for case in here if "8" in str(case.values[0])])
def test_the_numbers_are_the_librarys_own(name: str, dtype: torch.dtype) -> None:
    original, packed = network(dtype), network(dtype)
    quantize(packed, name, CPU)
    expected = library_dequantized(name, original["block"].linear.weight)
    assert torch.equal(packed["block"].linear.weight, expected)


@pytest.mark.parametrize("name", ["int8-quanto", "int4-quanto"])
def test_no_unpacked_weight_is_kept_for_the_backward_pass(name: str) -> None:
    module, kept = network(), list[int]()
    quantize(module, name, CPU)
    block = module["block"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        output = block(sample())
    assert output.requires_grad
    assert sum(kept) == 2 * 48 * 4 * 4  # what silu keeps of its input; plain layers keep weights and inputs too


def sdxl_unet() -> nn.Module:
    """Returns the UNet of the published SDXL, without its numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            attention_head_dim=(5, 10, 20),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            projection_class_embeddings_input_dim=2816,
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
        ).to(torch.bfloat16)


def test_the_bytes_of_an_sdxl() -> None:
    """Measured on the device without memory: the packed tensors of all layers, and what is not packed."""
    unet = sdxl_unet().requires_grad_(False)
    plain = num_bytes(unet)
    assert plain == 2 * 2_567_463_684
    for name, most in {"int8-quanto": 0.505, "int4-quanto": 0.27}.items():
        packed = copy.deepcopy(unet)
        quantize(packed, name, torch.device("meta"))
        assert num_bytes(packed) < most * plain
    kept = {name for name, layer in packed.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}
    ends = {"conv_in", "conv_out"}
    embeddings = {f"{kind}_embedding.linear_{number}" for kind in ("time", "add") for number in (1, 2)}
    assert kept == ends | embeddings


def test_adapters_stay_as_they_are(tiny_model: Path) -> None:
    """The published LCM-LoRA's targets have convolutions, on whose packed kin peft 0.21 fails."""
    unet = SDXL().load(ModelSource(str(tiny_model)))
    targets = ["to_q", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj", "conv_in"]
    attach_lora(unet, {"r": 4, "lora_alpha": 4, "target_modules": targets}, 0)
    before = {name: value.clone() for name, value in trainable_parameters(unet).items()}
    quantize(unet, "int8-quanto", CPU)
    after = trainable_parameters(unet)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layers = {name: type(layer).__name__ for name, layer in unet.named_modules()}
    assert layers["down_blocks.0.resnets.0.conv1.base_layer"] == "PackedConv2d"
    assert layers["down_blocks.0.resnets.0.conv1.lora_A.default"] == "Conv2d"
    assert layers["conv_in.base_layer"] == "Conv2d"


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_a_packed_layer_learns(tiny_model: Path, use_dora: bool) -> None:
    unet = SDXL().load(ModelSource(str(tiny_model)))
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "conv1"], "use_dora": use_dora}
    attach_lora(unet, settings, 0)
    quantize(unet, "int8-quanto", CPU)
    cond = {"prompt_embeds": torch.randn(1, 77, 96), "pooled_prompt_embeds": torch.zeros(1, 64)}
    output = SDXL().forward(unet, torch.randn(1, 4, 8, 8), torch.tensor([5]), cond, torch.zeros(1, 6))
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in trainable_parameters(unet).items() if "lora_B" in name}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def model(**keys: str) -> ModelSection:
    return ModelSection.model_validate({"model_family": "sdxl", "pretrained_model_name_or_path": "a/b", **keys})


def test_what_cannot_be_is_refused_in_one_line_each() -> None:
    with pytest.raises(UserError) as caught:
        check_precisions(model(model_type="full", base_model_precision="int8-quanto"), 2)
    assert caught.value.lines == (
        "base_model_precision: 'int8-quanto' is for a frozen base, and model_type full trains it all; "
        "set it to no_change, or model_type to lora",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_what_needs_a_device_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError) as caught:
        check_precisions(model(base_model_precision="nf4-bnb"), 2)
    assert caught.value.lines == (
        "base_model_precision: 'nf4-bnb' needs a CUDA device, and there is none; use 'int4-quanto'",
    )


@pytest.mark.skipif(find_spec("torchao") is not None, reason="it is installed")
def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(UserError, match=r'^text_encoder_2_precision.*pip install "simpletuner\[torchao\]"$'):
        check_precisions(model(text_encoder_2_precision="int8-torchao"), 2)


def test_the_precisions_of_encoders_that_are_not_there_are_named() -> None:
    section = model(text_encoder_2_precision="int8-quanto", text_encoder_3_precision="fp8-quanto")
    assert check_precisions(section, 2) == ["text_encoder_3_precision: has no effect: the family has 2 text encoders"]
    assert text_precisions(section, 2) == (NONE, "int8-quanto")
    assert text_precisions(section, 1) == ()
