"""The index of a shard: where in the tar file the image, the text and the json of each sample are.

Python's tarfile reads the headers, and nothing is ever extracted: images and texts are then read at their places, so
the files of a shard are as close at hand as those of a folder. The WebDataset package is not used, because it can only
read a shard from its beginning, a member at a time and as a whole, and knows no places.
"""

import io
import json
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

IMAGES = ("jpg", "png", "jpeg", "webp")
"""What is taken as an image; of several in one sample the first in this order."""
TEXTS = ("txt", "text", "caption")

MAX_TEXT_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 24
_MAX_HEADER_BYTES = 1 << 20  # tarfile would read a header as large as it says it is
_BLOCK = 512
_KINDS = dict.fromkeys(IMAGES, "image") | dict.fromkeys(TEXTS, "text") | {"json": "json"}
_RANKS = {suffix: rank for suffixes in (IMAGES, TEXTS, ("json",)) for rank, suffix in enumerate(suffixes)}

CUT_OFF = "cut off where its shard ends"
DAMAGED = "damaged tar headers in the shard: what follows them may be lost"
SEVERAL_DOTS = "a name with several dots: what follows the first one is no image suffix"
NO_TAR = "not an uncompressed tar file"
TWICE = "a name that the shard has twice: the first is used"
UNUSABLE_NAME = "a name that cannot be shown"

_NUMBERS = ("image_at", "image_size", "text_at", "text_size", "json_at", "json_size")
_FACTS = ("original_width", "original_height", "pwatermark")
_SCHEMA = pa.schema(
    [("key", pa.string()), ("suffix", pa.string()), ("problem", pa.string())]
    + [(name, pa.int64()) for name in _NUMBERS]  # a size of -1: the sample has no such file
    + [(name, pa.float64()) for name in _FACTS]  # of the json; null where it does not say
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a shard, or something in it that is wrong."""

    key: str
    """The name up to the first dot of its last part, which all files of the sample share."""
    suffix: str
    """As it is written; "" for a problem that is of no image."""
    problem: str = ""
    """Why it cannot be used."""
    image: tuple[int, int] = (0, -1)
    """Offset and size in bytes."""
    text: tuple[int, int] = (0, -1)
    json: tuple[int, int] = (0, -1)
    original_width: float | None = None
    original_height: float | None = None
    pwatermark: float | None = None

    @property
    def name(self) -> str:
        """The image's name in the shard."""
        return f"{self.key}.{self.suffix}" if self.suffix else self.key


class TarIndex:
    """The samples of one shard; kept as columns, with an object only for one that is asked for."""

    def __init__(self, table: pa.Table) -> None:
        """Takes rows that are sorted by key."""
        self._table = table
        self._keys = cast("list[str]", table["key"].to_pylist())

    def __iter__(self) -> Iterator[Sample]:
        """Yields all samples, by key."""
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from map(_from_row, batch.to_pylist())

    def find(self, key: str) -> Sample | None:
        """Returns the sample of a key."""
        number = bisect_left(self._keys, key)
        if number == len(self._keys) or self._keys[number] != key:
            return None
        return _from_row(self._table.slice(number, 1).to_pylist()[0])

    def write(self, path: Path, stamp: str) -> None:
        """Writes the index of a shard in the state that the stamp names."""
        pq.write_table(self._table.replace_schema_metadata({"stamp": stamp}), path, compression="zstd")


def _from_row(row: dict[str, Any]) -> Sample:  # Any: the columns of _SCHEMA
    image, text, about = ((row[f"{kind}_at"], row[f"{kind}_size"]) for kind in ("image", "text", "json"))
    facts = {name: row[name] for name in _FACTS}
    return Sample(row["key"], row["suffix"], row["problem"], image, text, about, **facts)


def read_index(path: Path, stamp: str) -> TarIndex | None:
    """Returns the written index; None where there is none for this state of the shard."""
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid):
        return None
    same = (table.schema.metadata or {}).get(b"stamp") == stamp.encode()
    return TarIndex(table) if same and table.schema.equals(_SCHEMA) else None


