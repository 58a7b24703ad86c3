"""A server of files on this machine."""

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
