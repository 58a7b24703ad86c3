"""Datasets as people have them: each kind of damage costs its own images only, and is told in one line."""

import errno
import logging
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner import plan_view
from simpletuner.config.errors import UserError
from simpletuner.data import cache
from simpletuner.data.captions import NOT_UTF8, read_captions
from simpletuner.data.dataset import CachedDataset
from simpletuner.data.identity import Encoding
from simpletuner.data.manifest import Manifest, scan
from simpletuner.data.precompute import precompute, prepare
from simpletuner.data.summary import summarise
from simpletuner.data.transforms import open_rgb
from tests.unit.data.support import CountingFamily, add_image, dataset, picture, text_cache


def header_of_png(width: int, height: int) -> bytes:
    """Returns a PNG that says its size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


LONGER = "for which Pillow has no decoder: convert it to JPEG or PNG"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.png", b"", "empty file"),
        ("x.jpg", b"<!doctype html><title>404</title>", "not an image that can be read"),
        ("x.png", header_of_png(60_000, 60_000), "more than 178 megapixels (a decompression bomb?)"),
        ("x.png", header_of_png(60_000, 1), "wider than maximum_aspect_ratio 20"),
        ("x.png", header_of_png(1, 60_000), "narrower than minimum_aspect_ratio 0.05"),
        ("x.heic", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", f"HEIC, {LONGER}"),
        ("x.HEIF", b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic", f"HEIC, {LONGER}"),
        ("x.jxl", b"\xff\x0a\xfa\x7f\x01\x90\x08\x06\x01\x00", f"JPEG XL, {LONGER}"),
        ("x.jxl", b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a", f"JPEG XL, {LONGER}"),
        ("x.png", link_to_itself, "cannot be opened: Too many levels of symbolic links"),
    ],
)
def test_a_file_that_is_no_picture_is_left_out_with_its_reason(
    tmp_path: Path, name: str, content: bytes | Callable[[Path], None], line: str
):
    add_image(tmp_path / "images", "good.png", (32, 32))
    path = tmp_path / "images" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    manifest = scan(dataset(tmp_path))
    assert (manifest.ids, manifest.problems) == (["good.png"], {line: (name,)})


@contextmanager
def as_somebody() -> Iterator[None]:
    """Acts as a user who may not read everything, where the tests run as root."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


def test_what_may_not_be_read_is_left_out_with_its_reason(tmp_path: Path):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root = Path(name)
        root.chmod(0o755)
        add_image(root / "images", "good.png", (32, 32))
        add_image(root / "images", "quiet.png", (32, 32)).with_suffix(".txt").chmod(0)
        add_image(root / "images", "closed.png", (32, 32)).chmod(0)
        add_image(root / "images", "folder/inside.png", (32, 32)).parent.chmod(0)
        read_captions(scan(dataset(root), write=False))  # loads what Python needs, which somebody may not read either
        with as_somebody():
            manifest = read_captions(scan(dataset(root), write=False))
        (root / "images" / "folder").chmod(stat.S_IRWXU)
    assert (manifest.ids, manifest.problems) == (
        ["good.png"],
        {
            "cannot be opened: Permission denied": ("closed.png", "folder"),
            "caption file cannot be opened: Permission denied": ("quiet.png",),
        },
    )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_trained_on(tmp_path: Path, kind: str):
    red, blue = Image.new("RGB", (32, 32), (255, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 255))
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"x.{kind.lower()}"
    red.save(path, kind, save_all=True, append_images=[blue, red], duration=100, **{"lossless": True})
    with Image.open(path) as opened:
        assert opened.is_animated
    assert scan(dataset(tmp_path)).ids == [path.name]
    with path.open("rb") as file:
        assert open_rgb(file).getcolors() == [(32 * 32, (255, 0, 0))]


def test_a_picture_is_read_by_its_content_whatever_its_name_says(tmp_path: Path):
    add_image(tmp_path / "images", "x.png", (48, 32)).rename(tmp_path / "images" / "x.jpg")
    manifest = scan(dataset(tmp_path))
    assert (manifest.ids, manifest.rows["width"].to_pylist(), manifest.problems) == (["x.jpg"], [48], {})


