"""The adapter of a run, before any weight is loaded: its kind, its layers, its size."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.chosen import Chosen
from simpletuner.config.errors import Problems, UserError
from simpletuner.config.lycoris import read_lycoris
from simpletuner.config.schema import Config
from simpletuner.distillers._base import Defaults
from simpletuner.families._base import LORA_PRESETS, lora_modules, lora_num_parameters


@dataclass(frozen=True)
class LoraPlan:
    """The adapter to train."""

    settings: Mapping[str, Any]
    """Arguments of ``peft.LoraConfig``, or what the file of ``lycoris_config`` says."""
    num_modules: int | None
    """Layers that are adapted; None when the model is not on this machine yet, and of LyCORIS."""
    num_parameters: int | None
    is_lycoris: bool = False


def plan_adapter(config: Config, chosen: Chosen, defaults: Defaults, notices: list[str]) -> LoraPlan:
    """Returns the adapter: its targets are the user's, else the method's, else the family's.

    Args:
        config: As loaded.
        chosen: The plug-ins.
        defaults: What the method advises.
        notices: Gets a line for each thing that works, and that its user should know.

    Raises:
        UserError: There can be no such adapter.
    """
    lora = config.lora
    if lora.lora_type == "lycoris":
        return _lycoris(config)
    targets = lora.peft_lora_target_modules or defaults.lora_targets or chosen.family.lora_targets
    if len(targets) == 1:
        targets = LORA_PRESETS.get(targets[0], targets)
    rank = lora.lora_rank
    if "lora_rank" not in config.explicit and defaults.lora_rank is not None:
        rank = defaults.lora_rank
    if lora.use_dora and lora.lora_format != "diffusers":
        raise UserError(
            f"lora_format: '{lora.lora_format}' has no place for DoRA; set it to diffusers, or use_dora to false"
        )
    if lora.init_lora is not None and not Path(lora.init_lora).is_file():
        raise UserError(f"init_lora: '{lora.init_lora}' is no file; give the .safetensors of an adapter")
    if lora.lora_dropout > 0 and chosen.method != "sft":
        notices.append("lora_dropout: a distilled target that is itself dropped out is noisy; 0 is advised")
    settings = {
        "r": rank,
        "lora_alpha": lora.lora_alpha if lora.lora_alpha is not None else rank,
        "lora_dropout": lora.lora_dropout,
        "init_lora_weights": "gaussian" if lora.lora_init_type == "gaussian" else True,
        "target_modules": list(targets),
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }
    if chosen.facts.shapes is None:
        return LoraPlan(settings, None, None)
    modules = lora_modules(chosen.facts.shapes, targets)
    unmatched = [target for target in targets if not lora_modules(chosen.facts.shapes, [target])]
    if not modules:
        presets = f"presets are {', '.join(LORA_PRESETS)}"
        raise UserError(f"peft_lora_target_modules: no layer of the model is named {', '.join(targets)}; {presets}")
    if unmatched and lora.peft_lora_target_modules:
        notices.append(f"peft_lora_target_modules: no layer of the model is named {', '.join(unmatched)}")
    return LoraPlan(settings, len(modules), lora_num_parameters(modules, rank))


def _lycoris(config: Config) -> LoraPlan:
    """Returns the adapter of LyCORIS. Raises UserError for what does not go with one."""
    problems = Problems()
    settings = problems.attempt(lambda: read_lycoris(config.lora.lycoris_config))
    others = {
        "init_lora": config.lora.init_lora is not None,
        "lora_format": config.lora.lora_format != "diffusers",
        "base_model_precision": config.model.base_model_precision != "no_change",
        "dynamo_backend": config.run.dynamo_backend != "no",
    }
    problems.lines += [
        f"{key}: it does not go with lora_type lycoris; leave it out" for key, on in others.items() if on
    ]
    problems.raise_any()
    assert settings is not None
    return LoraPlan(settings, None, None, is_lycoris=True)
