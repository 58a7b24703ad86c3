"""LyCORIS adapters (LoKr, LoHa, ...) through the package lycoris-lora: attach, read, load, merge.

LyCORIS puts a forward of its own in place of each layer's. Here that one looks first whether the layer's adapter is
on, as peft's layers do, by the same attributes: so student and teacher are switched as with any other adapter.
"""

import json
import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.atomic import files_into
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Json

_PRESET: Mapping[str, Any] = {
    "enable_conv": True,
    "target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "target_name": [],
    "module_algo_map": {},
    "name_algo_map": {},
    "use_fnmatch": False,
    "exclude_name": [],
    "lora_prefix": "lycoris",
}
"""All that a preset can say: the package keeps what the last one said, for the whole process."""
_CHILD = "lycoris"
"""The adapter as a module of the network."""


class _Switched:
    """The forward of a layer, with its adapter or without."""

    def __init__(self, layer: nn.Module, plain: Callable[..., Any], adapted: Callable[..., Any]) -> None:
        self._attributes, self._plain, self._adapted = vars(layer), plain, adapted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # Any: a layer's own
        return (self._plain if self._attributes["_disable_adapters"] else self._adapted)(*args, **kwargs)


def _package() -> Any:  # Any: an optional package without types
    """Returns the package; it says a dozen lines of each adapter that it makes, on stdout."""
    package = import_module("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    return package


def attach_lycoris(network: nn.Module, settings: Mapping[str, Json], seed: int, name: str) -> None:
    """Attaches a trainable float32 adapter to a frozen network.

    Args:
        network: A diffusers network.
        settings: Of ``read_lycoris``.
        seed: Of the initial weights; the same on every rank.
        name: By which the adapter is chosen.

    Raises:
        UserError: No layer is meant, or LyCORIS cannot do what the settings say.
    """
    package = _package()
    network.requires_grad_(False)
    options: dict[str, Any] = {key: value for key, value in settings.items() if key != "apply_preset"}
    preset: Any = settings.get("apply_preset") or {}
    package.LycorisNetwork.apply_preset({**_PRESET, **preset})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = package.create_lycoris(network, **options)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"lycoris_config: LyCORIS cannot make this adapter: {type(error).__name__}: {reason}"
            ) from error
    if not made.loras:
        raise UserError("lycoris_config: apply_preset: no layer of the model is of these target_module or target_name")
    made.apply_to()
    made.float().requires_grad_(True)
    for adapter in made.loras:
        layer = adapter.org_module[0]
        layer._disable_adapters, layer._active_adapter = False, [name]
        layer.forward = _Switched(layer, adapter.org_forward, adapter.forward)
    network.add_module(_CHILD, made)


def lycoris_state(network: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's tensors under LyCORIS's names (``lycoris_mid_block_..._to_q.lokr_w1``), detached."""
    made = network.get_submodule(_CHILD)
    return {name: tensor.detach() for name, tensor in made.state_dict().items()}


def write_lycoris(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Json]) -> None:
    """Writes the file that ``lycoris.create_lycoris_from_weights`` reads, with the settings beside the tensors."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    with files_into(path.parent) as made:
        save_file(tensors, made / path.name, {"format": "pt", "lycoris_config": json.dumps(settings)})


def load_lycoris(network: nn.Module, path: Path) -> None:
    """Puts the adapter of a file on a network, in its dtype. Raises UserError where the package is missing."""
    try:
        package = _package()
    except ModuleNotFoundError as error:
        raise UserError('this adapter needs a package to be drawn with: pip install "simpletuner[lycoris]"') from error
    package.LycorisNetwork.apply_preset(dict(_PRESET))
    made, _ = package.create_lycoris_from_weights(1.0, str(path), network)
    with safe_open(path, framework="pt") as file:
        settings = json.loads((file.metadata() or {}).get("lycoris_config", "{}"))
    for adapter in made.loras:
        adapter.bypass_mode = settings.get("bypass_mode", adapter.bypass_mode)
    made.apply_to()
    weight = next(network.parameters())
    network.add_module(_CHILD, made.to(weight.device, weight.dtype).requires_grad_(False))


def merge_lycoris(network: nn.Module) -> None:
    """Adds a loaded adapter to the weights of its network, and takes it off."""
    made: Any = network.get_submodule(_CHILD)  # Any: as above
    made.restore()
    made.merge_to(1.0)
    delattr(network, _CHILD)
