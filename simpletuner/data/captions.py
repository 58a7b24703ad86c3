"""The captions of images: from text files, file names, or one prompt for all."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import PurePosixPath
from time import monotonic

import pyarrow as pa

from simpletuner.backends._base import Backend, open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.manifest import Manifest, require_images

_NUM_READERS = 16
_CHUNK = 1024

MISSING = "without caption"
NOT_UTF8 = "caption file is not UTF-8"


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
    found = [caption for caption in found if caption]
    return [f"{prompt} {caption}" for caption in found] if dataset.prepend_instance_prompt else found


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