NAMES = (
    "Ελένη 東京 🦊",
    "e\u0301",
    "\u202eright to left",
    "two\nlines\x1b[31m",
    " spaced .. out ",
    "n" * 251,
    "字" * 83,
)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_trained_on_and_printed_in_one_line(tmp_path: Path, name: str):
    add_image(tmp_path / "images", f"{name}.png", (64, 64), caption="a fox")
    _, manifest = encoded(tmp_path)
    assert (manifest.ids, manifest.captions) == ([f"{name}.png"], [["a fox"]])
    with pytest.raises(UserError) as caught:
        scan(dataset(tmp_path, minimum_image_size=512))
    assert all(line.isprintable() for line in caught.value.lines)
    left_out = summarise(manifest.without({"too old": [f"{name}.png"]}, [True]))
    assert all(line.isprintable() for line in plan_view._dataset_lines(left_out, 1))


def encoded(root: Path, **values: Any) -> tuple[CachedDataset, Manifest]:
    """Returns the dataset with its features cached."""
    family = CountingFamily()
    filled = precompute(prepare([dataset(root, **values)]), text_cache(root), Encoding(family, None))
    return CachedDataset(filled, family.uncond, 0), filled.manifests[0]


def test_two_pictures_of_one_name_share_their_caption_and_nothing_else(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (64, 64), 1, caption="a cat")
    picture(64, 64, 2).save(tmp_path / "images" / "a.jpg")
    data, manifest = encoded(tmp_path)
    assert (manifest.ids, manifest.captions) == (["a.jpg", "a.png"], [["a cat"], ["a cat"]])
    batch, _ = next(data.batches())
    assert sorted(batch.ids) == ["a.jpg", "a.png"]
    assert not batch.mean[0].equal(batch.mean[1])


@pytest.mark.parametrize(
    ("content", "captions", "problems"),
    [
        ("café".encode("latin-1"), [], {NOT_UTF8: ("a.png",)}),
        ("café".encode("utf-16"), [], {NOT_UTF8: ("a.png",)}),
        ("\ufeffcafé\r\nau lait\r\n".encode(), [["café", "au lait"]], {}),
        (b"", [], {"without caption": ("a.png",)}),
        (b" \r\n\t\r\n", [], {"without caption": ("a.png",)}),
    ],
)
def test_captions_of_any_editor(
    tmp_path: Path, content: bytes, captions: list[list[str]], problems: dict[str, tuple[str, ...]]
):
    add_image(tmp_path / "images", "a.png", (8, 8)).with_suffix(".txt").write_bytes(content)
    add_image(tmp_path / "images", "b.png", (8, 8), caption="a dog")
    manifest = read_captions(scan(dataset(tmp_path)))
    assert (manifest.captions, manifest.problems) == ([*captions, ["a dog"]], problems)


def test_a_truncated_picture_is_named_when_its_turn_to_be_encoded_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for number in range(3):
        path = add_image(tmp_path / "images", f"{number}.png", (64, 64), number)
    path.write_bytes(path.read_bytes()[:-300])
    for _ in range(2):  # a start that finds the others cached says it too
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            encoded(tmp_path)
        assert caplog.messages == ["dataset 'pictures': 1 left out: truncated or corrupt (such as 2.png)"]


def test_a_full_disk_ends_the_caching_in_one_line_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(6):
        add_image(tmp_path / "images", f"{number}.png", (64, 64), number)

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}

    def full(descriptor: int, left: list[int]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lines: list[str] = []
    for room in range(40):
        left = [room]
        with monkeypatch.context() as patch:
            patch.setattr(cache.os, "fsync", lambda descriptor, left=left: full(descriptor, left))
            try:
                encoded(tmp_path, write_batch_size=2)
                break
            except UserError as error:
                lines += error.lines
        assert not [name for name in files() if name.startswith(".")]
    whole = files()
    assert len(lines) == 6  # each start goes further: a manifest three times, and three shards or more
    assert all(line.startswith("cannot write the cache file '") for line in lines)
    assert all(line.endswith("': No space left on device") for line in lines)
    for path in [*(tmp_path / "cache").rglob("*.safetensors"), *(tmp_path / "cache").rglob("*.arrow")]:
        path.unlink()
    encoded(tmp_path, write_batch_size=2)
    assert files() == whole
