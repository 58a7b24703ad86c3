"""Which shards a dataset has: brace expressions, lists and globs become names, each once and in order.

- ``data/{00000..00099}.tar``: a range, with the zeros that are written
- ``https://host/{train,extra}.tar``: alternatives
- ``data/*.tar``: a glob, for files of this machine only; ``?`` in a url begins its query
"""

import glob
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from simpletuner.config.errors import UserError

PIPE_SWITCH = "SIMPLETUNER_ALLOW_PIPE"
"""Environment variable that lets ``pipe:`` shards run their commands: ``1``."""

_MAX_SHARDS = 100_000  # more is a slip in a range; a petabyte of usual shards
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"(-?\d{1,12})\.\.(-?\d{1,12})")


@dataclass(frozen=True)
class Shard:
    """One file, here or elsewhere: a tar file, or an image of a list."""

    id: str
    """Begins the ids of its images, or is one: the path below the dataset's folder, or host and path of a url."""
    source: str
    """Absolute path, http(s) url, or ``pipe:`` and a command."""

    @property
    def is_here(self) -> bool:
        """Whether it is a file of this machine, to be read where it is."""
        return not _is_remote(self.source)


def find_shards(patterns: Sequence[str], folder: Path, environ: Mapping[str, str]) -> list[Shard]:
    """Returns the shards that the patterns name.

    Args:
        patterns: As written in the data backend file.
        folder: Where relative paths begin.
        environ: Says whether ``pipe:`` is allowed.

    Raises:
        UserError: A pattern names nothing, or something that is not read.
    """
    sources: dict[str, None] = {}
    missing: list[Path] = []
    for pattern in patterns:
        if pattern.startswith("pipe:") and environ.get(PIPE_SWITCH) != "1":
            raise UserError(
                f"shards: '{pattern}' would run a command that the file names: download the shards yourself, or, "
                f"where you trust that command, set {PIPE_SWITCH}=1 in the environment"
            )
        if "://" in pattern and not _is_remote(pattern):
            raise UserError(f"shards: '{pattern}': only local paths, http:// and https:// can be read")
        for name in expand_braces(pattern):
            found = [name] if _is_remote(name) else _files(folder / Path(name).expanduser())
            sources |= dict.fromkeys(found)
            if not found:
                missing.append(folder / name)
    if missing:
        others = f", nor {len(missing) - 1} others that are named" if len(missing) > 1 else ""
        raise UserError(f"shards: there is no '{missing[0]}'{others}")
    return named(sources, folder)


def named(sources: Iterable[str], folder: Path) -> list[Shard]:
    """Returns files with ids: paths below the folder, hosts and paths of urls, and what sets equal ones apart."""
    sources = list(sources)
    names = [_name(source, folder) for source in sources]
    count = Counter(names)
    return [
        Shard(f"{name}-{_digest(source)}" if count[name] > 1 else name, source)
        for name, source in zip(names, sources, strict=True)
    ]


def expand_braces(pattern: str) -> Iterator[str]:
    """Yields the names that a pattern stands for: ``{000..123}`` and ``{a,b}``, not nested.

    Raises:
        UserError: Braces are nested or left open, or there are too many names.
    """
    parts = _BRACES.split(pattern)
    if not pattern.startswith("pipe:") and re.search(r"[{}]", "".join(parts[::2])):
        raise UserError(
            f"shards: '{pattern}': braces hold a range ({{000..123}}) or alternatives ({{a,b}}), not nested"
        )
    groups = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    count = math.prod(map(len, groups))
    if count > _MAX_SHARDS:
        raise UserError(f"shards: '{pattern}' names {count} shards; at most {_MAX_SHARDS}")
    return map("".join, itertools.product(*groups))


def _choices(group: str) -> Sequence[str]:
    """Returns what may stand for a group of braces."""
    numbers = _RANGE.fullmatch(group)
    if numbers is None:
        return group.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) >= _MAX_SHARDS:
        return range(abs(last - first) + 1)  # pyright: ignore[reportReturnType]  # only ever counted, then refused
    padded = any(re.match(r"-?0\d", end) for end in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 0
    step = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def _is_remote(source: str) -> bool:
    return source.startswith(("http://", "https://", "pipe:"))


def _files(path: Path) -> list[str]:
    """Returns the files that a local name means."""
    if path.is_file():
        return [str(path)]
    return [file for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]


def _name(source: str, folder: Path) -> str:
    """Returns what images of a shard are known by: without a url's query, which often is a signature that expires."""
    if source.startswith("pipe:"):
        return str(PurePosixPath(source))
    if _is_remote(source):
        parts = urlsplit(source)
        return str(PurePosixPath(f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"))
    path = PurePosixPath(source)
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
