"""Images that a CSV file lists, each with its caption: urls, which are downloaded into the cache, or local paths."""

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import csv

from simpletuner.backends._base import FileEntry, NotFetched, Unusable, own_options
from simpletuner.backends._download import DownloadOptions, Downloads
from simpletuner.backends._shards import Shard, named
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.fields import setting

_NUM_DOWNLOADS = 16
_CHUNK = 256


class Options(DownloadOptions):
    """The keys of a dataset of this type, beside those that all datasets have."""

    csv_file: Path = setting(..., "may_change", "The file, in UTF-8, with a header line.")
    csv_url_column: str = setting("url", "may_change", "Column of the urls, or paths beside the file.")
    csv_caption_column: str = setting("caption", "may_change", "Column of the captions.")
    csv_cache_dir: Path | None = setting(None, "free", "Folder for the downloads. Default: in cache_dir_vae.")
    max_image_megabytes: float = setting(100.0, "free", "Larger images are not downloaded.", gt=0)


class Csv:
    """The images of all rows; rows with the same url are one image with several captions."""

    def __init__(self, dataset: DatasetConfig) -> None:
        """Reads the file. Raises UserError when it does not exist, or has no such columns."""
        options = own_options(dataset, Options)
        self._file = dataset.instance_data_dir / options.csv_file
        try:
            urls, captions = _columns(self._file, options)
        except UserError as error:
            raise UserError(*(f"dataset '{dataset.id}': {line}" for line in error.lines)) from error
        self._problems: dict[str, OSError] = {}
        of_source: dict[str, list[str]] = {}
        for number, (url, caption) in enumerate(zip(urls, captions, strict=True), start=2):
            if url:
                of_source.setdefault(self._source(url), []).append(caption)
            else:
                self._problems[f"{self._file.name}, row {number}"] = Unusable("row without url")
        self._shards = {shard.id: shard for shard in named(of_source, self._file.parent)}
        self._captions = dict(zip(self._shards, of_source.values(), strict=True))
        self._downloads = Downloads(
            options.csv_cache_dir or dataset.files_folder / "images",
            options,
            what="image",
            suffix=".image",
            largest_bytes=int(options.max_image_megabytes * 1e6),
        )

    def _source(self, url: str) -> str:
        """Returns a url of http(s), or the absolute path of anything else: it is never a command."""
        return url if url.startswith(("http://", "https://")) else str(self._file.parent / url)

    def list_images(self, fetch: bool = True) -> Iterator[FileEntry]:
        """Yields the images in the order of the file; downloads several at a time, as far as they are asked for."""
        for name in self._problems:
            yield FileEntry(name, 0, 0)
        wanted = (shard for shard in self._shards.values() if fetch or self._path(shard).exists())
        with ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
            while chunk := list(islice(wanted, _CHUNK)):
                yield from pool.map(self._entry, chunk)
        if not fetch and not all(self._path(shard).exists() for shard in self._shards.values() if not shard.is_here):
            raise NotFetched

    def _entry(self, shard: Shard) -> FileEntry:
        """Returns what is known of an image, downloaded if it has to be."""
        try:
            stat = (self._path(shard) if shard.is_here else self._downloads.fetch(shard)).stat()
        except OSError as error:
            reason = (error.strerror or str(error)).partition(" (")[0]  # without what differs from image to image
            self._problems[shard.id] = OSError(error.errno or errno.EREMOTEIO, reason)
            return FileEntry(shard.id, 0, 0)
        return FileEntry(shard.id, stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns))

    def _path(self, shard: Shard) -> Path:
        return Path(shard.source) if shard.is_here else self._downloads.path(shard)

    def open(self, path: str) -> BinaryIO:
        """Returns an image opened for reading. Raises OSError, Unusable."""
        if path in self._problems:
            raise self._problems[path]
        if path not in self._shards:
            raise FileNotFoundError(path)
        return self._path(self._shards[path]).open("rb")

    def caption(self, path: str) -> str | None:
        """Returns the captions of an image, a line each."""
        return "\n".join(self._captions.get(path, ()))


def _columns(file: Path, options: Options) -> tuple[list[str], list[str]]:
    """Returns urls and captions, row by row. Raises UserError."""
    if not file.is_file():
        raise UserError(f"csv_file: there is no file '{file}'")
    wanted = options.csv_url_column, options.csv_caption_column
    try:
        convert = csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()))
        table = csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"csv_file: '{file}' cannot be read: {error}") from error
    for key, column in zip(("csv_url_column", "csv_caption_column"), wanted, strict=True):
        if column not in table.column_names:
            raise UserError(
                f"{key}: '{file.name}' has no column '{column}'{suggestion(column, table.column_names)} "
                f"(it has {', '.join(table.column_names)})"
            )
    urls, captions = (_texts(table[column]) for column in wanted)
    return [url.strip() for url in urls], captions


def _texts(column: "pa.ChunkedArray[pa.StringScalar]") -> list[str]:
    return [text or "" for text in column.to_pylist()]


PLUGIN = Csv
