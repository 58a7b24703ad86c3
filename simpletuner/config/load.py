"""Reads a config file, its overrides and its data backend file into a frozen Config.

Every mistake found on the way is told at once, one line each.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from simpletuner.config import deprecated
from simpletuner.config.backends import SQUARE_EDGES_PX, DatasetConfig, TextCacheConfig
from simpletuner.config.datasets import read_datasets, rounding_is_alignment, sized, unit_notice
from simpletuner.config.entries import Context
from simpletuner.config.environment import fill_from_environment
from simpletuner.config.errors import UserError, printable, suggestion
from simpletuner.config.fields import Json, Section, as_json
from simpletuner.config.files import BACKEND_NAMES, Places, config_file, default_config_path, parse
from simpletuner.config.findings import Findings
from simpletuner.config.held_out import as_measured
from simpletuner.config.schema import SECTIONS, Config, section_of
from simpletuner.config.sections import (
    DataSection,
    LoraSection,
    ModelSection,
    PublishSection,
    RunSection,
)
from simpletuner.config.validation import ValidationSection
from simpletuner.config.values import bare_key, build, fill, number, switch_off, tidy

__all__ = ["default_config_path", "load"]

_SIZES = ("minimum_image_size", "maximum_image_size", "target_downsample_size", "resolution")
_MODEL_PATHS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_unet_model_name_or_path",
    "single_file_config",
)


def load(
    path: Path | None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    working_dir: Path | None = None,
) -> Config:
    """Returns the frozen config of a file and what is written over it.

    Precedence: overrides, then the file, then the environment (MIXED_PRECISION, TRAINING_DYNAMO_BACKEND), then
    accelerate's default file, then the defaults.

    Args:
        path: A config file, or a folder with config.json or config.toml; None for overrides alone.
        overrides: Key -> text, as the command line has them; keys may have leading dashes.
        environ: The environment; ``os.environ`` by default.
        working_dir: What relative paths are relative to; the current directory by default.

    Raises:
        UserError: Something is wrong; each line is one mistake.
    """
    environ = os.environ if environ is None else environ
    working_dir = (working_dir or Path.cwd()).absolute()
    findings = Findings()
    file = config_file(path, Places(working_dir)) if path is not None else None
    places = Places(working_dir, file.parent if file else None)
    flat = _read_flat(file, overrides or {}, environ, findings)
    explicit = frozenset(flat)
    _understand(flat, findings)
    sections: dict[str, Section] = {
        name: build(section, {key: flat[key] for key in section.model_fields if key in flat}, "", findings)
        for name, section in SECTIONS.items()
    }
    _resolve_paths(sections, explicit, places, findings)
    if not {key for key in ("max_train_steps", "num_train_epochs") if flat.get(key) is not None}:
        findings.problems.append("max_train_steps: required, or num_train_epochs: how long the run is")
    backend_file, datasets, held_out, text_cache = _read_backend(sections, explicit, places, environ, findings)
    findings.raise_problems()
    return Config.model_validate(
        {
            **sections,
            "datasets": datasets,
            "held_out": held_out,
            "text_cache": text_cache,
            "explicit": explicit,
            "notices": tuple(dict.fromkeys(map(printable, findings.notices))),
            "sources": (file, backend_file),
            "environment": _named_variables((file, backend_file), environ),
        }
    )


def _read_flat(
    file: Path | None, overrides: Mapping[str, str], environ: Mapping[str, str], findings: Findings
) -> dict[str, Json]:
    """Returns what was written, by the schema's own keys: the overrides over the file over the environment."""
    content = parse(file) if file else {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: a config is one object: {{...}}")
    names = {f"env:{name}": value for name, value in environ.items()}
    flat = {key: fill(value, names.get, key, findings) for key, value in tidy(content).items()}
    deprecated.rename(flat, findings)
    given: dict[str, Json] = {bare_key(key): value for key, value in overrides.items()}
    deprecated.rename(given, findings)
    labels = dict.fromkeys(flat, str(file.name if file else "")) | dict.fromkeys(given, "the command line")
    for key, value in given.items():
        _override(flat, key, value, findings)
    fill_from_environment(flat, labels, environ, findings)
    for key in [key for key in flat if key not in section_of()]:
        value = flat.pop(key)
        if not deprecated.judge(key, value, deprecated.CONFIG_KEYS, "", findings):
            known = [*section_of(), *deprecated.ALIASES]
            findings.problems.append(f"{key}: unknown key{suggestion(key, known)} (see documentation/OPTIONS.md)")
    return flat


def _named_variables(files: Iterable[Path | None], environ: Mapping[str, str]) -> dict[str, str]:
    """Returns value -> ``{env:NAME}`` of each environment variable that the files name."""
    texts = [file.read_text(encoding="utf8", errors="replace") for file in files if file is not None]
    names = {name for text in texts for name in re.findall(r"\{env:(\w+)\}", text)}
    return {environ[name].strip(): f"{{env:{name}}}" for name in sorted(names) if environ.get(name, "").strip()}


def _override(flat: dict[str, Json], key: str, value: Json, findings: Findings) -> None:
    """Writes one override over the file's value; ``distillation_config.w_max`` reaches into an object."""
    first, *inner = key.split(".")
    if not inner:
        if key in flat and str(flat[key]).lower() != str(value).lower():
            findings.notices.append(f"{key}: {value or 'its default'}, from the command line, replaces {flat[key]}")
        flat[key] = value
        if value == "":
            del flat[key]
        return
    written = flat.get(first)
    target: dict[str, Json] = dict(written) if isinstance(written, dict) else {}
    flat[first] = target
    for name in inner[:-1]:
        deeper = target.get(name)
        below: dict[str, Json] = dict(deeper) if isinstance(deeper, dict) else {}
        target[name] = below
        target = below
    target[inner[-1]] = as_json(value)
    findings.notices.append(f"{key}: {value}, from the command line")


def _understand(flat: dict[str, Json], findings: Findings) -> None:
    """Reads the values that are odd but can mean only one thing, in place, and says so."""
    deprecated.replace_values(flat, "", findings)
    rounding_is_alignment(flat, "aspect_bucket_alignment", "", findings)
    switch_off(flat, (*_SIZES[:3], "snr_gamma", "max_train_samples", "max_train_steps", "num_train_epochs"))
    default = str(DataSection.model_fields["resolution_type"].default)
    resolution_type = str(flat.get("resolution_type", default))
    for key in _SIZES:
        size = number(flat.get(key))
        if size is not None and size > 0 and sized(size, resolution_type) != size:
            flat[key] = sized(size, resolution_type)
            findings.notices.append(unit_notice(key, size, resolution_type))
    _unnest_distillation(flat, findings)


def _unnest_distillation(flat: dict[str, Json], findings: Findings) -> None:
    """Lifts the options of the chosen method out of the object under its name."""
    method = flat.get("distillation_method")
    config = as_json(flat.get("distillation_config", {}))
    if not isinstance(config, dict) or not config:
        return
    if method is None:
        findings.notices.append("distillation_config: without effect: distillation_method is not set")
    config = tidy(config)
    nested = config.pop(str(method), {})
    others = [key for key, value in config.items() if isinstance(value, dict)] if nested else []
    for key in others:
        del config[key]
        findings.notices.append(f"distillation_config.{key}: without effect: distillation_method is {method}")
    flat["distillation_config"] = (tidy(nested) if isinstance(nested, dict) else {}) | config


def _resolve_paths(sections: dict[str, Section], explicit: frozenset[str], places: Places, findings: Findings) -> None:
    """Makes the paths of the sections absolute, in place, and finds what must exist."""
    model, run, lora, validation, data = (sections[name] for name in ("model", "run", "lora", "validation", "data"))
    found = {key: _model_path(key, getattr(model, key), places, findings) for key in _MODEL_PATHS}
    sections["model"] = model.model_copy(update=found)
    assert isinstance(run, RunSection)
    assert isinstance(data, DataSection)
    assert isinstance(validation, ValidationSection)
    assert isinstance(lora, LoraSection)
    cache_dir = places.written(run.cache_dir) if run.cache_dir else None
    sections["run"] = run.model_copy(update={"output_dir": places.written(run.output_dir), "cache_dir": cache_dir})
    init_lora = _model_path("init_lora", lora.init_lora, places, findings)
    lycoris = _file("lycoris_config", lora.lycoris_config, places, findings)
    sections["lora"] = lora.model_copy(update={"init_lora": init_lora, "lycoris_config": lycoris})
    update: dict[str, object] = {}
    update["user_prompt_library"] = _file("user_prompt_library", validation.user_prompt_library, places, findings)
    publish = sections["publish"]
    assert isinstance(publish, PublishSection)
    webhooks = _file("webhook_config", publish.webhook_config, places, findings)
    tracker = _file("custom_tracker", _tracker_file(publish, findings), places, findings)
    sections["publish"] = publish.model_copy(update={"webhook_config": webhooks, "custom_tracker": tracker})
    if "validation_resolution" not in explicit:
        edge = square_px(data.resolution, data.resolution_type, data.aspect_bucket_alignment)
        update["validation_resolution"] = f"{edge}x{edge}"
    sections["validation"] = validation.model_copy(update=update)


def _tracker_file(publish: PublishSection, findings: Findings) -> Path | None:
    """Returns the file of a tracker of the user's own, where it is written or named."""
    path = publish.custom_tracker
    if path is None and "custom-tracker" in publish.report_to:
        findings.problems.append("custom_tracker: required by report_to custom-tracker: its Python file")
    return Path("custom-trackers") / f"{path}.py" if path is not None and not path.suffix else path


def _file(key: str, path: Path | None, places: Places, findings: Findings) -> Path | None:
    """Returns where a file is that is only read."""
    found = places.find(path) if path else None
    if path and found is None:
        findings.problems.append(f"{key}: there is no file '{path}' {places.looked_at(path)}")
    return found


def _model_path(key: str, name: str | None, places: Places, findings: Findings) -> str | None:
    """Returns a hub id as it is, and the absolute path of a folder or file."""
    if name is None or "://" in name:
        return name
    found = places.find(name)
    if name.endswith((".ckpt", ".pt", ".pth", ".bin")):
        findings.problems.append(f"{key}: '{name}' is a pickle, which can run code; convert it to .safetensors")
    elif found is not None:
        return str(found)
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".safetensors"):
        findings.problems.append(f"{key}: there is no '{name}' {places.looked_at(name)}")
    return name


