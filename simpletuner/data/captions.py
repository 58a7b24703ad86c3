"""The captions of images: from text files, file names, or one prompt for all; filtered, and their tags reordered.

What was read of text files is kept in the manifest as it was read: settings change what is made of it, without reading
it again.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import pyarrow

from simpletuner.backends._base import open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.captioning import CaptionShuffle, filtered
from simpletuner.config.errors import UserError
from simpletuner.data.columns import Column, booleans, cell, integers
from simpletuner.data.columns import compute as pc
from simpletuner.data.manifest import Manifest, require_images

pa: Any = pyarrow  # its stubs refuse much of what it takes
_NUM_READERS = 16
_CHUNK = 1024
_LINE_ENDS = r"[\n\r\x0b\x0c\x1c-\x1e\x{85}\x{2028}\x{2029}]"  # those of str.splitlines

MISSING = "without caption"
NOT_UTF8 = "caption file is not UTF-8: convert it (iconv -f latin1 -t utf-8)"
_LISTS = pa.list_(pa.string())
_MARKS = {"comma": ",", "space": " ", "period": "."}


def captions(dataset: DatasetConfig, rows: pyarrow.Table) -> Column:
    """Returns a list of captions for each row, one of which is drawn each time its image is shown; [] without any.

    Args:
        dataset: Says what is made of texts.
        rows: path, and, where captions come from texts, caption.

    Raises:
        UserError: instance_prompt is needed and missing.
    """
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        prompts = pa.array([[_prompt(dataset)]], _LISTS)
        return pa.chunked_array([prompts.take(pa.array(np.zeros(rows.num_rows, np.int64)))], _LISTS)
    if dataset.prepend_instance_prompt:
        _prompt(dataset)
    if reads_texts(dataset):
        texts = rows["caption"]
    else:
        stems = pc.replace_substring_regex(rows["path"], r"^.*/|(.)\.[^./]*$", r"\1")
        texts = pc.replace_substring(stems, "_", " ")
    return pa.chunked_array([_of_texts(dataset, chunk) for chunk in texts.chunks], _LISTS)


def reads_texts(dataset: DatasetConfig) -> bool:
    """Returns whether captions come from texts that belong to the images."""
    return dataset.caption_strategy in ("textfile", "parquet") and not dataset.only_instance_prompt


def _of_texts(dataset: DatasetConfig, texts: Column) -> Column:
    """Returns a list of captions for each text; null is none."""
    count, owner = len(texts), np.arange(len(texts))
    if not dataset.disable_multiline_split and pc.any(pc.match_substring_regex(texts, _LINE_ENDS)).as_py():
        lines = pc.split_pattern_regex(texts, _LINE_ENDS)
        owner, texts = np.asarray(pc.list_parent_indices(lines)), pc.list_flatten(lines)
    flat = pc.fill_null(pc.utf8_trim_whitespace(texts), "")
    if dataset.caption_filter_list:
        flat = pa.array([filtered(line, dataset.caption_filter_list) for line in flat.to_pylist()], pa.string())
    present = booleans(pc.not_equal(flat, ""))
    flat, owner = flat.filter(present), owner[present]
    if dataset.caption_shuffle is not None and dataset.caption_shuffle.enable:
        variants = [shuffled(line, dataset.caption_shuffle) for line in flat.to_pylist()]
        owner = np.repeat(owner, list(map(len, variants)))
        flat = pa.array([variant for own in variants for variant in own], pa.string())
    before = f"{dataset.instance_prompt} " if dataset.prepend_instance_prompt else ""
    if before or dataset.caption_suffix:
        flat = pc.binary_join_element_wise(before, flat, _suffix(dataset), "")
    starts = np.searchsorted(owner, np.arange(count + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), flat)


def shuffled(caption: str, shuffle: CaptionShuffle) -> list[str]:
    """Returns a caption and its tags in other orders, which its text decides; of equal ones, one.

    Each is encoded and cached as a caption of its own, and one is drawn each time the image is shown.
    """
    mark = _MARKS[shuffle.split_on]
    tags = [tag for part in caption.split(mark) if (tag := part.strip())]
    head, tail = tags[: shuffle.position_start], tags[shuffle.position_start :]
    if len(tail) < 2:
        return [caption]
    joint = " " if mark == " " else f"{mark} "
    end = mark if caption.endswith(mark) else ""
    variants = [caption] if shuffle.include_original else []
    for number in range(shuffle.count):
        keys = [f"{shuffle.seed}/{number}/{place}/{caption}".encode() for place in range(len(tail))]
        order = sorted(range(len(tail)), key=[hashlib.blake2b(key, digest_size=8).digest() for key in keys].__getitem__)
        variants.append(joint.join([*head, *(tail[place] for place in order)]) + end)
    return list(dict.fromkeys(variants))


def _suffix(dataset: DatasetConfig) -> str:
    """Returns what is put behind each caption, with a space before it unless it begins with a mark."""
    suffix = dataset.caption_suffix or ""
    return f" {suffix}" if suffix and suffix[0] not in ",.;:" else suffix


def _prompt(dataset: DatasetConfig) -> str:
    """Returns the instance prompt. Raises UserError when there is none."""
    if not dataset.instance_prompt:
        raise UserError(f"dataset '{dataset.id}': instance_prompt is missing: its captions are to be made of it")
    return dataset.instance_prompt


def read_captions(manifest: Manifest, deadline_seconds: float | None = None, write: bool = False) -> Manifest:
    """Returns the manifest with a ``captions`` column (lists of strings); images without caption are left out.

    With ``missing_caption: keep`` they stay, with an empty caption.

    Args:
        manifest: Of one dataset.
        deadline_seconds: After that many seconds only the images read so far are returned, ``complete=False``.
        write: Keep the texts that were read in the manifest for the next start.

    Raises:
        UserError: No image has a caption, or instance_prompt is needed and missing.
    """
    dataset = manifest.dataset
    failed: dict[int, str] = {}
    if reads_texts(dataset):
        manifest, failed = _with_texts(manifest, deadline_seconds, write)
    found = captions(dataset, manifest.rows)
    reasons = np.full(len(found), "", object)
    reasons[booleans(pc.equal(pc.list_value_length(found), 0))] = MISSING
    if dataset.missing_caption == "keep" and MISSING in reasons:
        empty = pa.array([[""]], _LISTS)
        found = pc.if_else(pa.array(reasons == MISSING), empty[0], found)
        reasons[:] = ""
    reasons[list(failed)] = list(failed.values())
    result = replace(manifest, rows=manifest.rows.append_column("captions", found))
    bad = reasons != ""
    if bad.any():
        problems: dict[str, list[str]] = {}
        for row in np.flatnonzero(bad).tolist():
            problems.setdefault(reasons[row], []).append(cell(manifest.rows, "path", row))
        result = result.without(problems, pa.array(~bad))
    if result.complete:
        require_images(result)
    return result


def _with_texts(manifest: Manifest, deadline_seconds: float | None, write: bool) -> tuple[Manifest, dict[int, str]]:
    """Returns the manifest with the texts of all rows that have one, and row -> why it has none.

    When the deadline ends it, only the rows before the first that was not read are returned.
    """
    end = None if deadline_seconds is None else monotonic() + deadline_seconds
    rows, backend = manifest.rows, open_backend(manifest.dataset)
    unread = np.flatnonzero(booleans(pc.is_null(rows["caption"]))).tolist()
    read: dict[int, str] = {}
    failed: dict[int, str] = {}

    def read_text(row: int) -> str | OSError | UnicodeDecodeError:
        try:
            return backend.caption(cell(rows, "path", row)) or ""
        except (OSError, UnicodeDecodeError) as error:
            return error

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(unread), _CHUNK):
            chunk = unread[start : start + _CHUNK]
            for row, found in zip(chunk, pool.map(read_text, chunk), strict=True):
                if isinstance(found, str):
                    read[row] = found
                else:
                    failed[row] = _reason(found)
            if end is not None and monotonic() > end and chunk[-1] != unread[-1]:
                next_row = unread[start + _CHUNK]
                manifest = replace(manifest, rows=rows.slice(0, next_row), complete=False)
                break
    if not read:
        return manifest, failed
    number = integers(rows, "number")
    texts = _filled(manifest.files["caption"], {int(number[row]): value for row, value in read.items()})
    return manifest.with_files({"caption": texts}, write), failed


def _filled(column: Column, values: Mapping[int, str]) -> Column:
    """Returns a text column with other values in some rows."""
    places = sorted(values)
    mask = np.zeros(len(column), bool)
    mask[places] = True
    chosen = pa.array([values[place] for place in places], pa.string())
    return pc.replace_with_mask(column, pa.array(mask), chosen)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    """Returns why a caption cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return NOT_UTF8
    return "caption file cannot be opened" + (f": {error.strerror}" if error.strerror else "")
