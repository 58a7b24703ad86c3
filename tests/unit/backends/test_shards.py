"""Which shards a name means, and how those from elsewhere come into the cache."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from simpletuner.backends._base import NotFetched, open_backend
from simpletuner.backends._download import DownloadOptions, Downloads
from simpletuner.backends._shards import PIPE_SWITCH, Shard
from simpletuner.config.errors import UserError
from simpletuner.data.captions import read_captions
from simpletuner.data.manifest import scan
from tests.unit.backends.shards import Server, by_id, image_bytes, samples, scanned, shards, write_shard


def test_shards_by_range_list_and_glob_each_once(tmp_path: Path):
    for number in range(12):
        write_shard(tmp_path / "shards" / f"{number:03}.tar", samples(number, 1))
    everything = [f"{n:03}.tar/{n:05}.png" for n in range(12)]
    assert scan(shards(tmp_path)).ids == everything
    assert scan(shards(tmp_path, shards="{000..011}.tar")).ids == everything
    assert scan(shards(tmp_path, shards="0{0..1}{0,1}.tar")).ids == [everything[n] for n in (0, 1, 10, 11)]
    assert scan(shards(tmp_path, shards=["01*.tar", "{009..011}.tar", "00[12].tar"])).ids == [
        everything[n] for n in (1, 2, 9, 10, 11)
    ]
    outside = str(tmp_path / "shards" / "003.tar")
    dataset = shards(tmp_path, shards=outside, instance_data_dir=tmp_path / "cache")
    assert scan(dataset).ids == [f"{outside}/00003.png"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{000..003}.tar", r"shards: there is no '.*/shards/001.tar', nor 2 others that are named$"),
        ("none-*.tar", r"shards: there is no '.*/shards/none-\*.tar'"),
        ("{0..999999999}.tar", r"names 1000000000 shards; at most 100000"),
        ("{0..999999999}{0..999999999}.tar", r"names 1000000000000000000 shards"),
        ("{a,b{0..1}}.tar", r"not nested"),
        ("s3://bucket/0.tar", r"'s3://bucket/0.tar': only local paths, http:// and https://"),
        ("file:///etc/passwd", r"only local paths"),
        (7, r"shards: 7 is not text or a list of texts"),
        ([], r"shards: \[\] is not text"),
        (["000.tar", None], r"is not text or a list"),
    ],
)
def test_what_is_no_shard_is_one_line(tmp_path: Path, written: Any, said: str):
    write_shard(tmp_path / "shards" / "000.tar", samples(0, 1))
    with pytest.raises(UserError, match=said) as error:
        open_backend(shards(tmp_path, shards=written))
    assert len(error.value.lines) == 1
    assert error.value.lines[0].startswith("dataset 'pictures': shards: ")


def test_a_pipe_is_refused_unless_the_environment_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_shard(tmp_path / "a.tar", samples(0, 2))
    touched = tmp_path / "touched"
    dataset = shards(tmp_path, shards=f"pipe:touch {touched}; cat {path}")
    for value in (None, "", "0", "yes"):
        if value is not None:
            monkeypatch.setenv(PIPE_SWITCH, value)
        with pytest.raises(UserError, match=f"would run a command .* set {PIPE_SWITCH}=1"):
            scan(dataset)
    assert not touched.exists()
    monkeypatch.setenv(PIPE_SWITCH, "1")
    assert [Path(name).name for name in scan(dataset).ids] == ["00000.png", "00001.png"]
    assert touched.exists()


@pytest.mark.parametrize(
    ("command", "said"), [("exit 3", "status 3"), ("printf x; exit 4", "status 4"), ("sleep 20", "wrote nothing")]
)
def test_a_command_that_fails_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str, said: str
):
    monkeypatch.setenv(PIPE_SWITCH, "1")
    write_shard(tmp_path / "shards" / "a.tar", samples(0, 1))
    options = {"download_attempts": 1, "download_timeout_seconds": 0.2}
    begun = time.monotonic()
    manifest = scan(shards(tmp_path, shards=["a.tar", f"pipe:{command}"], **options))
    assert time.monotonic() - begun < 15  # a command that hangs is ended, and not waited for
    assert manifest.problems == {"cannot be opened": (f"pipe:{command}",)}
    assert said in caplog.text
    assert not list((tmp_path / "cache" / "vae" / "shards").glob("*.part"))


def test_a_look_ahead_writes_nothing(tmp_path: Path, server: Server):
    write_shard(tmp_path / "shards" / "a.tar", samples(0, 2))
    write_shard(server.folder / "b.tar", samples(2, 2))
    dataset = shards(tmp_path, shards=["a.tar", f"{server.url}/b.tar"])
    before = sorted(tmp_path.rglob("*"))
    manifest = read_captions(scan(dataset, 5.0, write=False))
    assert manifest.ids == ["a.tar/00000.png", "a.tar/00001.png"]
    assert manifest.complete is False
    assert sorted(tmp_path.rglob("*")) == before
    assert server.requests == []
    with pytest.raises(NotFetched):
        list(open_backend(dataset).list_images(fetch=False))


def test_shards_behind_http_are_fetched_once(tmp_path: Path, server: Server):
    for number in range(3):
        write_shard(server.folder / "deep" / f"{number}.tar", samples(number, 1))
    urls = f"{server.url}/deep/{{0..2}}.tar?signature="
    dataset = shards(tmp_path, shards=f"{urls}a*[b]")
    host = server.url.removeprefix("http://")
    assert by_id(scanned(dataset)) == {f"{host}/deep/{n}.tar/0000{n}.png": [f"caption {n}"] for n in range(3)}
    assert server.requests == [f"/deep/{n}.tar?signature=a*[b]" for n in range(3)]
    with open_backend(dataset).open(f"{host}/deep/1.tar/00001.png") as file:
        assert file.read() == image_bytes(seed=1)
    scanned(shards(tmp_path, shards=f"{urls}renewed"))
    assert len(server.requests) == 3


def test_urls_that_differ_in_their_query_alone_are_different_shards(tmp_path: Path, server: Server):
    write_shard(server.folder / "get", samples(0, 2))
    manifest = scan(shards(tmp_path, shards=f"{server.url}/get?shard={{0..1}}"))
    assert len(set(manifest.ids)) == 4
    assert len(server.requests) == 2


def test_a_failing_server_is_asked_again(tmp_path: Path, server: Server):
    write_shard(server.folder / "0.tar", samples(0, 1))
    server.failures += [503, 0]
    assert len(scan(shards(tmp_path, shards=f"{server.url}/0.tar")).ids) == 1
    assert len(server.requests) == 3


def test_a_shard_that_cannot_be_had_is_counted_and_tried_by_the_next_scan(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
):
    write_shard(server.folder / "0.tar", samples(0, 1))
    dataset = shards(tmp_path, shards=f"{server.url}/{{0..1}}.tar")
    host = server.url.removeprefix("http://")
    manifest = scan(dataset)
    assert manifest.problems == {"cannot be opened": (f"{host}/1.tar",)}
    assert server.requests == ["/0.tar", "/1.tar"]
    assert "HTTP Error 404" in caplog.text
    write_shard(server.folder / "1.tar", samples(1, 1))
    assert len(scan(dataset).ids) == 2
    assert list(scan(dataset).problems) == []


def test_a_redirection_to_a_file_is_not_followed(tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture):
    write_shard(server.folder / "0.tar", samples(0, 1))
    server.failures += [302]
    with pytest.raises(UserError, match="every image is left out: 1 cannot be opened"):
        scan(shards(tmp_path, shards=f"{server.url}/0.tar"))
    assert "is not allowed" in caplog.text


def test_downloads_stop_at_the_limit(tmp_path: Path, server: Server):
    size = write_shard(server.folder / "0.tar", samples(0, 1)).stat().st_size
    write_shard(server.folder / "1.tar", samples(1, 1))
    urls = f"{server.url}/{{0..1}}.tar"
    with pytest.raises(UserError, match=r"1.tar' does not fit into the 1.5e-05 GB of max_download_gigabytes"):
        scan(shards(tmp_path, shards=urls, max_download_gigabytes=1.5e-5))
    folder = tmp_path / "cache" / "vae" / "shards"
    assert size == 10240
    assert [path.stat().st_size for path in folder.glob("*.tar")] == [size]
    assert not list(folder.glob("*.part"))
    assert len(scan(shards(tmp_path, shards=urls)).ids) == 2


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, server: Server):
    write_shard(server.folder / "0.tar", samples(0, 1))
    (tmp_path / "cache" / "vae").mkdir(parents=True)
    (tmp_path / "cache" / "vae" / "shards").touch()
    with pytest.raises(UserError, match="cannot write downloads into '.*/cache/vae/shards'"):
        scan(shards(tmp_path, shards=f"{server.url}/0.tar"))


def test_two_that_want_the_same_shard_fetch_it_once(tmp_path: Path, server: Server):
    write_shard(server.folder / "0.tar", samples(0, 50))
    downloads = Downloads(tmp_path / "cache", DownloadOptions())
    shard = Shard("0.tar", f"{server.url}/0.tar")
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(downloads.fetch, [shard] * 4))
    assert paths == {downloads.path(shard)}
    assert server.requests == ["/0.tar"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [downloads.path(shard).name]
