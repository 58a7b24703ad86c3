"""Names of the tensors of adapters and UNets in the files of other programs.

kohya's adapters have ``lora_unet_<module>.lora_down.weight``, ``lora_up`` and ``alpha``; those of SDXL with the modules
of the original release. A checkpoint of the original release has its UNet under ``model.diffusion_model.``.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHECKPOINT_PREFIX = "model.diffusion_model."
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_IN_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)(?:\.(?P<rest>.*))?"
)


class NoLayout(ValueError):
    """There is no such name in the other layout; the message says of what."""


@dataclass(frozen=True)
class Blocks:
    """What of a UNet decides the numbers of its blocks in the original release."""

    layers_per_block: int
    up_with_attention: frozenset[int]
    """The up blocks that have attention: their upsamplers stand behind it."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "Blocks":
        """Returns those of a diffusers UNet, by the names of all its parameters. Raises NoLayout."""
        names = list(names)
        first = {found[1] for name in names if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))}
        up = {int(found[1]) for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
        if not first:
            raise NoLayout("a UNet of other blocks")
        return cls(len(first), frozenset(up))


def original_module(name: str, blocks: Blocks) -> str:
    """Returns what a module of a diffusers UNet, such as ``down_blocks.1.resnets.0.conv1``, is called originally.

    Raises:
        NoLayout: The original release has no such module.
    """
    if name in _TOP:
        return _TOP[name]
    found = _IN_BLOCK.fullmatch(name)
    if found is None:
        raise NoLayout(name)
    kind, layer, rest = found["kind"], int(found["layer"]), found["rest"]
    if found["side"] is None:
        place = f"middle_block.{2 * layer if kind == 'resnets' else 1}"
    elif found["side"] == "down":
        first = (blocks.layers_per_block + 1) * int(found["block"]) + 1
        places = {"resnets": f"{first + layer}.0", "attentions": f"{first + layer}.1"}
        place = f"input_blocks.{places.get(kind, f'{first + blocks.layers_per_block}.0')}"
    else:
        block = int(found["block"])
        first = (blocks.layers_per_block + 1) * block
        behind = 2 if block in blocks.up_with_attention else 1
        places = {"resnets": f"{first + layer}.0", "attentions": f"{first + layer}.1"}
        place = f"output_blocks.{places.get(kind, f'{first + blocks.layers_per_block}.{behind}')}"
    if kind == "resnets":
        if rest not in _IN_RESNET:
            raise NoLayout(name)
        rest = _IN_RESNET[rest]
    elif kind == "downsamplers":
        rest = "op"
    return place if rest is None else f"{place}.{rest}"


def checkpoint_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a diffusers UNet under the names of a checkpoint. Raises NoLayout."""
    blocks = Blocks.of(state)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        renamed[f"{CHECKPOINT_PREFIX}{original_module(module, blocks)}.{kind}"] = value
    return renamed


def kohya_lora(state: Mapping[str, Tensor], alphas: Mapping[str, float], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns an adapter's tensors under kohya's names.

    Args:
        state: Under peft's names: ``<module>.lora_A.weight``.
        alphas: Module -> what scales it, times its rank.
        names: Module -> its name there.

    Raises:
        NoLayout: Of a tensor that kohya's adapters do not have, such as the magnitudes of DoRA.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
        if found is None:
            raise NoLayout(name)
        module = f"lora_unet_{names.get(found[1], found[1]).replace('.', '_')}"
        renamed[f"{module}.lora_{'down' if found[2] == 'A' else 'up'}.weight"] = value.contiguous()
        renamed[f"{module}.alpha"] = torch.tensor(alphas[found[1]], dtype=torch.float32)  # of any size
    return renamed


def effective_alphas(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:  # Any: JSON
    """Returns module -> alpha such that alpha / rank is the scale that a LoraConfig gives it."""
    found: dict[str, float] = {}
    for name, value in state.items():
        module, kind, _ = name.rpartition(".lora_A.weight")
        if not kind:
            continue
        rank = value.shape[0]
        alpha = float(_of(module, config.get("alpha_pattern") or {}, config.get("lora_alpha", rank)))
        found[module] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return found


def _of(module: str, pattern: Mapping[str, Any], otherwise: Any) -> Any:  # Any: JSON
    """Returns the value of the pattern that a module's name ends with, as peft reads it."""
    matching = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, otherwise)
