"""The manifest: which images a dataset has and how large they are, from their headers alone.

It is an arrow file in the cache folder, which is mapped: rows are read from it when they are needed, and take no memory
meanwhile. A file whose path, size and time are unchanged is not opened again, nor is its caption. Latents are keyed by
the content of a file, not by these: a digest of it is added to the manifest when it is first read whole.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from simpletuner.backends._base import Backend, FileEntry, NotFetched, Unusable, open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.cache import write_atomically
from simpletuner.data.columns import Column, booleans, cell, integers, strings
from simpletuner.data.columns import compute as pc
from simpletuner.data.geometry import outside_limits
from simpletuner.data.metadata import table_rows
from simpletuner.data.transforms import BadImage, read_size

Progress = Callable[[int, int, str], None]
"""progress(done, total, what); total is 0 while it is not known."""

Problems = Mapping[str, tuple[str, ...]]
"""Reason -> ids of the images that are left out for it."""

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("problem", pa.string()),  # "": a usable image
        ("digest", pa.string()),  # of the content; "": not read yet
        ("caption_ns", pa.int64()),  # of the caption as it was read; -1: to be read again at each start
        ("caption", pa.string()),  # as it was read; null: not read yet
    ]
)
_CHUNK_ROWS = 65536
_NUM_READERS = 16  # opening a file waits for the disk or the network, not for the processor
_WINDOW = 512  # headers on their way: bounds the memory of a scan
_UNREADABLE = "cannot be opened"


@dataclass(frozen=True)
class Manifest:
    """The images of one dataset."""

    dataset: DatasetConfig
    rows: pa.Table
    """The images to train on, ordered by path: path (their id), width, height, digest, caption, the number of the row
    in ``files``, and ``captions`` once these have been read."""
    problems: Problems
    """The images left out."""
    complete: bool = True
    """False: a deadline ended the scan, and there are more images than these."""
    files: pa.Table = field(default_factory=_SCHEMA.empty_table, repr=False)
    """All rows of the file, the bad ones too."""

    @property
    def ids(self) -> list[str]:
        """The paths of the images."""
        return strings(self.rows, "path")

    @property
    def captions(self) -> list[list[str]]:
        """The captions of each image, once they have been read."""
        return cast("list[list[str]]", self.rows["captions"].to_pylist())

    def without_rows(self) -> "Manifest":
        """Returns the manifest without images, which are then held by nobody."""
        return replace(self, rows=self.rows.schema.empty_table(), files=self.files.schema.empty_table())

    def with_files(self, changed: Mapping[str, Column], write: bool) -> "Manifest":
        """Returns the manifest with columns of ``files`` changed, in ``rows`` too, and writes it if it is complete."""
        files, rows = self.files, self.rows
        for name, column in changed.items():
            files = files.set_column(files.schema.get_field_index(name), files.schema.field(name), column)
            if name in rows.column_names:
                rows = rows.set_column(rows.schema.get_field_index(name), name, column.take(rows["number"]))
        if write and self.complete:
            files = write_manifest(self.dataset, files)
        return replace(self, files=files, rows=rows)

    def without(self, problems: Mapping[str, list[str]], keep: pa.BooleanArray) -> "Manifest":
        """Returns the manifest with the rows that are kept, and the reasons for the others added."""
        merged = {**self.problems, **{reason: tuple(ids) for reason, ids in problems.items()}}
        return replace(self, rows=self.rows.filter(keep), problems=merged)


def scan(
    dataset: DatasetConfig,
    deadline_seconds: float | None = None,
    progress: Progress | None = None,
    write: bool = True,
) -> Manifest:
    """Returns the manifest of a dataset: header-only, incremental, bad files named.

    Args:
        dataset: What to scan; only its ``cache_dir_vae`` is ever written to.
        deadline_seconds: After that many seconds what has been seen is returned, ``complete=False``.
        progress: Told the number of images seen.
        write: Keep the manifest for the next start; an incomplete one is never kept. False: nothing is downloaded
            either.

    Raises:
        UserError: There is no such place, no image in it, or limits leave all images out.
    """
    path = manifest_path(dataset)
    known = _read(path)
    complete = True
    if dataset.parquet is not None:
        files = table_rows(dataset, _SCHEMA, known)
        if write and files is not known:
            files = write_manifest(dataset, files)
    elif known is None or not dataset.skip_file_discovery:
        backend = open_backend(dataset)
        files, complete = _discover(backend, known, deadline_seconds, progress, dataset.id, write)
        if write and complete and files is not known:
            files = write_manifest(dataset, files)
    else:
        files = known
    if complete and files.num_rows == 0:
        place = f"instance_data_dir: no image in '{dataset.instance_data_dir}'"
        raise UserError(
            f"dataset '{dataset.id}': {place if dataset.type == 'local' else f'no image in its {dataset.type} data'} "
            "(.jpg .png .webp .bmp .gif .tif .avif, in any folder)"
        )
    return _select(dataset, files, complete)


def manifest_path(dataset: DatasetConfig) -> Path:
    """Returns where the manifest is: beside the latents, under a name that depends on the place it describes."""
    place = f"{dataset.type}/{dataset.instance_data_dir}/{dataset.options}"
    place += f"/{dataset.parquet.path}" if dataset.parquet is not None else ""
    return dataset.cache_dir_vae / f"manifest-{hashlib.blake2b(place.encode(), digest_size=6).hexdigest()}.arrow"


def write_manifest(dataset: DatasetConfig, files: pa.Table) -> pa.Table:
    """Writes the manifest's rows atomically; returns them as they are in the file."""

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_file(cast(Any, file), files.schema) as writer:
            writer.write_table(files, _CHUNK_ROWS)

    path = manifest_path(dataset)
    write_atomically(path, write)
    written = _read(path)
    return files if written is None else written


