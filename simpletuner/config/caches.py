"""The entries of caches: where text features and latents are kept."""

from pathlib import Path

from simpletuner.config.backends import TextCacheConfig
from simpletuner.config.captioning import resolve_filters
from simpletuner.config.entries import Context, refuse_unknown
from simpletuner.config.errors import suggestion
from simpletuner.config.fields import Json
from simpletuner.config.findings import Findings
from simpletuner.config.values import build

_REMOTE = ("aws",)
"""Backends, beside this machine, on which a cache can be kept."""
_IMAGE_KEYS = frozenset({"id", "type", "dataset_type", "disabled", "default", "cache_dir", "write_batch_size"})
_FOR_DATASETS = ("caption_filter_list", "text_cache_disable")
_TEXT_KEYS = _IMAGE_KEYS | frozenset(_FOR_DATASETS)


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
    chosen = (defaults or entries)[0]
    for entry in entries:
        if entry.get("type", "local") == "local":
            refuse_unknown(entry, _TEXT_KEYS, f"{context.label}: dataset '{entry['id']}'", findings)
    unused = [f"'{entry['id']}'" for entry in entries if entry is not chosen]
    if unused:
        findings.notices.append(f"text caches {', '.join(unused)} are not used: '{chosen['id']}' serves all datasets")
    where = f"{context.label}: dataset '{chosen['id']}'"
    shared = {key: chosen[key] for key in _FOR_DATASETS if key in chosen}
    resolve_filters(shared, context.places, where, findings)
    remote = _remote(chosen, _TEXT_KEYS, "", where, findings)
    directory = str((None if remote else chosen.get("cache_dir")) or fallback)
    values: dict[str, Json] = {
        "id": chosen["id"],
        "cache_dir": str(context.places.written(directory)),
        "write_batch_size": chosen.get("write_batch_size", context.data.write_batch_size),
        "remote": remote,
    }
    return build(TextCacheConfig, values, f"{where}: ", findings), shared


def _remote(
    entry: dict[str, Json], known: frozenset[str], below: str, where: str, findings: Findings
) -> dict[str, Json] | None:
    """Returns where the cache of an entry is kept beside this machine: below ``cache_dir`` of its backend."""
    kind = str(entry.get("type", "local"))
    if kind == "local":
        return None
    if kind not in _REMOTE:
        findings.problems.append(
            f"{where}: type: a cache cannot be kept on '{kind}'; use one of local, {', '.join(_REMOTE)}"
        )
        return None
    folder = "/".join(filter(None, (str(entry.get("cache_dir", "")).strip("/"), below)))
    options = {key: value for key, value in entry.items() if key not in known}
    return {"id": entry["id"], "type": kind, "folder": folder, "options": options}


def latent_folder(
    own: dict[str, Json],
    by_type: dict[str, list[dict[str, Json]]],
    context: Context,
    findings: Findings,
    where: str,
) -> tuple[Path, dict[str, Json] | None]:
    """Returns the folder of a dataset's latents, and where they are kept beside it.

    The folder is the dataset's own key, a folder below that of its image_embeds entry, or the default.
    """
    for kind in ("text_embeds", "image_embeds"):
        ids = [str(entry["id"]) for entry in by_type[kind]]
        if kind in own and str(own[kind]) not in ids:
            findings.problems.append(
                f"{where}: {kind}: no {kind} entry has the id '{own[kind]}'{suggestion(str(own[kind]), ids)}"
            )
    named = [
        entry
        for entry in by_type["image_embeds"]
        if ("image_embeds" in own and entry["id"] == own["image_embeds"])
        or ("image_embeds" not in own and entry["default"])
    ]
    remote = None
    if named:
        remote = _remote(
            named[0], _IMAGE_KEYS, str(own["id"]), f"{context.label}: dataset '{named[0]['id']}'", findings
        )
    if "cache_dir_vae" in own or "cache_dir" in own:
        return context.places.written(str(own.get("cache_dir_vae") or own["cache_dir"])), remote
    if named and "cache_dir" in named[0] and not remote:
        return context.places.written(str(named[0]["cache_dir"])) / str(own["id"]), remote
    return context.cache_dir / "vae" / context.model_family / str(own["id"]), remote
