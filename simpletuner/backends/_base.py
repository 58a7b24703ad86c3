"""What a data backend is: it lists and opens the files of one dataset, and never writes."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar

from simpletuner import registry
from simpletuner.config.backends import DatasetConfig, RemoteFolder
from simpletuner.config.fields import Json, Section
from simpletuner.config.findings import Findings
from simpletuner.config.values import build_known

S = TypeVar("S", bound=Section)

UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl"})
"""Photographs for which Pillow has no decoder: they are listed, so that the user hears of them."""

IMAGE_SUFFIXES = UNREAD_SUFFIXES | {
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jpe",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as the listing shows it: enough to tell whether it changed, without opening it."""

    path: str
    """POSIX path relative to the dataset's root: the image's id."""
    size_bytes: int
    mtime_ns: int
    """The latest time that content or name changed; a backend takes whatever cannot be set back by a copy."""
    caption_ns: int = -1
    """The same of what ``caption`` reads, 0 where there is nothing; -1: not known, so that it is read at each start."""


class Unusable(OSError):
    """A file that will not do, whenever it is opened; the message is the reason, the same for all files like it."""


class NotFetched(Exception):
    """There are more images than were listed, in files that would have to be downloaded first."""


class Backend(Protocol):
    """The files of one dataset."""

    def __init__(self, dataset: DatasetConfig) -> None:
        """Raises UserError when the place does not exist or cannot be read."""
        ...

    def list_images(self, fetch: bool = True) -> Iterator[FileEntry]:
        """Yields the images lazily, in any order; what cannot be read is listed too, and fails when it is opened.

        Args:
            fetch: Whether to download what has to be, and to write into the cache folder.

        Raises:
            NotFetched: At the end, when there is more than may be fetched.
        """
        ...

    def open(self, path: str) -> BinaryIO:
        """Returns the file opened for reading. Raises OSError, Unusable."""
        ...

    def caption(self, path: str) -> str | None:
        """Returns the text that belongs to an image, None when there is none. Raises OSError, UnicodeDecodeError."""
        ...


class RemoteFiles(Protocol):
    """A folder of a backend that can be written: a file appears in it whole, or not at all."""

    def sizes(self) -> dict[str, int]:
        """Returns name -> bytes of all files below the folder. Raises UserError."""
        ...

    def read(self, name: str) -> bytes:
        """Returns the content of a file. Raises UserError."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes a file. Raises UserError."""
        ...


class Owner(Protocol):
    """An entry of the data backend file with keys of its backend."""

    @property
    def id(self) -> str:
        """The entry's."""
        ...

    @property
    def options(self) -> dict[str, Json]:
        """The keys as they were written."""
        ...


def is_image(path: str) -> bool:
    """Returns whether a file's name ends like an image's; hidden files (``._photo.jpg``) are none."""
    name = path.rpartition("/")[2]
    return f".{name.rpartition('.')[2]}".lower() in IMAGE_SUFFIXES and not name.startswith(".")


def stamp(text: str) -> int:
    """Returns a number for ``FileEntry.mtime_ns`` that changes with a text, for content that has no time."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def own_options(owner: Owner, section: type[S], besides: Iterable[str] = ()) -> S:
    """Returns the checked keys that an entry's backend alone knows.

    Args:
        owner: Has them as they were written.
        section: Declares them.
        besides: Keys that are read elsewhere.

    Raises:
        UserError: One line for each that is unknown or wrong.
    """
    findings = Findings()
    options = build_known(section, owner.options, f"dataset '{owner.id}': ", findings, besides)
    findings.raise_problems()
    return options


def open_backend(dataset: DatasetConfig) -> Backend:
    """Returns the backend of a dataset. Raises UserError when its place cannot be read."""
    return registry.load("backends", dataset.type, key=f"dataset '{dataset.id}': type")(dataset)


def open_files(remote: RemoteFolder) -> RemoteFiles:
    """Returns a folder of a backend to write in, not yet asked for anything. Raises UserError when a key is wrong."""
    return registry.load("backends", remote.type, key=f"dataset '{remote.id}': type").files(remote)
