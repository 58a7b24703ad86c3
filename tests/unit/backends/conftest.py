"""Servers on this machine: of files, and of S3."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.backends.shards import Server, served


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Returns a server of the folder ``remote``, asked without proxies, and without pauses before another attempt."""
    monkeypatch.setattr("simpletuner.backends._download.time.sleep", lambda _seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "remote").mkdir()
    with served(tmp_path / "remote") as made:
        yield made


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Returns the url of moto's S3 server."""
    moto_server = pytest.importorskip("moto.server")
    made = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def endpoint(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the url of an S3 server, asked without proxies and without keys of the environment."""
    for name in (*(name for name in os.environ if name.startswith("AWS_")), "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return s3_server
