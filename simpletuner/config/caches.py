"""The entries of caches: where text features and latents are kept."""

from pathlib import Path

from simpletuner.config.backends import TextCacheConfig
from simpletuner.config.captioning import resolve_filters
from simpletuner.config.entries import Context, refuse_unknown
from simpletuner.config.errors import suggestion
from simpletuner.config.fields import Json
from simpletuner.config.findings import Findings
from simpletuner.config.values import build

_FOR_DATASETS = ("caption_filter_list", "text_cache_disable")
_TEXT_KEYS = frozenset(
    {"id", "type", "dataset_type", "disabled", "default", "cache_dir", "write_batch_size", *_FOR_DATASETS}
)


def text_cache(
    entries: list[dict[str, Json]], context: Context, findings: Findings
) -> tuple[TextCacheConfig, dict[str, Json]]:
    """Returns the text cache, and what its entry says for all datasets that do not say it themselves.

    It is the default entry, the only entry, or one that is made.
    """
    fallback = context.cache_dir / "text" / context.model_family
    if not entries:
        return TextCacheConfig(cache_dir=fallback, write_batch_size=context.data.write_batch_size), {}
    defaults = [entry for entry in entries if entry["default"]]
    listed = ", ".join(f"'{entry['id']}'" for entry in defaults or entries)
    if len(defaults) > 1:
        findings.problems.append(f"{context.label}: several default text caches: {listed}; keep one `default: true`")
    elif len(entries) > 1 and not defaults:
        findings.problems.append(f"{context.label}: several text caches and no default: {listed}; set `default: true`")
    for entry in entries:
        where = f"{context.label}: dataset '{entry['id']}'"
        refuse_unknown(entry, _TEXT_KEYS, where, findings)
    chosen = (defaults or entries)[0]
    unused = [f"'{entry['id']}'" for entry in entries if entry is not chosen]
    if unused:
        findings.notices.append(f"text caches {', '.join(unused)} are not used: '{chosen['id']}' serves all datasets")
    where = f"{context.label}: dataset '{chosen['id']}'"
    shared = {key: chosen[key] for key in _FOR_DATASETS if key in chosen}
    resolve_filters(shared, context.places, where, findings)
    directory = str(chosen.get("cache_dir") or fallback)
    values: dict[str, Json] = {
        "id": chosen["id"],
        "cache_dir": str(context.places.written(directory)),
        "write_batch_size": chosen.get("write_batch_size", context.data.write_batch_size),
    }
    return build(TextCacheConfig, values, f"{where}: ", findings), shared


def latent_folder(
    own: dict[str, Json],
    by_type: dict[str, list[dict[str, Json]]],
    context: Context,
    findings: Findings,
    where: str,
) -> Path:
    """Returns the folder of a dataset's latents: its own key, below its image_embeds entry, or the default."""
    for kind in ("text_embeds", "image_embeds"):
        ids = [str(entry["id"]) for entry in by_type[kind]]
        if kind in own and str(own[kind]) not in ids:
            findings.problems.append(
                f"{where}: {kind}: no {kind} entry has the id '{own[kind]}'{suggestion(str(own[kind]), ids)}"
            )
    if "cache_dir_vae" in own or "cache_dir" in own:
        return context.places.written(str(own.get("cache_dir_vae") or own["cache_dir"]))
    named = [
        entry
        for entry in by_type["image_embeds"]
        if ("image_embeds" in own and entry["id"] == own["image_embeds"])
        or ("image_embeds" not in own and entry["default"])
    ]
    if named and "cache_dir" in named[0]:
        return context.places.written(str(named[0]["cache_dir"])) / str(own["id"])
    return context.cache_dir / "vae" / context.model_family / str(own["id"])
