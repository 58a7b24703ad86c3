"""Adapters in diffusers' own file format, through the methods of a stock pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.families._base import lora_metadata
from simpletuner.families._source import Json

LORA_FILE = "pytorch_lora_weights.safetensors"


def save_lora(pipeline: str, folder: Path, state: Mapping[str, Tensor], metadata: Json) -> Path:
    """Writes ``pytorch_lora_weights.safetensors``, atomically; returns the file.

    Args:
        pipeline: Name of the pipeline that shall load it.
        folder: Where to; made if need be.
        state: peft's state dict of the adapted UNet.
        metadata: ``LoraConfig.to_dict()``: without it alpha is lost.
    """
    with files_into(folder) as temporary:
        _pipeline(pipeline).save_lora_weights(
            temporary,
            unet_lora_layers={key: value.detach().cpu().contiguous() for key, value in state.items()},
            unet_lora_adapter_metadata=lora_metadata(metadata),
        )
    return folder / LORA_FILE


def load_lora(pipeline: str, module: nn.Module, path: Path, adapter: str) -> None:
    """Adds the adapter of a file (diffusers' or kohya's names) to a UNet, under a name.

    Raises:
        UserError: The file is no adapter for this UNet.
    """
    stock = _pipeline(pipeline)
    unet: Any = module  # Any: diffusers' mixins carry no types
    try:
        state, alphas, metadata = stock.lora_state_dict(
            str(path), unet_config=unet.config, use_safetensors=True, return_lora_metadata=True
        )
        stock.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name=adapter, metadata=metadata)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"init_lora: '{path}' is no adapter for this model: {error}") from error


def _pipeline(name: str) -> Any:  # Any: a class by its name
    import diffusers

    return getattr(diffusers, name)
