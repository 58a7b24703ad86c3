"""Tar files with any members, and a server on this machine that hands them out."""

import io
import json
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from simpletuner.config.backends import DatasetConfig
from simpletuner.data.captions import read_captions
from simpletuner.data.manifest import Manifest, scan
from tests.unit.data.support import dataset, picture


def image_bytes(size: tuple[int, int] = (16, 16), seed: int = 0, kind: str = "PNG") -> bytes:
    """Returns an encoded picture."""
    file = io.BytesIO()
    picture(*size, seed).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, members: Mapping[str, bytes | str | dict[str, Any]]) -> Path:
    """Writes a tar file; a text is encoded, an object becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, value in members.items():
            content = json.dumps(value) if isinstance(value, dict) else value
            add_member(tar, name, content.encode() if isinstance(content, str) else content)
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def samples(first: int, count: int, size: tuple[int, int] = (16, 16)) -> dict[str, bytes | str]:
    """Returns the members of samples with consecutive keys and pictures, each with a caption."""
    made: dict[str, bytes | str] = {}
    for number in range(first, first + count):
        made |= {f"{number:05}.png": image_bytes(size, number), f"{number:05}.txt": f"caption {number}"}
    return made


def shards(root: Path, **options: Any) -> DatasetConfig:
    """Returns a dataset of the shards in ``root/shards``."""
    keys = set(DatasetConfig.model_fields)
    own = {key: options.pop(key) for key in list(options) if key in keys}
    settings: dict[str, Any] = {"type": "webdataset", "instance_data_dir": root / "shards", "options": options}
    return dataset(root, **settings | own)


def scanned(dataset: DatasetConfig) -> Manifest:
    """Returns the manifest of a dataset with its captions."""
    return read_captions(scan(dataset))


def write_three_shards(folder: Path, further: Mapping[str, str | bytes] | None = None) -> Path:
    """Writes 13 samples (nine squares, four wide ones) and a truncated wide one below a folder, and returns it.

    Args:
        folder: Gets the shards a, b and c in ``shards``.
        further: More members of the last shard.
    """
    write_shard(folder / "shards" / "a.tar", samples(0, 5, (64, 64)))
    write_shard(folder / "shards" / "b.tar", samples(5, 4, (64, 64)) | samples(9, 2, (128, 64)))
    broken = image_bytes((128, 64), 99)
    cut = {"99.png": broken[: len(broken) // 2], "99.txt": "cut"}
    write_shard(folder / "shards" / "c.tar", samples(11, 2, (128, 64)) | cut | dict(further or {}))
    return folder


def by_id(manifest: Manifest) -> dict[str, list[str]]:
    """Returns image id -> captions."""
    return dict(zip(manifest.ids, manifest.captions, strict=True))


@dataclass
class Server:
    """What a server does and did."""

    url: str
    folder: Path
    failures: list[int] = field(default_factory=list[int])
    """Status codes that it answers with first; 0: half of the file, then nothing."""
    requests: list[str] = field(default_factory=list[str])


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """Serves the files of a folder on the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(self.path)
            path = server.folder / self.path.lstrip("/").partition("?")[0]
            failure = server.failures.pop(0) if server.failures else None
            if failure or not path.is_file():
                self.send_response(failure or 404)
                if failure == 302:
                    self.send_header("Location", f"file://{path}")
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if failure == 0 else content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}", folder)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
