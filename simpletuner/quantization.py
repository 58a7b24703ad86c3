"""Frozen weights in 8, 4 or 2 bits: what can be had (``SCHEMES``), and layers that keep their weight packed.

Libraries decide which numbers stand for a weight; storing and computing are the same for all of them. A packed layer
unpacks its weight when it runs, forwards and again backwards, and keeps nothing in between: torchao's own layers leave
the unpacked weight to autograd, which is the whole base a second time. Adapters are attached first, to plain layers:
peft 0.21 makes the matrices of an adapter of the class of its base, which for quanto's convolutions are empty.

Shapes: O outputs, K numbers that an output is made from (channels times kernel), P a whole number of bytes.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from simpletuner.config.errors import Problems, UserError
from simpletuner.config.schema import ModelSection

NONE = "no_change"

Packed = tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]
"""Plain tensors, and what makes the weight [O, K] of them again."""


@dataclass(frozen=True)
class Scheme:
    """One way to pack a weight."""

    pack: Callable[[Tensor], Packed]
    """weight [O, K] on the device that trains -> its packed form."""
    package: str | None = None
    """Import name of what an extra brings."""
    extra: str | None = None
    needs_cuda: bool = False


def text_precisions(model: ModelSection, num_text_encoders: int) -> tuple[str, ...]:
    """Returns the precision of each text encoder; empty where none is quantized."""
    precisions = tuple(_text_keys(model).values())[:num_text_encoders]
    return precisions if set(precisions) != {NONE} else ()


def check_precisions(model: ModelSection, num_text_encoders: int) -> list[str]:
    """Returns a notice for each precision without effect.

    Raises:
        UserError: This machine, or this run, cannot have a precision; a line for each.
    """
    problems, text = Problems(), _text_keys(model)
    used = {"base_model_precision": model.base_model_precision} | dict(list(text.items())[:num_text_encoders])
    for key, precision in used.items():
        problems.attempt(partial(_check, precision, key))
    if model.model_type == "full" and model.base_model_precision != NONE:
        problems.lines.append(
            f"base_model_precision: '{model.base_model_precision}' is for a frozen base, and model_type full trains it "
            "all; set it to no_change, or model_type to lora"
        )
    problems.raise_any()
    idle = [key for key, precision in text.items() if precision != NONE and key not in used]
    return [f"{key}: has no effect: the family has {num_text_encoders} text encoders" for key in idle]


def _text_keys(model: ModelSection) -> dict[str, str]:
    """Returns key -> precision of the text encoders that the config knows."""
    return {key: value for key, value in model.model_dump().items() if re.fullmatch(r"text_encoder_\d_precision", key)}


def _check(precision: str, key: str) -> None:
    scheme = SCHEMES.get(precision)
    if scheme is None:
        return
    if scheme.needs_cuda and not torch.cuda.is_available():
        raise UserError(f"{key}: '{precision}' needs a CUDA device, and there is none; use 'int4-quanto'")
    if scheme.package is not None and find_spec(scheme.package) is None:
        raise UserError(
            f"{key}: '{precision}' needs the package '{scheme.package}': pip install \"simpletuner[{scheme.extra}]\""
        )


@torch.no_grad()
def quantize(module: nn.Module, precision: str, device: torch.device) -> None:
    """Packs the frozen weights of a network in place, each on the device; the rest of it stays where it is.

    Linear layers and convolutions are packed. What stands at the ends of the network keeps its precision: its direct
    children (``conv_in``, ``conv_out``, ``proj_out``) and the embeddings of time and text, less than 1 % of an SDXL.

    Args:
        module: With its adapters attached.
        precision: One of ``SCHEMES``, or ``no_change``.
        device: Where it is going to run.
    """
    if precision == NONE:
        return
    for name, layer in list(module.named_modules()):
        inner = name.removesuffix(".base_layer")
        if type(layer) in _CLASSES and not layer.weight.requires_grad and "." in inner and "embed" not in inner:
            _pack_layer(layer.to(device), SCHEMES[precision].pack)


def num_bytes(module: nn.Module) -> int:
    """Returns the memory that a network's parameters and buffers take."""
    return sum(tensor.nbytes for tensors in (module.parameters(), module.buffers()) for tensor in tensors)