def square_px(resolution: float, resolution_type: str, alignment: int) -> int:
    """Returns the edge in pixels of a square picture of the resolution, a multiple of the alignment."""
    if resolution_type == "area":
        for area, edge in SQUARE_EDGES_PX.items():
            if abs(resolution - area) <= 0.05:
                return edge
        resolution = math.sqrt(resolution * 1e6)
    return max(alignment, round(resolution / alignment) * alignment)


def _read_backend(
    sections: dict[str, Section],
    explicit: frozenset[str],
    places: Places,
    environ: Mapping[str, str],
    findings: Findings,
) -> tuple[Path | None, tuple[DatasetConfig, ...], tuple[DatasetConfig, ...], TextCacheConfig | None]:
    """Returns the data backend file, its datasets to train on, its held-out ones, and the text cache."""
    model, run, data, validation = (sections[name] for name in ("model", "run", "data", "validation"))
    assert isinstance(model, ModelSection)
    assert isinstance(run, RunSection)
    assert isinstance(data, DataSection)
    assert isinstance(validation, ValidationSection)
    file = _backend_file(data.data_backend_config, run.output_dir, places, findings)
    if file is None:
        return None, (), (), None
    try:
        entries = parse(file)
    except UserError as error:
        findings.problems.extend(error.lines)
        return file, (), (), None
    if isinstance(entries, dict) and set(entries) == {"datasets"}:  # TOML has no list at the top
        entries = entries["datasets"]
    context = Context(data, run, model.model_family, places, environ, explicit, file.name)
    datasets, new_ones, text_cache = read_datasets(entries, context, findings)
    return file, datasets, as_measured(new_ones, datasets, validation, findings), text_cache


def _backend_file(written: Path | None, output_dir: Path, places: Places, findings: Findings) -> Path | None:
    """Returns the file that is named, or the first one in the places where it is looked for."""
    if written is not None:
        found = places.find(written)
        if found is None or not found.is_file():
            findings.problems.append(f"data_backend_config: there is no file '{written}' {places.looked_at(written)}")
            return None
        return found
    folders = [output_dir, places.working_dir / "config"]
    if places.config_dir:
        folders.insert(0, places.config_dir)
    files = [folder / name for folder in folders for name in BACKEND_NAMES]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        looked_at = ", ".join(str(file) for file in files if file.suffix == ".json")
        findings.problems.append(f"data_backend_config: there is no data backend file (looked at: {looked_at})")
    return found
