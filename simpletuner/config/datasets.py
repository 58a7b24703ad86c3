"""Reads the entries of the data backend file into datasets and the text cache."""

import json
import math
import re
from pathlib import Path

from simpletuner.config import deprecated
from simpletuner.config.backends import DERIVED, DatasetConfig, TextCacheConfig
from simpletuner.config.caches import latent_folder, text_cache
from simpletuner.config.captioning import read_shuffle, resolve_filters
from simpletuner.config.entries import DATASET_TYPES, Context, refuse_unknown, tidied
from simpletuner.config.fields import Json, rule_of
from simpletuner.config.findings import Findings
from simpletuner.config.metadata import read_table
from simpletuner.config.values import bare_key, build, number, switch_off

_SIZES = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
_INHERITED = (
    *_SIZES,
    "resolution_type",
    "aspect_bucket_rounding",
    "caption_strategy",
    "instance_prompt",
    "random_flip",
    "vae_batch_size",
    "write_batch_size",
    "vae_cache_disable",
    "text_cache_disable",
)
_ENTRY_KEYS = frozenset({"disabled", "default", "cache_dir", "text_embeds", "image_embeds", "aspect_bucket_alignment"})
_DATASET_KEYS = frozenset(DatasetConfig.model_fields) - DERIVED | _ENTRY_KEYS
_SWITCHED_OFF_BY_ZERO = (
    *_SIZES[1:],
    "minimum_aspect_ratio",
    "maximum_aspect_ratio",
    "max_num_samples",
    "end_step",
    "end_epoch",
)
_NAMES = {"webdataset": "shards", "csv": "csv_file", "huggingface": "dataset_name"}
"""Backend -> its key that names files, relative to the working directory or to the config."""
_LARGEST_AREA_MEGAPIXELS = 16.0
"""A size up to here is read as megapixels, one above as pixels: nobody trains on 16 px or on 17 megapixels."""


def sized(value: float, resolution_type: str) -> float:
    """Returns a size in the unit of the resolution type, where it was written in the other one."""
    if resolution_type == "area":
        return value if value <= _LARGEST_AREA_MEGAPIXELS else value * value / 1e6
    return value if value > _LARGEST_AREA_MEGAPIXELS else math.sqrt(value * 1e6)


def read_datasets(
    entries: Json, context: Context, findings: Findings
) -> tuple[tuple[DatasetConfig, ...], tuple[DatasetConfig, ...], TextCacheConfig]:
    """Returns the enabled datasets to train on, the held-out ones, and the text cache; every mistake is a problem."""
    by_type: dict[str, list[dict[str, Json]]] = {kind: [] for kind in DATASET_TYPES}
    ids: set[str] = set()
    if not isinstance(entries, list):
        findings.problems.append(f"{context.label}: the file must hold a list of datasets: [{{...}}, ...]")
        entries = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            findings.problems.append(f"{context.label}: entry {index + 1} is not an object")
            continue
        values = tidied(entry, index, context, findings)
        if values is None:
            continue
        for own in _in_each_resolution(values, context, findings):
            if str(own["id"]) in ids:
                findings.problems.append(f"{context.label}: the id '{own['id']}' is used twice; ids must differ")
            ids.add(str(own["id"]))
            by_type[str(own.get("dataset_type", "image"))].append(own)
    text_cache_config, shared = text_cache(by_type["text_embeds"], context, findings)
    datasets, held_out = (
        tuple(_dataset(shared | entry, by_type, context, findings) for entry in by_type[kind])
        for kind in ("image", "eval")
    )
    _check_together(datasets, held_out, by_type, context, findings)
    return datasets, held_out, text_cache_config


def _in_each_resolution(entry: dict[str, Json], context: Context, findings: Findings) -> list[dict[str, Json]]:
    """Returns the entry for each of its resolutions; their ids and caches differ, and they share its probability."""
    written = entry.get("resolution")
    if not isinstance(written, list):
        return [entry]
    sizes = [number(size) for size in written]
    if None in sizes or len(set(sizes)) != len(sizes) or not sizes:
        findings.problems.append(
            f"{context.label}: dataset '{entry['id']}': resolution: {json.dumps(written)} is no list of different sizes"
        )
        return [{key: value for key, value in entry.items() if key != "resolution"}]
    if len(sizes) == 1:
        return [entry | {"resolution": written[0]}]
    probability = number(entry.get("probability", 1.0))
    shared = {} if probability is None else {"probability": probability / len(sizes)}
    return [
        entry | shared | {"id": f"{entry['id']}-{size:g}", "resolution": size, "_of": entry["id"]} for size in sizes
    ]