def _pack_layer(layer: nn.Module, pack: Callable[[Tensor], Packed]) -> None:
    weight = cast(Tensor, layer.weight)
    parts, unpack = pack(weight.detach().flatten(1))
    del layer.weight
    for number, part in enumerate(parts):
        layer.register_buffer(f"packed_{number}", part, persistent=False)
    attributes = {"num_parts": len(parts), "unpack": unpack, "weight_shape": weight.shape}
    vars(layer).update(attributes)
    layer.__class__ = _CLASSES[type(layer)]


class _PackedLayer(nn.Module):
    """What packed layers have in common; ``weight`` [O, ...] is made anew each time that it is asked for."""

    num_parts: int
    unpack: Callable[[list[Tensor]], Tensor]
    weight_shape: torch.Size

    @property
    def weight(self) -> Tensor:
        parts = [cast(Tensor, getattr(self, f"packed_{number}")) for number in range(self.num_parts)]
        return self.unpack(parts).reshape(self.weight_shape)

    def forward(self, input: Tensor) -> Tensor:
        return cast(Any, _Frozen).apply(input, self)

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError


class PackedLinear(_PackedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]  (weight)
    """A linear layer whose weight is packed."""

    def compute(self, x: Tensor) -> Tensor:
        """Returns the layer's output."""
        return nn.functional.linear(x, self.weight, self.bias)

    def gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Returns the gradient of the input, [shape]."""
        return gradient @ self.weight


class PackedConv2d(_PackedLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]  (weight)
    """A convolution whose weight is packed."""

    def compute(self, x: Tensor) -> Tensor:
        """Returns the layer's output."""
        return self._conv_forward(x, self.weight, self.bias)

    def gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Returns the gradient of the input, [shape]."""
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, self.weight, gradient, *geometry)


_CLASSES: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


class _Frozen(torch.autograd.Function):
    """The output of a packed layer; its gradient is that of the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear | PackedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.gradient(gradients[0], ctx.shape), None


def _quanto8(name: str, weight: Tensor) -> Packed:
    """Packs as quanto does in 8 bits: each row in units that its largest number decides."""
    from optimum.quanto import AbsmaxOptimizer, qtypes

    kind: Any = qtypes[name]
    # A row of zeros has the unit 0, by which quanto divides.
    scale = AbsmaxOptimizer()(weight, kind, axis=0).clamp_min(torch.finfo(weight.dtype).tiny)
    return _scaled(torch.ops.quanto.quantize_symmetric(weight, kind.dtype, 0, scale), scale, weight.dtype)


def _quanto_bits(name: str, weight: Tensor) -> Packed:
    """Packs as quanto does in 4 and 2 bits: groups of a row between their smallest and their largest number.

    Its own unpacking compiles C++ (on a CUDA device all of quanto's kernels) when it is first used, for a shift and a
    mask.
    """
    from optimum.quanto import MaxOptimizer, qtypes

    kind, group_size = qtypes[name], _group_size(weight.shape[1])
    scale, shift = MaxOptimizer()(weight, kind, axis=0, group_size=group_size)
    scale = scale.clamp_min(torch.finfo(weight.dtype).tiny)
    codes: Tensor = torch.ops.quanto.quantize_affine(weight, kind.bits, 0, group_size, scale, shift)

    def unpack(parts: list[Tensor]) -> Tensor:
        return (parts[1] * _split(parts[0], kind.bits, codes_shape) - parts[2]).reshape(shape)

    codes_shape, shape = codes.shape, weight.shape
    return [_join(codes, kind.bits), scale, shift], unpack