def _read(path: Path) -> pa.Table | None:
    """Returns the rows of the last scan; None when there is none or it is from another version or damaged."""
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as file:
            table = file.read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowInvalid):
        return None
    return table if table.schema.equals(_SCHEMA) else None


def _discover(
    backend: Backend,
    known: pa.Table | None,
    deadline_seconds: float | None,
    progress: Progress | None,
    name: str,
    fetch: bool,
) -> tuple[pa.Table, bool]:
    """Returns a row for each listed image, ordered by path, and whether that is all of them."""
    end = None if deadline_seconds is None else time.monotonic() + deadline_seconds
    known = _SCHEMA.empty_table() if known is None else known
    stamps = zip(integers(known, "size_bytes").tolist(), integers(known, "mtime_ns").tolist(), strict=True)
    rows = {path: (number, *own) for number, (path, own) in enumerate(zip(strings(known, "path"), stamps, strict=True))}
    kept: list[int] = []
    kept_captions: list[int] = []
    fresh: list[_Header] = []
    waiting: deque[Future[_Header]] = deque()
    complete = True
    pool = ThreadPoolExecutor(_NUM_READERS)
    try:
        try:
            for entry in backend.list_images(fetch):
                if end is not None and time.monotonic() > end:
                    complete = False
                    break
                row = rows.get(entry.path)
                if row is not None and row[1] == entry.size_bytes and row[2] == entry.mtime_ns:
                    kept.append(row[0])
                    kept_captions.append(entry.caption_ns)
                else:
                    waiting.append(pool.submit(_header, backend, entry))
                if len(waiting) >= _WINDOW:
                    fresh.append(waiting.popleft().result())
                if progress and (len(kept) + len(fresh)) % 1000 == 999:
                    progress(len(kept) + len(fresh), 0, f"{name}: scanning")
        except NotFetched:
            complete = False
        for future in waiting:
            remaining = None if end is None else max(0.0, end - time.monotonic())
            if remaining is not None and not _wait(future, remaining):
                complete = False
                break
            fresh.append(future.result())
    finally:
        pool.shutdown(cancel_futures=True, wait=complete)
    if progress:
        progress(len(kept) + len(fresh), len(kept) + len(fresh), f"{name}: scanning")
    if len(kept) == known.num_rows and not fresh and kept_captions == integers(known, "caption_ns").tolist():
        return known, complete
    again = _forget_captions(known.take(pa.array(kept, pa.int64())), kept_captions)
    return pa.concat_tables([again, _table(fresh)]).sort_by("path").combine_chunks(), complete