def _dataset(
    entry: dict[str, Json], by_type: dict[str, list[dict[str, Json]]], context: Context, findings: Findings
) -> DatasetConfig:
    """Returns one image dataset with everything that it inherits."""
    where = f"{context.label}: dataset '{entry['id']}'"
    own = dict(entry)
    of = str(own.pop("_of", ""))
    kind = str(own.get("type", "local"))
    options: dict[str, Json] = {}
    if kind == "local":
        refuse_unknown(own, _DATASET_KEYS, where, findings)
    else:  # the keys of another backend are checked by that backend
        options = {key: own.pop(key) for key in list(own) if key not in _DATASET_KEYS}
        nested = options.pop(kind, None)
        options |= nested if isinstance(nested, dict) else {}
        refuse_unknown(
            {key: options.pop(key) for key in list(options) if deprecated.is_inert(key)}, frozenset(), where, findings
        )
    if "aspect_bucket_alignment" in own:
        own["alignment"] = own.pop("aspect_bucket_alignment")
    _read_strategy(own, kind, where, findings)
    resolve_filters(own, context.places, where, findings)
    read_shuffle(own, where, findings)
    read_table(own, context.places, where, findings)
    deprecated.replace_values(own, f"{where}: ", findings)
    rounding_is_alignment(own, "alignment", f"{where}: ", findings)
    switch_off(own, _SWITCHED_OFF_BY_ZERO)
    values = _inherited(own, context) | {key: value for key, value in own.items() if key not in _ENTRY_KEYS}
    _sizes_in_unit(values, own, where, findings)
    values["options"] = options
    folder, remote = latent_folder(own | ({"id": of} if of else {}), by_type, context, findings, where)
    size = f"{number(own['resolution']):g}" if of else ""
    values["cache_dir_vae"] = str(folder / size)
    values["latents_remote"] = remote and remote | {"folder": f"{remote['folder']}/{size}".rstrip("/")}
    values["files_dir"] = str(folder)
    if kind == "local":
        _resolve_folder(values, context, where, findings)
    elif kind in _NAMES:
        values["instance_data_dir"] = str(
            _folder_of_names(own.get("instance_data_dir"), options.get(_NAMES[kind]), context)
        )
    _cut_anew(values, where, findings)
    dataset = build(DatasetConfig, values, f"{where}: ", findings)
    _check_bounds(dataset, where, findings)
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        unused = ", ".join(key for key in ("caption_filter_list", "caption_shuffle", "caption_suffix") if key in entry)
        if unused:
            findings.notices.append(f"{where}: {unused}: has no effect: the captions are instance_prompt")
    for key in own.keys() & DatasetConfig.model_fields.keys():
        inert = rule_of(DatasetConfig, key, "inert")
        if inert and getattr(dataset, key) != DatasetConfig.model_fields[key].default:
            findings.notices.append(f"{where}: {key}: has no effect: {inert}")
    return dataset


def _read_strategy(own: dict[str, Json], kind: str, where: str, findings: Findings) -> None:
    """Reads a caption strategy that is named after a backend as what it means there: the backend's own captions."""
    strategy = str(own.get("caption_strategy", "")).strip().lower()
    if strategy not in _NAMES:
        return
    own["caption_strategy"] = "textfile"
    if strategy != kind:
        findings.problems.append(
            f"{where}: caption_strategy: '{strategy}' goes with a dataset of that type, and this one is '{kind}'; "
            "textfile takes what is beside the images"
        )


def _cut_anew(values: dict[str, Json], where: str, findings: Findings) -> None:
    """Reads ``vae_cache_clear_each_epoch`` as what it is wanted for: random crops that differ each time, in place."""
    key = "vae_cache_clear_each_epoch"
    if str(values.get(key, "")).lower() != "true":
        return
    if str(values.get("crop_style")).lower() == "random":
        values["vae_cache_disable"] = True
        told = "each image is cut anew each time it is shown; so it is encoded while training, and no latents are kept"
        findings.notices.append(f"{where}: {key}: {told}")
    else:
        del values[key]
        findings.notices.append(f"{where}: {key}: has no effect: only random crops change (crop_style)")


def _inherited(own: dict[str, Json], context: Context) -> dict[str, Json]:
    """Returns what the main config gives to a dataset; sizes of the other unit are converted."""
    values: dict[str, Json] = {key: getattr(context.data, key) for key in _INHERITED}
    resolution_type = str(own.get("resolution_type", context.data.resolution_type))
    for key in _SIZES:
        size = number(values[key])
        if size is not None:
            values[key] = sized(size, resolution_type)
    values["alignment"] = context.data.aspect_bucket_alignment
    values["max_num_samples"] = context.data.max_train_samples
    values["train_batch_size"] = context.run.train_batch_size
    return values


def rounding_is_alignment(values: dict[str, Json], alignment: str, where: str, findings: Findings) -> None:
    """Reads an aspect_bucket_rounding above 9 as what it must mean: pixels, not decimals."""
    rounding = number(values.get("aspect_bucket_rounding"))
    if rounding is None or rounding <= 9:
        return
    del values["aspect_bucket_rounding"]
    values.setdefault(alignment, int(rounding) if rounding.is_integer() else rounding)
    findings.notices.append(
        f"{where}aspect_bucket_rounding: {rounding:g} is above 9 decimals, so it is read as an alignment of buckets to "
        f"{rounding:g} px; aspect_bucket_alignment is the key for that"
    )


