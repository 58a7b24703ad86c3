"""Files that appear whole or not at all: written into a temporary folder, flushed, renamed into their place."""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def files_into(folder: Path) -> Generator[Path]:
    """Gives a temporary folder whose files move into ``folder`` at the end, keeping their names and subfolders.

    JSON files move last: who finds a config finds its weights. After an exception nothing moves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        temporary = Path(name)
        yield temporary
        written = sorted((path for path in temporary.rglob("*") if path.is_file()), key=lambda p: p.suffix == ".json")
        for path in written:
            flush(path)
        for path in written:
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Gives a temporary folder that becomes ``folder`` at the end; after an exception there is none.

    Raises:
        OSError: There is such a folder already, and it is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        made = Path(name) / folder.name
        made.mkdir()
        yield made
        for path in made.rglob("*"):
            flush(path)
        made.replace(folder)


def flush(path: Path) -> None:
    """Forces a file, or a folder's entries, to the disk; gives a file the mode that new files have here.

    safetensors 0.8 writes files that their owner alone may read, but a result is there for other programs.
    """
    if path.is_file():
        probe = path.with_name(f".{path.name}.mode")
        probe.touch()
        path.chmod(probe.stat().st_mode)
        probe.unlink()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
