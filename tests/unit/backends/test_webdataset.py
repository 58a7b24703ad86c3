import io
import os
import random
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from simpletuner.backends import _tar_index as tar
from simpletuner.backends._base import NotFetched, Unusable, open_backend
from simpletuner.backends._download import Downloads
from simpletuner.backends._shards import PIPE_SWITCH, Shard
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.data.captions import read_captions
from simpletuner.data.manifest import Manifest, scan
from tests.unit.backends.shards import Server, add_member, image_bytes, samples, served, shards, write_shard


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("simpletuner.backends._download.time.sleep", lambda _seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "remote").mkdir()
    with served(tmp_path / "remote") as made:
        yield made


def scanned(dataset: DatasetConfig) -> Manifest:
    return read_captions(scan(dataset))


def by_id(manifest: Manifest) -> dict[str, list[str]]:
    return dict(zip(manifest.ids, manifest.captions, strict=True))


def test_reads_every_kind_of_image_and_caption(tmp_path: Path):
    write_shard(
        tmp_path / "shards" / "a.tar",
        {
            "./0.JPG": image_bytes((24, 16), 1, "JPEG"),
            "./0.txt": "a text",
            "deep.er/1.webp": image_bytes((16, 24), 2, "WEBP"),
            "deep.er/1.text": b"\xef\xbb\xbfa byte order mark",
            "2.jpeg": image_bytes((8, 8), 3, "JPEG"),
            "2.caption": "one\ntwo",
            "3.png": image_bytes((8, 16), 4),
            "3.json": {"caption": "from json", "width": 1},
            "4.cls": "7",
            "5.mp4": b"x",
        },
    )
    manifest = scanned(shards(tmp_path))
    assert by_id(manifest) == {
        "a.tar/0.JPG": ["a text"],
        "a.tar/2.jpeg": ["one", "two"],
        "a.tar/3.png": ["from json"],
        "a.tar/deep.er/1.webp": ["a byte order mark"],
    }
    sizes = zip(manifest.rows["width"].to_pylist(), manifest.rows["height"].to_pylist(), strict=True)
    assert list(sizes) == [(24, 16), (8, 8), (8, 16), (16, 24)]
    assert manifest.problems == {}


def test_an_image_is_read_at_its_place_byte_for_byte(tmp_path: Path):
    written = samples(0, 5)
    write_shard(tmp_path / "shards" / "a.tar", written)
    backend = open_backend(shards(tmp_path))
    for name in ("00003.png", "00000.png", "00004.png"):
        with backend.open(f"a.tar/{name}") as file:
            assert file.read() == written[name]
            file.seek(-3, io.SEEK_END)
            assert file.read(10) == written[name][-3:]
            file.seek(0)
            assert Image.open(file).size == (16, 16)


def test_the_places_are_those_that_the_webdataset_package_reads(tmp_path: Path):
    members: dict[str, Any] = samples(0, 3) | {"a" * 150 + "/b.png": image_bytes(seed=9), "3.d.png": b"x", "4.txt": "x"}
    path = write_shard(tmp_path / "shards" / "a.tar", members)
    reference = {
        sample["__key__"]: (sample["png"], sample.get("txt", b"").decode())
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        if "png" in sample
    }
    backend = open_backend(shards(tmp_path))
    ours = {}
    for sample in tar.make_index(path):
        if not sample.problem:
            with backend.open(f"a.tar/{sample.name}") as file:
                ours[sample.key] = (file.read(), backend.read_text(f"a.tar/{sample.key}.txt") or "")
    assert len(reference) == 4
    assert ours == reference


def test_of_several_images_of_a_sample_one_is_taken(tmp_path: Path):
    member = image_bytes()
    write_shard(tmp_path / "shards" / "a.tar", {"0.webp": member, "0.png": member, "0.txt": "x", "0.seg.png": member})
    assert scanned(shards(tmp_path)).ids == ["a.tar/0.png"]


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
        ("{000..003}.tar", r"shards: there is no '.*/shards/001.tar'"),
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


def test_keys_are_checked(tmp_path: Path):
    write_shard(tmp_path / "shards" / "000.tar", samples(0, 1))
    with pytest.raises(UserError) as error:
        open_backend(shards(tmp_path, caption_kee="text", download_attempts=0))
    assert error.value.lines == (
        "dataset 'pictures': caption_kee: unknown key - did you mean 'caption_key'?",
        "dataset 'pictures': download_attempts: 0 is too small; at least 1. How often to try a shard.",
    )


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
    manifest = scan(shards(tmp_path, shards=["a.tar", f"pipe:{command}"], **options))
    assert manifest.problems == {"cannot be opened": (f"pipe:{command}",)}
    assert said in caplog.text
    assert not list((tmp_path / "cache" / "vae" / "shards").glob("*.part"))


