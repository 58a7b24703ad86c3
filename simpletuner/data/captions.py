"""The captions of images: from text files, file names, or one prompt for all; filtered, and their tags reordered."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath
from time import monotonic

import pyarrow as pa

from simpletuner.backends._base import Backend, open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.captioning import CaptionShuffle, filtered
from simpletuner.config.errors import UserError
from simpletuner.data.manifest import Manifest, require_images

_NUM_READERS = 16
_CHUNK = 1024

MISSING = "without caption"
NOT_UTF8 = "caption file is not UTF-8: convert it (iconv -f latin1 -t utf-8)"
_MARKS = {"comma": ",", "space": " ", "period": "."}


def captions(dataset: DatasetConfig, backend: Backend, path: str) -> list[str]:
    """Returns the captions of an image, one of which is drawn each time it is shown; none when they are missing.

    Raises:
        OSError: The caption file cannot be read.
        UnicodeDecodeError: It is not UTF-8.
    """
    prompt = dataset.instance_prompt
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return [_prompt(dataset)]
    if dataset.caption_strategy == "filename":
        found = [PurePosixPath(path).stem.replace("_", " ").strip()]
    else:
        text = backend.caption(path) or ""
        lines = [text] if dataset.disable_multiline_split else text.splitlines()
        found = [line.strip() for line in lines]
    found = [caption for line in found if (caption := filtered(line, dataset.caption_filter_list))]
    if dataset.caption_shuffle is not None and dataset.caption_shuffle.enable:
        found = [variant for caption in found for variant in shuffled(caption, dataset.caption_shuffle)]
    before = f"{prompt} " if dataset.prepend_instance_prompt else ""
    return [f"{before}{caption}{_suffix(dataset)}" for caption in found]


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


def read_captions(manifest: Manifest, deadline_seconds: float | None = None) -> Manifest:
    """Returns the manifest with a ``captions`` column (lists of strings); images without caption are left out.

    With ``missing_caption: keep`` they stay, with an empty caption.

    Args:
        manifest: Of one dataset.
        deadline_seconds: After that many seconds only the images read so far are returned, ``complete=False``.

    Raises:
        UserError: No image has a caption, or instance_prompt is needed and missing.
    """
    dataset = manifest.dataset
    if dataset.prepend_instance_prompt or dataset.only_instance_prompt:
        _prompt(dataset)
    end = None if deadline_seconds is None else monotonic() + deadline_seconds
    found: list[list[str] | str] = []
    for chunk in _read(manifest):
        found.extend(chunk)
        if end is not None and monotonic() > end:
            break
    complete = len(found) == manifest.rows.num_rows
    rows = manifest.rows.slice(0, len(found))
    problems: dict[str, list[str]] = {}
    kept: list[list[str]] = []
    for path, captions_or_reason in zip(manifest.ids, found, strict=False):
        if isinstance(captions_or_reason, str):
            problems.setdefault(captions_or_reason, []).append(path)
            kept.append([])
        else:
            kept.append(captions_or_reason)
    column = pa.array(kept, pa.list_(pa.string()))
    result = replace(manifest, rows=rows.append_column("captions", column), complete=manifest.complete and complete)
    result = result.without(problems, [bool(own) for own in kept])
    if result.complete:
        require_images(result)
    return result


def _read(manifest: Manifest) -> Iterator[list[list[str] | str]]:
    """Yields, a chunk of images at a time and in their order, captions or the reason why there are none."""
    dataset, backend = manifest.dataset, open_backend(manifest.dataset)

    def read(path: str) -> list[str] | str:
        try:
            found = captions(dataset, backend, path)
        except UnicodeDecodeError:
            return NOT_UTF8
        except OSError as error:
            return "caption file cannot be opened" + (f": {error.strerror}" if error.strerror else "")
        return found or ([""] if dataset.missing_caption == "keep" else MISSING)

    paths = iter(manifest.ids)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        while chunk := list(islice(paths, _CHUNK)):
            yield list(pool.map(read, chunk))
