"""Images in a folder of this machine."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from simpletuner.backends._base import FileEntry, is_image
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError

_TEXT = ".txt"


class Local:
    """A folder and all folders below it; links are followed, hidden files and folders are passed over."""

    def __init__(self, dataset: DatasetConfig) -> None:
        """Raises UserError when the folder does not exist."""
        self._root = dataset.instance_data_dir
        if self._root == Path():
            raise UserError(f"dataset '{dataset.id}': instance_data_dir is missing: the folder with the images")
        if not self._root.is_dir():
            raise UserError(f"dataset '{dataset.id}': instance_data_dir: there is no folder '{self._root}'")

    def list_images(self, fetch: bool = True) -> Iterator[FileEntry]:
        """Yields every image once, in an order that depends on the names only; all are here already."""
        seen: set[tuple[int, int]] = set()
        # Linked folders come last, so that a folder reached both ways keeps its real path, and loops end.
        folders = deque([""])
        while folders:
            folder = folders.popleft()
            try:
                stat = os.stat(self._root / folder)
                if (stat.st_dev, stat.st_ino) in seen:
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                entries = sorted(os.scandir(self._root / folder), key=lambda entry: entry.name)
            except OSError:
                yield FileEntry(folder or ".", 0, 0)
                continue
            below: list[str] = []
            texts = {entry.name.removesuffix(_TEXT): entry for entry in entries if entry.name.endswith(_TEXT)}
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                is_link = entry.is_symlink()
                if os.path.isdir(entry) if is_link else entry.is_dir():  # is_dir() raises for a link to itself
                    (folders if is_link else below).append(path)
                elif is_image(path):
                    yield from self._file(path, entry, texts.get(entry.name.rpartition(".")[0]))
            folders.extendleft(reversed(below))

    def _file(self, path: str, entry: os.DirEntry[str], text: os.DirEntry[str] | None) -> Iterator[FileEntry]:
        """Yields the entry of a regular file or of a broken link; a pipe or a device would block when opened."""
        try:
            stat = entry.stat()
        except OSError:
            yield FileEntry(path, 0, 0)
            return
        if entry.is_file():
            yield FileEntry(path, stat.st_size, _changed(stat), _caption_ns(text))

    def open(self, path: str) -> BinaryIO:
        """Returns the file opened for reading."""
        return (self._root / path).open("rb")

    def caption(self, path: str) -> str | None:
        """Returns the text file of the same name in UTF-8 (a byte order mark is dropped), None when there is none."""
        try:
            return (self._root / path).with_suffix(_TEXT).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            return None


def _changed(stat: os.stat_result) -> int:
    """Returns when a file changed: ctime moves also when a tool sets mtime back (cp -p, rsync -t)."""
    return max(stat.st_mtime_ns, stat.st_ctime_ns)


def _caption_ns(text: os.DirEntry[str] | None) -> int:
    """Returns when a caption file changed, 0 where there is none."""
    try:
        return _changed(text.stat()) if text is not None else 0
    except OSError:
        return -1


PLUGIN = Local
