"""Cached features on disk: safetensors shards of fixed membership, written whole or not at all.

A shard's name is the digest of the keys it was planned for, and its safetensors header lists the keys it holds and
those whose image turned out bad. So the folder needs no index file that could disagree with it; two processes that
write the same shard write the same bytes; and what was killed half-way is a temporary file that nothing reads.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from simpletuner.backends._base import RemoteFiles, open_files
from simpletuner.config.backends import RemoteFolder
from simpletuner.config.errors import UserError

_LOG = logging.getLogger(__name__)
_METADATA = "simpletuner"  # the one metadata entry: safetensors writes several in a random order
_SHARDS = "*.safetensors"
_NUM_TRANSFERS = 8
_STALE_SECONDS = 60.0
_TEMPORARY = ".tmp-"
_USERS_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
)


def digest(*parts: str | bytes) -> str:
    """Returns 32 hexadecimal digits that identify the parts."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that it is there whole or not at all, whenever the process or the machine stops.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tells a live writer's file from a dead one's; ends with the process
            write(file)
            file.flush()
            os.fsync(file.fileno())
            temporary.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in _USERS_ERRORS:
            raise UserError(f"cannot write the cache file '{path}': {error.strerror}") from error
        raise
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


def remove_stale(folder: Path) -> None:
    """Removes the temporary files of killed processes; those of live ones are locked and stay."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        try:
            with path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime < _STALE_SECONDS:
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except (FileNotFoundError, BlockingIOError):
            continue


Keys = npt.NDArray[np.bytes_]
"""Digests, 32 bytes each; b"" for what is not known."""

Places = npt.NDArray[np.int64]


def key_array(keys: Iterable[str]) -> Keys:
    """Returns the array of some keys."""
    return np.fromiter((key.encode() for key in keys), "S32")


@dataclass(frozen=True, eq=False)
class Index:
    """What a store holds."""

    shards: tuple[Path, ...] = ()
    starts: Places = field(default_factory=lambda: np.zeros(1, np.int64))
    """[shards + 1] the place of the first row of each shard."""
    keys: Keys = field(default_factory=lambda: key_array(()))
    """[rows] in order."""
    key_places: Places = field(default_factory=lambda: np.zeros(0, np.int64))
    """[rows] place of the features of each."""
    bad: Mapping[str, str] = field(default_factory=dict[str, str])
    """Key -> why there can be no features for it."""

    def places(self, keys: Keys) -> Places:
        """Returns [n] places of the features of n keys, -1 where there are none: see ``Reader``."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.key_places[at], -1)

    def missing(self, keys: Keys) -> list[str]:
        """Returns the keys, each once and in order, that were never encoded."""
        absent = keys[(self.places(keys) < 0) & (keys != b"")]
        return [key for key in dict.fromkeys(map(bytes.decode, absent.tolist())) if key not in self.bad]


class Store:
    """The features of one encoder: all shards in the folder were made under the same fingerprint."""

    def __init__(self, parent: Path, kind: str, fingerprint: str, remote: RemoteFolder | None = None) -> None:
        """Names the folder; nothing is made before the first write. Raises UserError for a wrong key of ``remote``.

        Args:
            parent: The cache folder that the user chose.
            kind: What is cached: ``latents`` or ``text``.
            fingerprint: Digest of all that the features depend on beside their keys.
            remote: Where the same shards are kept too.
        """
        self.folder = parent / f"{kind}-{fingerprint[:12]}"
        self.fingerprint = fingerprint
        self._remote: RemoteFiles | None = None
        if remote is not None:
            below = "/".join(filter(None, (remote.folder.strip("/"), self.folder.name)))
            self._remote = open_files(remote.model_copy(update={"folder": below}))

    def synchronise(self) -> None:
        """Brings the shards that are kept elsewhere here, and those that are only here there.

        Raises:
            UserError: The one cannot be read, or the other not written.
        """
        if self._remote is None:
            return
        remote, there = self._remote, self._remote.sizes()
        here = {path.name: path for path in self.folder.glob(_SHARDS) if _read_header(path)}
        absent = [name for name in there if fnmatch(name, _SHARDS) and name not in here]
        unsent = [path for name, path in here.items() if there.get(name) != path.stat().st_size]
        if absent:
            _LOG.info("fetching %d cache files, %.1f MB", len(absent), sum(there[name] for name in absent) / 1e6)
        with ThreadPoolExecutor(_NUM_TRANSFERS) as pool:
            for name, content in zip(absent, pool.map(remote.read, absent), strict=True):
                write_atomically(self.folder / name, lambda file, content=content: file.write(content))
            for _ in pool.map(lambda path: remote.write(path.name, path.read_bytes()), unsent):
                pass

    def index(self) -> Index:
        """Returns what is there now; reads the header of each shard. Damaged and foreign files count as absent."""
        shards: list[Path] = []
        keys: list[Keys] = []
        bad: dict[str, str] = {}
        for path in sorted(self.folder.glob(_SHARDS)):
            held = _read_header(path)
            if held is None or held["fingerprint"] != self.fingerprint:
                continue
            keys.append(key_array(held["keys"]))
            bad |= held["bad"]
            shards.append(path)
        starts = np.cumsum([0, *map(len, keys)])
        distinct, first = np.unique(np.concatenate([key_array(()), *keys]), return_index=True)
        return Index(tuple(shards), starts, distinct, first, bad)

    def write(
        self, planned: Sequence[str], rows: Mapping[str, Tensor], keys: Sequence[str], bad: Mapping[str, str]
    ) -> None:
        """Writes one shard.

        Args:
            planned: The keys that the shard was planned for: they are its identity.
            rows: Name -> [n, ...] features; row i belongs to ``keys[i]``.
            keys: The n keys that were encoded.
            bad: Key -> why it could not be encoded.
        """
        held = {"fingerprint": self.fingerprint, "keys": list(keys), "bad": dict(bad)}
        tensors = {name: tensor.contiguous() for name, tensor in rows.items()}
        data = save(tensors, {_METADATA: json.dumps(held, sort_keys=True)})
        name = f"{digest(*planned)}.safetensors"
        write_atomically(self.folder / name, lambda file: file.write(data))
        if self._remote is not None:
            self._remote.write(name, data)


def _read_header(path: Path) -> dict[str, Any] | None:  # Any: JSON of our own
    """Returns what a shard says it holds; None for a file that is damaged or none of ours."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                return None
            header = json.loads(file.read(length))
            held = json.loads(header.pop("__metadata__")[_METADATA])
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            return held if 8 + length + end == size else None
    except (OSError, ValueError, KeyError, struct.error):
        return None


class Reader:
    """Rows of a store's shards, by their places in all shards one after the other.

    A shard is mapped when it is first needed and stays mapped (no file stays open).
    """

    def __init__(self, index: Index) -> None:
        """Opens nothing yet."""
        self._shards, self._starts = index.shards, index.starts.tolist()
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def row(self, place: int) -> dict[str, Tensor]:
        """Returns the features [...] of one entry by name; they are read from the file when they are copied."""
        shard = bisect_right(self._starts, place) - 1
        row = place - self._starts[shard]
        if shard not in self._mapped:
            with safe_open(self._shards[shard], framework="pt") as file:
                names = cast("list[str]", file.keys())
                self._mapped[shard] = {name: cast(Tensor, file.get_tensor(name)) for name in names}
        return {name: values[row] for name, values in self._mapped[shard].items()}
