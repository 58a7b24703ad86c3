"""Images in the shards (tar files) of a WebDataset, on this machine or behind http(s)."""

import io
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from simpletuner.atomic import files_into
from simpletuner.backends import _tar_index as tar
from simpletuner.backends._base import FileEntry, NotFetched, Unusable, own_options
from simpletuner.backends._download import DownloadOptions, Downloads, users_errors
from simpletuner.backends._shards import Shard, find_shards
from simpletuner.backends._tar_index import Sample, TarIndex, make_index, read_index
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Json, setting

NO_SIZES = "minimum_original_size is set, and its json has no original_width and original_height"
NO_WATERMARK = "maximum_watermark is set, and its json has no pwatermark"


class Options(DownloadOptions):
    """The keys of a dataset of this type, beside those that all datasets have."""

    caption_key: str | None = setting(None, "may_change", "Key of the json whose text is the caption.")
    minimum_original_size: int | None = setting(None, "may_change", "Least original edge in pixels.", ge=1)
    maximum_watermark: float | None = setting(None, "may_change", "Largest pwatermark of the json.", ge=0, le=1)


class WebDataset:
    """The samples of all shards: each has one image, and its caption in a text file or json of the same name."""

    def __init__(self, dataset: DatasetConfig, environ: Mapping[str, str] = os.environ) -> None:
        """Raises UserError when a key is wrong or a shard of this machine does not exist; opens none."""
        self._options = own_options(dataset, Options, ["shards"])
        try:
            patterns = _patterns(dataset.options.get("shards", "*.tar"))
            shards = find_shards(patterns, dataset.instance_data_dir.absolute(), environ)
        except UserError as error:
            raise UserError(*(f"dataset '{dataset.id}': {line}" for line in error.lines)) from error
        self._shards = {shard.id: shard for shard in shards}
        self._indices: dict[str, TarIndex] = {}
        self._locks = {shard.id: threading.Lock() for shard in shards}
        self._folder = dataset.files_folder / "shards"
        self._downloads = Downloads(self._folder, self._options)

    def list_images(self, fetch: bool = True) -> Iterator[FileEntry]:
        """Yields an entry for each image and for each thing that is wrong, shard by shard."""
        any_left = False
        for shard in self._shards.values():
            path = self._path(shard)
            try:
                if not path.exists() and not fetch:
                    any_left = True
                    continue
                if not shard.is_here:
                    path = self._downloads.fetch(shard)
                stat = path.stat()
                index = self._index(shard, write=fetch)
            except OSError:
                yield FileEntry(shard.id, 0, 0)
                continue
            changed = max(stat.st_mtime_ns, stat.st_ctime_ns)
            for sample in index:
                yield FileEntry(f"{shard.id}/{sample.name}", sample.image[1], changed, changed)
        if any_left:
            raise NotFetched

    def open(self, path: str) -> BinaryIO:
        """Returns an image opened for reading, straight from its place in the shard. Raises OSError, Unusable."""
        shard, name = self._split(path)
        index = self._index(shard)
        found = (index.find(str(PurePosixPath(name).with_suffix(""))), index.find(name))
        sample = next((sample for sample in found if sample is not None and sample.name == name), None)
        if sample is None:
            raise FileNotFoundError(path)
        if reason := sample.problem or self._unwanted(sample):
            raise Unusable(reason)
        return io.BufferedReader(_Part(self._path(shard), *sample.image))

    def caption(self, path: str) -> str | None:
        """Returns the text file of an image's sample, else what its json says; with ``caption_key`` that goes first."""
        shard, name = self._split(path)
        sample = self._index(shard).find(str(PurePosixPath(name).with_suffix("")))
        if sample is None:
            return None
        ways = (self._from_text, self._from_json)
        for way in reversed(ways) if self._options.caption_key else ways:
            caption = way(shard, sample)
            if caption is not None:
                return caption
        return None

    def _from_text(self, shard: Shard, sample: Sample) -> str | None:
        content = self._read(shard, sample.text, tar.MAX_TEXT_BYTES)
        return None if content is None else content.decode("utf-8-sig")

    def _from_json(self, shard: Shard, sample: Sample) -> str | None:
        content = self._read(shard, sample.json, tar.MAX_JSON_BYTES)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise OSError("its json is damaged") from error
        caption = value.get(self._options.caption_key or "caption") if isinstance(value, dict) else None
        if isinstance(caption, list):
            return "\n".join(line for line in caption if isinstance(line, str))
        return caption if isinstance(caption, str) else None

    def _read(self, shard: Shard, place: tuple[int, int], limit_bytes: int) -> bytes | None:
        """Returns a file of a sample, None when it has none. Raises OSError."""
        offset, size = place
        if size < 0:
            return None
        if size > limit_bytes:
            raise OSError(f"a text of {size} bytes")
        with _Part(self._path(shard), offset, size) as part:
            return part.readall()

    def _unwanted(self, sample: Sample) -> str:
        """Returns why a sample is left out by what its json says of it, "" if it is not."""
        size, most = self._options.minimum_original_size, self._options.maximum_watermark
        if size is not None:
            if sample.original_width is None or sample.original_height is None:
                return NO_SIZES
            if min(sample.original_width, sample.original_height) < size:
                return f"smaller than minimum_original_size {size}, by its json"
        if most is not None:
            if sample.pwatermark is None:
                return NO_WATERMARK
            if sample.pwatermark > most:
                return f"above maximum_watermark {most:g}, by its json"
        return ""

    def _split(self, path: str) -> tuple[Shard, str]:
        """Returns the shard of an image's id, and its name there. Raises FileNotFoundError."""
        for at in (at for at in range(len(path) - 1, 0, -1) if path[at] == "/"):
            shard = self._shards.get(path[:at])
            if shard is not None:
                return shard, path[at + 1 :]
        raise FileNotFoundError(path)

    def _path(self, shard: Shard) -> Path:
        return Path(shard.source) if shard.is_here else self._downloads.path(shard)

    def _index(self, shard: Shard, write: bool = False) -> TarIndex:
        """Returns the index of a shard; it is made once, and kept in the cache folder. Raises OSError."""
        with self._locks[shard.id]:
            if shard.id not in self._indices:
                path = self._path(shard)
                stat = path.stat()
                stamp = f"{stat.st_size}/{max(stat.st_mtime_ns, stat.st_ctime_ns)}"
                written = self._downloads.path(shard).with_suffix(".parquet")
                index = read_index(written, stamp)
                if index is None:
                    index = make_index(path)
                    if write:
                        with users_errors(self._folder), files_into(self._folder) as folder:
                            index.write(folder / written.name, stamp)
                self._indices[shard.id] = index
            return self._indices[shard.id]


class _Part(io.RawIOBase):
    """A range of a file, read as if it were a file of its own."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # any buffer
        count = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._file.fileno(), count, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _patterns(written: Json) -> list[str]:
    """Returns the shards as written: one text or a list. Raises UserError."""
    patterns = [written] if isinstance(written, str) else written
    if not isinstance(patterns, list) or not patterns or not all(isinstance(text, str) and text for text in patterns):
        raise UserError(f"shards: {json.dumps(written)} is not text or a list of texts: 'shards/{{000..099}}.tar'")
    return [text for text in patterns if isinstance(text, str)]


PLUGIN = WebDataset