def test_captions_of_the_json_key_go_first_when_it_is_named(tmp_path: Path):
    members = {
        "0.png": image_bytes(seed=0), "0.txt": "short", "0.json": {"caption": "c", "long": "a long one"},
        "1.png": image_bytes(seed=1), "1.txt": "short", "1.json": {"long": ["one", "two", 3]},
        "2.png": image_bytes(seed=2), "2.txt": "short", "2.json": {"long": None},
        "3.png": image_bytes(seed=3), "3.json": {"caption": "not asked for"},
    }  # fmt: skip
    write_shard(tmp_path / "shards" / "a.tar", members)
    found = by_id(scanned(shards(tmp_path, caption_key="long")))
    assert found == {"a.tar/0.png": ["a long one"], "a.tar/1.png": ["one", "two"], "a.tar/2.png": ["short"]}
    assert by_id(scanned(shards(tmp_path)))["a.tar/0.png"] == ["short"]


def test_a_broken_caption_costs_its_sample_only(tmp_path: Path):
    members = {
        "0.png": image_bytes(seed=0), "0.txt": b"\xff\xfe",
        "1.png": image_bytes(seed=1), "1.json": b'{"caption": ',
        "2.png": image_bytes(seed=2), "2.json": b"[" * 100_000,
        "3.png": image_bytes(seed=3), "3.json": b'"text"',
        "4.png": image_bytes(seed=4), "4.txt": b"x" * (tar.MAX_TEXT_BYTES + 1),
        "5.png": image_bytes(seed=5), "5.txt": "good",
        "6.png": image_bytes(seed=6), "6.json": b'{"caption": "\xff"}',
        "7.png": image_bytes(seed=7), "7.json": b'{"caption": "x", "original_width": 1' + b"0" * 5000 + b"}",
    }  # fmt: skip
    write_shard(tmp_path / "shards" / "a.tar", members)
    manifest = scanned(shards(tmp_path))
    assert manifest.ids == ["a.tar/5.png"]
    assert manifest.problems == {
        "caption file is not UTF-8": ("a.tar/0.png", "a.tar/6.png"),
        "caption file cannot be opened": tuple(f"a.tar/{n}.png" for n in (1, 2, 4, 7)),
        "without caption": ("a.tar/3.png",),
    }


def test_filters_by_what_the_json_says(tmp_path: Path):
    facts: list[dict[str, Any]] = [
        {"original_width": 512, "original_height": 512, "pwatermark": 0.5},
        {"original_width": 2000, "original_height": 511, "pwatermark": 0.1},
        {"original_width": 512, "original_height": 900.0, "pwatermark": 0.51},
        {"original_width": "512", "original_height": 900, "pwatermark": 0.1},
        {"original_width": 600, "original_height": 600},
    ]
    members: dict[str, Any] = {}
    for number, about in enumerate(facts):
        members |= {f"{number}.png": image_bytes(seed=number), f"{number}.json": about | {"caption": "x"}}
    write_shard(tmp_path / "shards" / "a.tar", members | {"5.png": image_bytes(), "5.txt": "x"})
    manifest = scan(shards(tmp_path, minimum_original_size=512, maximum_watermark=0.5))
    assert manifest.ids == ["a.tar/0.png"]
    assert manifest.problems == {
        "smaller than minimum_original_size 512, by its json": ("a.tar/1.png",),
        "above maximum_watermark 0.5, by its json": ("a.tar/2.png",),
        "minimum_original_size is set, and its json has no original_width and original_height": (
            "a.tar/3.png",
            "a.tar/5.png",
        ),
        "maximum_watermark is set, and its json has no pwatermark": ("a.tar/4.png",),
    }
    assert len(scan(shards(tmp_path)).ids) == 6


