"""The manifest: which images a dataset has and how large they are, from their headers alone.

It is a parquet file in the cache folder. A file whose path, size and time are unchanged is not opened again. Latents
are keyed by the content of a file, not by these: a digest of it is added to the manifest when it is first read whole.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from simpletuner.backends._base import Backend, FileEntry, NotFetched, Unusable, open_backend
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.cache import write_atomically
from simpletuner.data.geometry import outside_limits
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
    ]
)
_NUM_READERS = 16  # opening a file waits for the disk or the network, not for the processor
_WINDOW = 512  # headers on their way: bounds the memory of a scan
_UNREADABLE = "cannot be opened"


@dataclass(frozen=True)
class Manifest:
    """The images of one dataset."""

    dataset: DatasetConfig
    rows: pa.Table
    """The images to train on, ordered by path: path (their id), size_bytes, mtime_ns, width, height, digest, and
    ``captions`` once these have been read."""
    problems: Problems
    """The images left out."""
    complete: bool = True
    """False: a deadline ended the scan, and there are more images than these."""
    files: pa.Table = field(default_factory=_SCHEMA.empty_table, repr=False)
    """All rows of the parquet file, the bad ones too."""

    @property
    def ids(self) -> list[str]:
        """The paths of the images."""
        return strings(self.rows, "path")

    @property
    def captions(self) -> list[list[str]]:
        """The captions of each image, once they have been read."""
        return cast("list[list[str]]", self.rows["captions"].to_pylist())

    def without(self, problems: Mapping[str, list[str]], keep: list[bool]) -> "Manifest":
        """Returns the manifest with the rows that are kept, and the reasons for the others added."""
        merged = {**self.problems, **{reason: tuple(ids) for reason, ids in problems.items()}}
        return replace(self, rows=self.rows.filter(pa.array(keep, pa.bool_())), problems=merged)


def strings(table: pa.Table, name: str) -> list[str]:
    """Returns a text column."""
    return cast("list[str]", table[name].to_pylist())


def integers(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """Returns a number column."""
    return np.asarray(table[name].to_numpy(), dtype=np.int64)


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
    if known is None or not dataset.skip_file_discovery:
        backend = open_backend(dataset)
        files, complete = _discover(backend, known, deadline_seconds, progress, dataset.id, write)
        if write and complete and not (known is not None and files.equals(known)):
            write_manifest(dataset, files)
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
    return dataset.cache_dir_vae / f"manifest-{hashlib.blake2b(place.encode(), digest_size=6).hexdigest()}.parquet"


def write_manifest(dataset: DatasetConfig, files: pa.Table) -> None:
    """Writes the manifest's rows atomically."""
    write_atomically(manifest_path(dataset), lambda file: pq.write_table(files, file, compression="zstd"))


def _read(path: Path) -> pa.Table | None:
    """Returns the rows of the last scan; None when there is none or it is from another version or damaged."""
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
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
    rows = {path: number for number, path in enumerate(strings(known, "path"))}
    stamps = np.stack([integers(known, "size_bytes"), integers(known, "mtime_ns")])
    kept: list[int] = []
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
                if row is not None and (entry.size_bytes, entry.mtime_ns) == (stamps[0, row], stamps[1, row]):
                    kept.append(row)
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
    table = pa.concat_tables([known.take(pa.array(kept, pa.int64())), _table(fresh)]).sort_by("path")
    if progress:
        progress(table.num_rows, table.num_rows, f"{name}: scanning")
    return table.combine_chunks(), complete


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
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


def _select(dataset: DatasetConfig, files: pa.Table, complete: bool) -> Manifest:
    """Returns the manifest of the images that are readable and within the dataset's limits."""
    width, height = integers(files, "width"), integers(files, "height")
    reasons = np.asarray(strings(files, "problem"), dtype=object)
    usable = np.flatnonzero(reasons == "")
    reasons[usable] = outside_limits(dataset, width[usable], height[usable])
    problems: dict[str, list[str]] = {}
    for path, reason in zip(strings(files, "path"), reasons, strict=True):
        if reason:
            problems.setdefault(reason, []).append(path)
    rows = files.filter(pa.array(reasons == "", pa.bool_())).drop_columns(["problem"])
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
