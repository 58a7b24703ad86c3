import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.backends import _tar_index as tar
from simpletuner.backends._base import open_backend
from simpletuner.config.errors import UserError
from simpletuner.data.captions import NOT_UTF8
from simpletuner.data.manifest import scan
from tests.unit.backends.shards import by_id, image_bytes, samples, scanned, shards, write_shard


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


def test_of_several_images_of_a_sample_one_is_taken(tmp_path: Path):
    member = image_bytes()
    write_shard(tmp_path / "shards" / "a.tar", {"0.webp": member, "0.png": member, "0.txt": "x", "0.seg.png": member})
    assert scanned(shards(tmp_path)).ids == ["a.tar/0.png"]


def test_keys_are_checked(tmp_path: Path):
    write_shard(tmp_path / "shards" / "000.tar", samples(0, 1))
    with pytest.raises(UserError) as error:
        open_backend(shards(tmp_path, caption_kee="text", download_attempts=0))
    assert error.value.lines == (
        "dataset 'pictures': caption_kee: unknown key - did you mean 'caption_key'?",
        "dataset 'pictures': download_attempts: 0 is too small; at least 1. How often to try a file.",
    )


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
        NOT_UTF8: ("a.tar/0.png", "a.tar/6.png"),
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


def test_what_is_not_in_a_shard(tmp_path: Path):
    write_shard(tmp_path / "shards" / "a.tar", samples(0, 1))
    backend = open_backend(shards(tmp_path))
    for path in ("a.tar/1.png", "b.tar/00000.png", "00000.png", "a.tar/00000.jpg", "/etc/passwd", "a.tar"):
        with pytest.raises(FileNotFoundError):
            backend.open(path)
    assert backend.caption("a.tar/1.png") is None
    (tmp_path / "shards" / "a.tar").unlink()
    with pytest.raises(OSError, match="No such file"):
        backend.open("a.tar/00000.png")