def _sizes_in_unit(values: dict[str, Json], own: dict[str, Json], where: str, findings: Findings) -> None:
    """Converts the sizes that a dataset writes in the other unit than its resolution_type."""
    resolution_type = str(values["resolution_type"])
    for key in _SIZES:
        size = number(own.get(key))
        if size is None or size <= 0 or sized(size, resolution_type) == size:
            continue
        values[key] = sized(size, resolution_type)
        findings.notices.append(f"{where}: {unit_notice(key, size, resolution_type)}")


def unit_notice(key: str, size: float, resolution_type: str) -> str:
    """Returns the sentence about a size that was written in the other unit."""
    read = sized(size, resolution_type)
    if resolution_type == "area":
        return f"{key}: {size:g} beside resolution_type area is read as the square of {size:g} px: {read:g} megapixels"
    return f"{key}: {size:g} beside resolution_type {resolution_type} is read as megapixels: {read:.0f} px"


def _resolve_folder(values: dict[str, Json], context: Context, where: str, findings: Findings) -> None:
    """Replaces instance_data_dir by the folder that exists."""
    written = values.get("instance_data_dir")
    if written is None:
        findings.problems.append(f"{where}: instance_data_dir: required. The folder with the images")
        return
    found = context.places.find(str(written))
    if found is None:
        findings.problems.append(
            f"{where}: instance_data_dir: there is no folder '{written}' {context.places.looked_at(str(written))}"
        )
    elif not found.is_dir():
        findings.problems.append(f"{where}: instance_data_dir: '{found}' is not a folder")
    values["instance_data_dir"] = str(found or context.places.written(str(written)))


def _folder_of_names(written: Json, named: Json, context: Context) -> Path:
    """Returns the folder where the relative names of a backend's files begin.

    Without instance_data_dir that is the first place where what stands before braces and wildcards exists.
    """
    if written is not None:
        return context.places.find(str(written)) or context.places.written(str(written))
    names = [str(name) for name in (named if isinstance(named, list) else [named]) if name]
    names = [name for name in names if "://" not in name and not name.startswith("pipe:")]
    parts = [re.split(r"[{*?\[]", name, maxsplit=1)[0] for name in names]
    starts = [part if part == name else part[: part.rfind("/") + 1] for name, part in zip(names, parts, strict=True)]
    places = context.places.candidates("")
    return next((place for place in places if any((place / start).exists() for start in starts)), places[0])


def _check_bounds(dataset: DatasetConfig, where: str, findings: Findings) -> None:
    """Refuses settings of one dataset that contradict each other."""
    for low, high in (("minimum_image_size", "maximum_image_size"), ("minimum_aspect_ratio", "maximum_aspect_ratio")):
        least, most = getattr(dataset, low), getattr(dataset, high)
        if least is not None and most is not None and least > most:
            findings.problems.append(f"{where}: {low}: {least:g} is above {high} {most:g}, so no image is left")
    step, epoch = (dataset.start_step, dataset.end_step), (dataset.start_epoch - 1, dataset.end_epoch)
    for unit, (start, end) in {"step": step, "epoch": epoch}.items():
        if end is not None and end <= start:
            findings.problems.append(f"{where}: end_{unit}: {end} is not behind start_{unit}, so no image is shown")
    if dataset.caption_strategy == "parquet" and dataset.metadata_backend != "parquet":
        findings.problems.append(f"{where}: caption_strategy: parquet needs metadata_backend: parquet")
    needs_prompt = dataset.caption_strategy == "instanceprompt" or dataset.prepend_instance_prompt
    if (needs_prompt or dataset.only_instance_prompt) and not dataset.instance_prompt:
        findings.problems.append(f"{where}: instance_prompt: required, because captions are to use it")
    if dataset.crop_aspect == "closest" and dataset.crop and not dataset.crop_aspect_buckets:
        findings.problems.append(f"{where}: crop_aspect_buckets: required by crop_aspect closest, such as [1.0, 0.75]")


def _check_together(
    datasets: tuple[DatasetConfig, ...],
    held_out: tuple[DatasetConfig, ...],
    by_type: dict[str, list[dict[str, Json]]],
    context: Context,
    findings: Findings,
) -> None:
    """Refuses datasets that cannot stand together, and says which options of the main config none of them uses."""
    if not datasets:
        findings.problems.append(f"{context.label}: there is no enabled image dataset")
    elif all(dataset.probability == 0 for dataset in datasets):
        findings.problems.append(f"{context.label}: probability: it is 0 for every dataset, so none would be seen")
    owners: dict[Path, str] = {}
    for dataset in (*datasets, *held_out):
        other = owners.setdefault(dataset.cache_dir_vae, dataset.id)
        if other != dataset.id:
            findings.problems.append(
                f"{context.label}: dataset '{dataset.id}': cache_dir_vae: '{other}' has the same; give each its own"
            )
    written = [{bare_key(key) for key in entry} for entry in by_type["image"]]
    unused = [key for key in _INHERITED if key in context.explicit and written and all(key in keys for keys in written)]
    if unused:
        findings.notices.append(f"without effect on the datasets, which set their own: {', '.join(unused)}")
