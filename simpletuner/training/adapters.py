"""LoRA adapters through peft: attach, read, restore, and draw pictures in the run's own dtype."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.config.errors import UserError
from simpletuner.denoiser import adapter_layers
from simpletuner.families._base import ModelFamily

ADAPTER = "default"
"""The name of the adapter that a run trains; it does not occur in the files."""
_OTHER = "file"


def attach_lora(module: nn.Module, settings: Mapping[str, Any], seed: int) -> None:  # Any: LoraConfig's arguments
    """Attaches a trainable float32 adapter to a frozen network.

    Args:
        module: A diffusers network.
        settings: Arguments of ``peft.LoraConfig``.
        seed: Of the initial ``lora_A``; the same on every rank.

    Raises:
        UserError: peft finds no layer of these names, or cannot adapt one.
    """
    from peft import LoraConfig

    network: Any = module  # Any: diffusers' own base class, which would import diffusers here
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network.add_adapter(LoraConfig(**settings), adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"peft_lora_target_modules: {str(error).splitlines()[0]}") from error
    # bf16 has 8 significant bits: at lr 1e-6 most updates of a bf16 adapter would be rounded away.
    for parameter in trainable_parameters(module).values():
        parameter.data = parameter.data.float()


@torch.no_grad()
def start_from(module: nn.Module, family: ModelFamily, path: Path) -> None:
    """Copies an adapter file into the attached adapter; both then change the network alike.

    Raises:
        UserError: The file's adapter has other layers, another rank or another kind than the one that is attached.
    """
    network: Any = module  # Any: diffusers' own base class, which would import diffusers here
    family.load_lora(module, path, _OTHER)
    fits = True
    for layer in adapter_layers(module):
        peft: Any = layer  # Any: peft's layers are known by their attributes
        magnitudes = peft.lora_magnitude_vector  # of DoRA alone
        fits = (
            {_OTHER, ADAPTER} <= set(peft.lora_A)
            and peft.lora_A[_OTHER].weight.shape == peft.lora_A[ADAPTER].weight.shape
            and (_OTHER in magnitudes) == (ADAPTER in magnitudes)
        )
        if not fits:
            break
        if ADAPTER in magnitudes:
            magnitudes[ADAPTER].weight.copy_(magnitudes[_OTHER].weight)
        peft.lora_A[ADAPTER].weight.copy_(peft.lora_A[_OTHER].weight)
        # The file's own alpha is folded into B, so that this run's may differ.
        peft.lora_B[ADAPTER].weight.copy_(peft.lora_B[_OTHER].weight * (peft.scaling[_OTHER] / peft.scaling[ADAPTER]))
    network.set_adapter(ADAPTER)
    network.delete_adapters(_OTHER)
    if not fits:
        raise UserError(
            f"init_lora: the adapter in '{path}' has other layers, another rank or another kind than this run's; set "
            "lora_rank, peft_lora_target_modules and use_dora to what it was made with"
        )


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that learn, by name, in the module's order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's tensors under peft's names (``...to_q.lora_A.weight``), detached and not copied."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    return {name: tensor.detach() for name, tensor in state.items()}


def adapter_metadata(module: nn.Module) -> dict[str, Any]:  # Any: LoraConfig's values, JSON
    """Returns the adapter's LoraConfig as diffusers stores it in a LoRA file, so that alpha survives a reload."""
    network: Any = module  # Any: diffusers' own base class, which would import diffusers here
    return network.peft_config[ADAPTER].to_dict()


@torch.no_grad()
def restore_trainable(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the trainable parameters of the same names; both sides must have the same names."""
    parameters = trainable_parameters(module)
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise ValueError(f"the checkpoint does not fit the network: {len(odd)} names differ, first {odd[0]}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


@contextmanager
def inference_dtype(module: nn.Module, dtype: torch.dtype) -> Generator[None]:
    """Rounds the trainable weights to the network's dtype within the context, as loading the saved file will.

    So a validation picture is the picture that a stock pipeline draws from the file, bit for bit.
    """
    kept = {name: parameter.data for name, parameter in trainable_parameters(module).items()}
    parameters = trainable_parameters(module)
    try:
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]
