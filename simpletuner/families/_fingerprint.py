"""A digest of a component's files that is cheap for files of many gigabytes."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from simpletuner.families._source import read_header

_BLOCK_BYTES = 4096


def fingerprint(weights: Iterable[Path], others: Iterable[Path], prefixes: tuple[str, ...] = ("",)) -> str:
    """Returns 32 hex digits for the content of a component, whatever its folder and its sharding.

    Small files are read whole. Of each tensor count name, type, shape, and three blocks of 4 KiB: its beginning, middle
    and end. That is 6 MB of the 3 GB of SDXL's text encoders, and whatever training has changed shows in it.

    Args:
        weights: safetensors files.
        others: Configs and vocabularies.
        prefixes: Of the tensors to count: a single file holds all components.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(others, key=lambda path: (path.parent.name, path.name)):
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    tensors: dict[str, bytes] = {}
    for path in weights:
        tensors |= _tensor_samples(path, prefixes)
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name])
    return digest.hexdigest()


def _tensor_samples(path: Path, prefixes: tuple[str, ...]) -> dict[str, bytes]:
    """Returns tensor name -> type, shape and sampled bytes, of a safetensors file."""
    header = read_header(path)
    header.pop("__metadata__", None)
    samples: dict[str, bytes] = {}
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in header.items():
            if not name.startswith(prefixes):
                continue
            begin, end = (start + offset for offset in entry["data_offsets"])
            block = min(_BLOCK_BYTES, end - begin)
            blocks: list[bytes] = []
            for position in (begin, (begin + end - block) // 2, end - block):
                file.seek(position)
                blocks.append(file.read(block))
            samples[name] = f"{entry['dtype']}{entry['shape']}".encode() + b"".join(blocks)
    return samples
