"""Adapters of other programs, in the files that diffusers reads whole: ``simpletuner export FILE --to diffusers``."""

from collections.abc import Iterator
from pathlib import Path

import torch

from simpletuner import registry
from simpletuner.config.errors import UserError
from simpletuner.families._source import ModelSource
from simpletuner.starting import family_name
from simpletuner.training.adapters import ADAPTER, adapter_metadata, adapter_state


def import_adapter(file: Path, base: str | None, output: Path, dtype: torch.dtype, force: bool) -> Iterator[str]:
    """Writes an adapter's file with diffusers' names, and its ranks and alphas beside them; yields a line on it.

    Args:
        file: With kohya's names, or diffusers'.
        base: The model that it is for.
        output: The folder to write into.
        dtype: Of its tensors.
        force: Overwrite what is there.

    Raises:
        UserError: It is no adapter for that model, or something is there already.
    """
    if base is None:
        raise UserError("--base: required for a file: the folder, file or hub id of the model that the adapter is for")
    if output.exists() and not force:
        raise UserError(f"--output: '{output}' is there already; --force overwrites it")
    source = ModelSource(base)
    family = registry.load("families", family_name(base), "--base")().for_model(source)
    network = family.load(source, dtype).requires_grad_(False)
    family.load_lora(network, file, ADAPTER)
    state = {name: value.to(dtype) for name, value in adapter_state(network).items()}
    written = family.save_lora(output, state, adapter_metadata(network))
    modules = {name.partition(".lora_")[0] for name in state}
    yield f"{len(modules)} layers, {written.stat().st_size / 1e6:.1f} MB: {written}"