def _torchao8(name: str, weight: Tensor) -> Packed:
    """Packs as torchao's weight-only configs of 8 bits do, row by row."""
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow  # pyright: ignore[reportMissingImports]

    if name == "int8":
        tensor: Any = Int8Tensor.from_hp(weight, granularity=PerRow())
    else:  # without a least unit a row of zeros is divided by zero
        tensor = Float8Tensor.from_hp(weight, granularity=PerRow(), hp_value_lb=1e-12)
    return _scaled(tensor.qdata, tensor.scale, weight.dtype)


def _torchao4(weight: Tensor) -> Packed:
    """Packs as torchao does in 4 bits, from its primitives, since its own 4-bit tensors cannot be unpacked."""
    from torchao.quantization.quant_primitives import (  # pyright: ignore[reportMissingImports]
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    shape = weight.shape
    block: Any = (1, _group_size(shape[1]) or shape[1])  # Any: torchao says tuple[int] where it takes one of any length
    scale, zero = choose_qparams_affine(
        weight,
        MappingType.ASYMMETRIC,
        block,
        torch.uint8,
        0,
        15,
        scale_dtype=weight.dtype,
        zero_point_dtype=torch.uint8,
    )
    codes: Tensor = quantize_affine(weight, block, scale, zero, torch.uint8, 0, 15)

    def unpack(parts: list[Tensor]) -> Tensor:
        joined, scale, zero = parts
        values = _split(joined, 4, shape)
        return dequantize_affine(values, block, scale, zero, torch.uint8, 0, 15, output_dtype=scale.dtype)

    return [_join(codes, 4), scale, zero], unpack


def _nf4(weight: Tensor) -> Packed:
    """Packs as bitsandbytes does: blocks of 64, in steps that are even for normal numbers (arXiv 2305.14314)."""
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    def unpack(parts: list[Tensor]) -> Tensor:
        state.absmax = parts[1]
        return functional.dequantize_4bit(parts[0], state)

    return [codes, state.absmax], unpack


def _scaled(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Packed:
    """Returns the packed form of data [O, K] in units of scale [O, 1]."""
    return [data, scale], lambda parts: (parts[0].to(parts[1].dtype) * parts[1]).to(dtype)


def _group_size(numel: int) -> int | None:
    """Returns quanto's size of a group: the largest of 128, 96, 64 and 32 that divides a longer row, else the row."""
    return next((size for size in (128, 96, 64, 32) if numel > 128 and numel % size == 0), None)


def _join(codes: Tensor, bits: int) -> Tensor:
    """Returns [P] bytes of numbers of so many bits each."""
    each = 8 // bits
    rows = nn.functional.pad(codes.flatten(), (0, -codes.numel() % each)).view(each, -1)
    joined = torch.zeros_like(rows[0])
    for number, row in enumerate(rows):
        joined |= row << (bits * number)
    return joined


def _split(joined: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Returns the numbers, [shape] uint8, in [P] bytes."""
    rows = [(joined >> start) & (2**bits - 1) for start in range(0, 8, bits)]
    return torch.cat(rows)[: shape.numel()].view(shape)


SCHEMES: Mapping[str, Scheme] = {
    "int8-quanto": Scheme(partial(_quanto8, "qint8")),
    "fp8-quanto": Scheme(partial(_quanto8, "qfloat8")),
    "int4-quanto": Scheme(partial(_quanto_bits, "qint4")),
    "int2-quanto": Scheme(partial(_quanto_bits, "qint2")),
    "int8-torchao": Scheme(partial(_torchao8, "int8"), "torchao", "torchao"),
    "fp8-torchao": Scheme(partial(_torchao8, "float8"), "torchao", "torchao"),
    "int4-torchao": Scheme(_torchao4, "torchao", "torchao"),
    "nf4-bnb": Scheme(_nf4, "bitsandbytes", "bitsandbytes", needs_cuda=True),
}
"""Value of ``base_model_precision`` -> how weights are packed."""