def _forget_captions(known: pa.Table, caption_ns: list[int]) -> pa.Table:
    """Returns the rows without the captions that have changed since."""
    now = pa.array(caption_ns, pa.int64())
    same = pc.and_(pc.equal(known["caption_ns"], now), pc.greater_equal(now, 0))
    kept = pc.if_else(same, known["caption"], pa.scalar(None, pa.string()))
    return known.drop_columns(["caption_ns", "caption"]).append_column("caption_ns", now).append_column("caption", kept)


def _wait(future: "Future[_Header]", seconds: float) -> bool:
    """Returns whether the future is done within the time."""
    try:
        future.result(seconds)
    except TimeoutError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Header:
    entry: FileEntry
    size: tuple[int, int] = (0, 0)
    problem: str = ""


def _header(backend: Backend, entry: FileEntry) -> _Header:
    """Returns what a file's header says; what is wrong with the file is a value, not an exception."""
    try:
        with backend.open(entry.path) as file:
            if entry.size_bytes == 0:
                return _Header(entry, problem="empty file")
            return _Header(entry, read_size(file))
    except (BadImage, Unusable) as error:
        return _Header(entry, problem=str(error))
    except OSError as error:
        return _Header(entry, problem=f"{_UNREADABLE}: {error.strerror}" if error.strerror else _UNREADABLE)


def _table(headers: list[_Header]) -> pa.Table:
    """Returns the rows of newly read headers."""
    # A name that is no UTF-8 cannot be opened under what is stored; it is shown with its bytes escaped.
    names = [h.entry.path.encode(errors="surrogateescape").decode(errors="backslashreplace") for h in headers]
    # Without its stamp, a file that could not be opened is tried again by the next scan.
    stamps = [
        (-1, -1) if h.problem.startswith(_UNREADABLE) else (h.entry.size_bytes, h.entry.mtime_ns) for h in headers
    ]
    problems = [
        h.problem or ("its name is not UTF-8: rename it" if name != h.entry.path else "")
        for h, name in zip(headers, names, strict=True)
    ]
    columns = [
        names,
        [size for size, _ in stamps],
        [mtime for _, mtime in stamps],
        [h.size[0] for h in headers],
        [h.size[1] for h in headers],
        problems,
        [""] * len(headers),
        [h.entry.caption_ns for h in headers],
        [None] * len(headers),
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


def _select(dataset: DatasetConfig, files: pa.Table, complete: bool) -> Manifest:
    """Returns the manifest of the images that are readable and within the dataset's limits."""
    width, height = integers(files, "width"), integers(files, "height")
    readable = booleans(pc.equal(files["problem"], ""))
    usable = np.flatnonzero(readable)
    limited = outside_limits(dataset, width[usable], height[usable])
    outside = limited.astype(bool)
    left_out = dict(zip(usable[outside].tolist(), limited[outside].tolist(), strict=True))
    left_out |= {number: cell(files, "problem", number) for number in np.flatnonzero(~readable).tolist()}
    problems: dict[str, list[str]] = {}
    for number, reason in sorted(left_out.items()):
        problems.setdefault(reason, []).append(cell(files, "path", number))
    numbers = pa.array(usable[~outside], pa.int32())
    columns = files.drop_columns(["problem", "size_bytes", "mtime_ns"])
    rows = columns if len(numbers) == files.num_rows else columns.take(numbers)
    rows = rows.append_column("number", numbers)
    manifest = Manifest(
        dataset, _sample(dataset, rows), {reason: tuple(ids) for reason, ids in problems.items()}, complete, files
    )
    if complete:
        require_images(manifest)
    return manifest


def _sample(dataset: DatasetConfig, rows: pa.Table) -> pa.Table:
    """Returns ``max_num_samples`` rows: those whose id has the lowest digest, so new images displace few others."""
    if dataset.max_num_samples is None or rows.num_rows <= dataset.max_num_samples:
        return rows
    digests = [hashlib.blake2b(path.encode(), digest_size=8).digest() for path in strings(rows, "path")]
    chosen = sorted(sorted(range(len(digests)), key=digests.__getitem__)[: dataset.max_num_samples])
    return rows.take(pa.array(chosen, pa.int64()))


def require_images(manifest: Manifest) -> None:
    """Raises UserError when no image is left to train on."""
    if manifest.rows.num_rows == 0:
        counts = ", ".join(f"{len(ids)} {reason} (such as '{ids[0]}')" for reason, ids in manifest.problems.items())
        raise UserError(f"dataset '{manifest.dataset.id}': every image is left out: {counts}")