def test_nothing_but_the_listed_suffixes_is_read_or_written(tmp_path: Path):
    """A member that would run code if it were unpickled, imported or extracted lies there untouched."""
    ran = tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()"
    pickled = b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR."
    names = ["0.pyd", "0.pickle", "0.pkl", "0.pth", "0.npy", "0.ten", "0.py", "0.eps", "0.svg", "0.gif", "0.json.pyd"]
    evil = dict.fromkeys(names, pickled) | dict.fromkeys(["../../up.png", "/tmp/root-wds.png", "a/../../b.png"], b"")
    member = image_bytes()
    path = write_shard(tmp_path / "shards" / "a.tar", evil | {"../0.png": member, "../0.txt": "up", "0.png": member})
    with tarfile.open(path, "a") as appended:
        for name, kind, target in (("l.png", tarfile.SYMTYPE, "/etc/passwd"), ("h.png", tarfile.LNKTYPE, "0.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            appended.addfile(link)
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("pickle.find_class", "exec", "subprocess.Popen", "os.system"):
            opened.append(event)

    sys.addaudithook(watch)
    manifest = scanned(shards(tmp_path))
    watching = False
    assert "pickle.find_class" not in opened
    assert "subprocess.Popen" not in opened
    assert "os.system" not in opened
    assert manifest.ids == ["a.tar/../0.png"]
    assert manifest.problems["empty file"] == ("a.tar/../../up.png", "a.tar/a/../../b.png", "a.tar/tmp/root-wds.png")
    assert manifest.problems["without caption"] == ("a.tar/0.png",)
    after = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.relative_to(tmp_path).parts[0] for file in after - before} == {"cache"}
    assert not ran.exists()
    backend = open_backend(shards(tmp_path))
    for name in names:
        with pytest.raises(OSError, match="a.tar"):
            backend.open(f"a.tar/{name}")


def test_names_that_could_steer_a_terminal_are_escaped(tmp_path: Path):
    path = tmp_path / "shards" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as made:
        for name in ("\x1b[2J.png", "\udcff.png", "b.png"):
            add_member(made, name, image_bytes())
    manifest = scan(shards(tmp_path))
    assert manifest.ids == ["a.tar/b.png"]
    assert manifest.problems == {tar.UNUSABLE_NAME: ("a.tar/\\udcff.png", "a.tar/\\x1b[2J.png")}


def test_a_name_twice_and_a_name_with_dots_are_counted(tmp_path: Path):
    path = write_shard(tmp_path / "shards" / "a.tar", {"0.png": image_bytes((8, 16)), "photo.v2.png": image_bytes()})
    with tarfile.open(path, "a") as appended:
        add_member(appended, "0.png", image_bytes((16, 8)))
    manifest = scan(shards(tmp_path))
    assert manifest.ids == ["a.tar/0.png"]
    assert manifest.rows["height"].to_pylist() == [16]
    assert manifest.problems == {tar.TWICE: ("a.tar/0.png (again)",), tar.SEVERAL_DOTS: ("a.tar/photo.v2.png",)}


def test_damage_costs_what_it_hit(tmp_path: Path):
    """A header that is overwritten, an image that is, and a shard that is cut off; the other samples are used."""
    path = write_shard(tmp_path / "shards" / "a.tar", samples(0, 6))
    with tarfile.open(path) as made:
        places = {member.name: member for member in made}
    content = bytearray(path.read_bytes())
    content[places["00001.png"].offset + 10 : places["00001.png"].offset + 400] = bytes(b"\xaa" * 390)
    content[places["00003.png"].offset_data : places["00003.png"].offset_data + 8] = bytes(8)
    path.write_bytes(content[: places["00005.png"].offset_data + 20])
    manifest = scanned(shards(tmp_path))
    assert manifest.ids == [f"a.tar/0000{n}.png" for n in (0, 2, 4)]
    assert manifest.problems == {
        tar.DAMAGED: (f"a.tar/(at byte {places['00001.png'].offset})",),
        "not an image that can be read": ("a.tar/00003.png",),
        tar.CUT_OFF: ("a.tar/00005.png",),
    }


def test_a_shard_that_is_none_is_counted(tmp_path: Path):
    folder = tmp_path / "shards"
    write_shard(folder / "good.tar", samples(0, 1))
    (folder / "page.tar").write_text("<html>404</html>" * 100)
    (folder / "empty.tar").touch()
    with tarfile.open(folder / "zipped.tar", "w:gz") as made:
        add_member(made, "0.png", image_bytes())
    manifest = scan(shards(tmp_path, shards=["good.tar", "page.tar", "empty.tar", "zipped.tar"]))
    assert manifest.ids == ["good.tar/00000.png"]
    assert manifest.problems == {
        tar.NO_TAR: ("empty.tar/(at byte 0)", "page.tar/(at byte 0)", "zipped.tar/(at byte 0)")
    }
    with pytest.raises(UserError, match="every image is left out: 1 not an uncompressed tar file"):
        scan(shards(tmp_path, shards="zipped.tar"))


def test_shards_joined_by_cat_are_read_whole(tmp_path: Path):
    parts = [write_shard(tmp_path / f"{n}.tar", samples(n, 1)).read_bytes() for n in range(3)]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(b"".join(parts))
    manifest = scan(shards(tmp_path))
    assert manifest.ids == [f"a.tar/0000{n}.png" for n in range(3)]
    assert manifest.problems == {}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [-512, -1, 1 << 40])
