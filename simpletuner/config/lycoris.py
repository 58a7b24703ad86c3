"""The file of ``lycoris_config``, as the users of LyCORIS have it; the numbers in it are checked by LyCORIS itself."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.fields import Json
from simpletuner.config.files import read_json

ALGORITHMS = ("lora", "locon", "loha", "lokr", "glora", "diag-oft", "boft")
"""Of the package's those that leave the layers' own weights alone: the teacher needs them."""
_ADDED = frozenset({"lora", "locon", "loha", "lokr"})
"""Those whose change LyCORIS can also compute beside the layer (``bypass_mode``), to the same result."""
_KEYS = (
    *("algo", "multiplier", "linear_dim", "linear_alpha", "conv_dim", "conv_alpha", "factor", "decompose_both"),
    *("use_tucker", "use_scalar", "full_matrix", "unbalanced_factorization", "bypass_mode", "block_size", "constraint"),
    *("rescaled", "dora_wd", "wd_on_output", "dropout", "rank_dropout", "module_dropout", "apply_preset"),
)
_PRESET_KEYS = ("target_module", "target_name", "module_algo_map", "name_algo_map", "use_fnmatch", "exclude_name")


def read_lycoris(path: Path | None) -> dict[str, Json]:
    """Returns the settings of a LyCORIS adapter.

    Raises:
        UserError: One line for each mistake, or the package is missing.
    """
    if path is None:
        raise UserError("lycoris_config: required by lora_type lycoris: a JSON file with algo, linear_dim, ...")
    content = read_json(path, "lycoris_config")
    if not isinstance(content, dict):
        raise UserError(f'lycoris_config: \'{path}\' is not of the form {{"algo": "lokr", ...}}')
    problems = [f"lycoris_config: unknown key '{key}'{suggestion(key, _KEYS)}" for key in content if key not in _KEYS]
    algorithm, preset = content.get("algo", "lora"), content.get("apply_preset") or {}
    if algorithm not in ALGORITHMS:
        near = suggestion(str(algorithm), ALGORITHMS)
        problems.append(f"lycoris_config: algo: unknown value {json.dumps(algorithm)}{near} ({', '.join(ALGORITHMS)})")
    if content.get("multiplier", 1) != 1:
        problems.append("lycoris_config: multiplier: an adapter is trained with 1; scale it when you draw")
    if not isinstance(preset, dict):
        problems.append("lycoris_config: apply_preset: give an object with target_module or target_name")
        preset = {}
    problems += [
        f"lycoris_config: apply_preset: unknown key '{key}'{suggestion(key, _PRESET_KEYS)}"
        for key in preset
        if key not in (*_PRESET_KEYS, "enable_conv")
    ]
    if find_spec("lycoris") is None:
        problems.append("lora_type: 'lycoris' needs its package: pip install \"simpletuner[lycoris]\"")
    if problems:
        raise UserError(*problems)
    # Added to weights of 16 bits, small changes are rounded away: of 1e-4 on weights of 0.05 more than half.
    return {"bypass_mode": True, **content} if _can_bypass(content) else content


def _can_bypass(content: Mapping[str, Json]) -> bool:
    """Returns whether all layers' changes can be computed beside them."""
    preset = content.get("apply_preset")
    maps = [preset.get(key) for key in ("module_algo_map", "name_algo_map")] if isinstance(preset, dict) else []
    own = [each for found in maps if isinstance(found, dict) for each in found.values() if isinstance(each, dict)]
    kinds = {str(each.get("algo", content.get("algo", "lora"))) for each in (content, *own)}
    return kinds <= _ADDED and not any(each.get("dora_wd") for each in (content, *own))