def make_index(path: Path) -> TarIndex:
    """Returns the index of a tar file; what is damaged in it becomes a problem. Raises OSError."""
    found: dict[str, _Files] = {}
    problems: dict[str, str] = {}
    with _HeaderReader(io.FileIO(path)) as file:
        size = os.fstat(file.fileno()).st_size
        for member in _members(file, size, problems):
            _take(member, size, found, problems)
        samples = [_sample(file, size, key, files) for key, files in found.items() if "image" in files]
    problems |= {
        str(files["dotted"].suffix): SEVERAL_DOTS
        for files in found.values()
        if "dotted" in files and "image" not in files
    }
    samples += [Sample(name, "", problem) for name, problem in problems.items()]
    samples.sort(key=lambda sample: sample.key)
    columns = [
        [sample.key for sample in samples],
        [sample.suffix for sample in samples],
        [sample.problem for sample in samples],
        *([getattr(s, what)[part] for s in samples] for what in ("image", "text", "json") for part in (0, 1)),
        *([getattr(sample, name) for sample in samples] for name in _FACTS),
    ]
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, _SCHEMA, strict=True)]
    return TarIndex(pa.table(arrays, schema=_SCHEMA))


class _HeaderReader(io.BufferedReader):
    """A file that refuses what no header needs: tarfile would fill the memory with a header that says it is huge."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _members(file: _HeaderReader, size: int, problems: dict[str, str]) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar file, those behind a damaged header too."""
    end, any_member = 0, False  # end: where the next header should be
    try:
        # ignore_zeros: goes on behind damaged headers, and behind the end mark of shards that were joined by `cat`.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members.clear()  # tarfile keeps all it has seen; the list is not in its types
                if member.size < 0 or tar.offset <= end:
                    raise tarfile.ReadError("a member that ends before it begins")
                if _is_damaged(file, end, member.offset):
                    problems[f"(at byte {end})"] = DAMAGED
                end, any_member = tar.offset, True
                yield member
    except (tarfile.TarError, ValueError, RecursionError):  # RecursionError: extended headers of extended headers
        if end <= size:  # beyond it the last member is cut off, which is told of that member
            problems[f"(at byte {end})"] = DAMAGED if any_member else NO_TAR
    else:
        if _is_damaged(file, end, size):
            problems[f"(at byte {end})"] = DAMAGED if any_member else NO_TAR


def _is_damaged(file: _HeaderReader, start: int, end: int) -> bool:
    """Returns whether there is something between two members other than the zeros of an end mark."""
    return start < end and any(os.pread(file.fileno(), min(_BLOCK, end - start), start))


@dataclass(frozen=True, slots=True)
class _File:
    suffix: str
    offset: int
    size: int


_Files = dict[str, _File]
"""The files of one sample: ``image``, ``text``, ``json``; ``dotted``: the name of an image that is none of ours."""


def _take(member: tarfile.TarInfo, size: int, found: dict[str, _Files], problems: dict[str, str]) -> None:
    """Adds a member to its sample, if it is one of the listed kinds; all others are passed over unread."""
    name = PurePosixPath(member.name.lstrip("/"))
    stem, _, suffix = name.name.partition(".")
    last = suffix.lower().rpartition(".")[2]
    is_meta = name.name == "" or (name.parts[0].startswith("__") and name.parts[0].endswith("__"))
    if not member.isreg() or member.issparse() or is_meta or not stem or last not in _KINDS:
        return
    if not str(name).isprintable():
        problems[ascii(str(name))[1:-1]] = UNUSABLE_NAME
        return
    files = found.setdefault(str(name.with_name(stem)), {})
    if "." in suffix:
        if last in IMAGES:
            files["dotted"] = _File(str(name), 0, 0)
        return
    kind, file = _KINDS[last], _File(suffix, member.offset_data, member.size)
    held = files.get(kind)
    if held is not None and held.suffix == suffix:
        problems[f"{name} (again)"] = TWICE
    elif (held is None or _RANKS[last] < _RANKS[held.suffix.lower()]) and (
        kind == "image" or file.offset + file.size <= size
    ):
        files[kind] = file


def _sample(file: _HeaderReader, size: int, key: str, files: _Files) -> Sample:
    """Returns the sample of an image, with what its json says about it."""
    image, text, about = files["image"], files.get("text"), files.get("json")
    facts: dict[str, float | None] = {}
    if about is not None and about.size <= MAX_JSON_BYTES:
        with suppress(ValueError, RecursionError):
            value = json.loads(os.pread(file.fileno(), about.size, about.offset))
            facts = {name: _number(value.get(name)) for name in _FACTS} if isinstance(value, dict) else {}
    return Sample(
        key,
        image.suffix,
        "" if image.offset + image.size <= size else CUT_OFF,
        (image.offset, image.size),
        (0, -1) if text is None else (text.offset, text.size),
        (0, -1) if about is None else (about.offset, about.size),
        **facts,
    )


def _number(value: Any) -> float | None:  # Any: JSON
    """Returns a number of a json; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with suppress(OverflowError):
        return float(value)
    return None