def test_headers_that_lie_about_their_size(tmp_path: Path, kind: bytes, size: int):
    """CVE-2025-8194 and kin: a negative size sends tarfile in circles, a huge one fills the memory."""
    good = write_shard(tmp_path / "shards" / "a.tar", samples(0, 1))
    header = tarfile.TarInfo("1.png")
    header.type, header.size = kind, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\x80" + size.to_bytes(11)) if size > 0 else (size + 256**12).to_bytes(12)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    good.write_bytes(good.read_bytes()[:3072] + block + b"\x01" * 512)
    manifest = scan(shards(tmp_path))
    assert manifest.ids == ["a.tar/00000.png"]
    assert sum(map(len, manifest.problems.values())) == 1


def test_extended_headers_of_extended_headers(tmp_path: Path):
    good = write_shard(tmp_path / "shards" / "a.tar", samples(0, 1))
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    nested = (header.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 5000
    good.write_bytes(good.read_bytes()[:3072] + nested)
    manifest = scan(shards(tmp_path))
    assert manifest.ids == ["a.tar/00000.png"]
    assert list(manifest.problems) == [tar.DAMAGED]


def test_random_damage_is_never_fatal(tmp_path: Path):
    path = write_shard(tmp_path / "a.tar", samples(0, 4))
    content, rng = path.read_bytes(), random.Random(5)
    broken = tmp_path / "broken.tar"
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 30)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        broken.write_bytes(damaged[: rng.randint(0, len(damaged))])
        size = broken.stat().st_size
        for sample in tar.make_index(broken):
            assert sample.problem or sum(sample.image) <= size
            assert sample.text[1] < 0 or sum(sample.text) <= size


def test_a_decompression_bomb_is_left_out(tmp_path: Path):
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    write_shard(tmp_path / "shards" / "a.tar", {"0.png": file.getvalue(), "1.png": image_bytes()})
    manifest = scan(shards(tmp_path))
    assert manifest.ids == ["a.tar/1.png"]
    assert manifest.problems == {"more than 178 megapixels (a decompression bomb?)": ("a.tar/0.png",)}


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    real = tar.make_index

    def counted(path: Path) -> tar.TarIndex:
        made.append(path.name)
        return real(path)

    monkeypatch.setattr("simpletuner.backends.webdataset.make_index", counted)
    path = write_shard(tmp_path / "shards" / "a.tar", samples(0, 2))
    write_shard(tmp_path / "shards" / "b.tar", samples(2, 2))
    first = scan(shards(tmp_path))
    assert made == ["a.tar", "b.tar"]
    assert scan(shards(tmp_path)).rows.equals(first.rows)
    assert made == ["a.tar", "b.tar"]
    write_shard(path, samples(0, 3))
    assert len(scan(shards(tmp_path)).ids) == 5
    assert made == ["a.tar", "b.tar", "a.tar"]
    for file in (tmp_path / "cache" / "vae" / "shards").glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    assert len(scan(shards(tmp_path)).ids) == 5
    assert made[3:] == ["a.tar", "b.tar"]


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
    with pytest.raises(UserError, match="cannot write downloaded shards into '.*/cache/vae/shards'"):
        scan(shards(tmp_path, shards=f"{server.url}/0.tar"))


def test_what_is_not_in_a_shard(tmp_path: Path):
    write_shard(tmp_path / "shards" / "a.tar", samples(0, 1))
    backend = open_backend(shards(tmp_path))
    for path in ("a.tar/1.png", "b.tar/00000.png", "00000.png", "a.tar/00000.jpg", "/etc/passwd", "a.tar"):
        with pytest.raises(FileNotFoundError):
            backend.open(path)
    assert backend.read_text("a.tar/1.txt") is None
    (tmp_path / "shards" / "a.tar").unlink()
    with pytest.raises(OSError, match="No such file"):
        backend.open("a.tar/00000.png")


def test_open_names_the_reason(tmp_path: Path):
    path = write_shard(tmp_path / "shards" / "a.tar", {"0.png": image_bytes((64, 64))})
    os.truncate(path, 600)
    with pytest.raises(Unusable, match=f"^{tar.CUT_OFF}$"):
        open_backend(shards(tmp_path)).open("a.tar/0.png")


def test_two_that_want_the_same_shard_fetch_it_once(tmp_path: Path, server: Server):
    write_shard(server.folder / "0.tar", samples(0, 50))
    downloads = Downloads(tmp_path / "cache", 10**9, 10, 1)
    shard = Shard("0.tar", f"{server.url}/0.tar")
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(downloads.fetch, [shard] * 4))
    assert paths == {downloads.path(shard)}
    assert server.requests == ["/0.tar"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [downloads.path(shard).name]
