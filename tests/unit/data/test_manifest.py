import os
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image

from simpletuner.backends import local
from simpletuner.config.errors import UserError
from simpletuner.data.buckets import assign
from simpletuner.data.manifest import manifest_path, scan
from tests.unit.data.support import add_image, dataset


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were opened, in any order."""
    paths: list[str] = []
    original = local.Local.open

    def counting(self: local.Local, path: str) -> BinaryIO:
        paths.append(path)
        return original(self, path)

    monkeypatch.setattr(local.Local, "open", counting)
    return paths


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_rows_are_sizes_after_exif_ordered_by_path(tmp_path: Path):
    add_image(tmp_path / "images", "b/wide.jpg", (96, 64))
    add_image(tmp_path / "images", "a.png", (32, 40))
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "images" / "c.jpg", exif=exif.tobytes())
    manifest = scan(dataset(tmp_path))
    assert manifest.ids == ["a.png", "b/wide.jpg", "c.jpg"]
    assert manifest.rows.select(["width", "height"]).to_pydict() == {"width": [32, 96, 20], "height": [40, 64, 60]}
    assert manifest.complete
    assert manifest.problems == {}


def test_only_changed_files_are_opened_again(tmp_path: Path, opened: list[str]):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        add_image(tmp_path / "images", name, (32, 32))
    scan(dataset(tmp_path))
    assert sorted(opened) == ["a.png", "b.png", "c.png", "d.png"]
    opened.clear()
    written = manifest_path(dataset(tmp_path)).stat().st_mtime_ns
    assert scan(dataset(tmp_path)).rows.num_rows == 4
    assert opened == []
    assert manifest_path(dataset(tmp_path)).stat().st_mtime_ns == written
    add_image(tmp_path / "images", "b.png", (48, 16))
    add_image(tmp_path / "images", "e.png", (32, 32))
    (tmp_path / "images" / "c.png").unlink()
    manifest = scan(dataset(tmp_path))
    assert sorted(opened) == ["b.png", "e.png"]
    assert manifest.ids == ["a.png", "b.png", "d.png", "e.png"]
    assert manifest.rows["width"].to_pylist() == [32, 48, 32, 32]


def test_nothing_is_written_beside_the_images(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (32, 32))
    before = snapshot(tmp_path / "images")
    (tmp_path / "images").chmod(0o555)
    scan(dataset(tmp_path))
    assert snapshot(tmp_path / "images") == before
    assert [path.name for path in (tmp_path / "cache" / "vae").iterdir()] == [manifest_path(dataset(tmp_path)).name]


def test_without_write_nothing_is_written_at_all(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (32, 32))
    assert scan(dataset(tmp_path), write=False).ids == ["a.png"]
    assert not (tmp_path / "cache").exists()


def test_bad_files_are_named_and_counted_and_not_opened_again(tmp_path: Path, opened: list[str]):
    images = tmp_path / "images"
    add_image(images, "good.png", (32, 32))
    (images / "empty.png").write_bytes(b"")
    (images / "text1.jpg").write_text("hello")
    (images / "text2.jpg").write_text("hello")
    (images / "gone.png").symlink_to(images / "nowhere.png")
    Image.new("1", (20000, 20000)).save(images / "bomb.png")
    manifest = scan(dataset(tmp_path))
    assert manifest.ids == ["good.png"]
    assert manifest.problems == {
        "more than 178 megapixels (a decompression bomb?)": ("bomb.png",),
        "empty file": ("empty.png",),
        "cannot be opened: No such file or directory": ("gone.png",),
        "not an image that can be read": ("text1.jpg", "text2.jpg"),
    }
    opened.clear()
    assert scan(dataset(tmp_path)).problems == manifest.problems
    assert opened == ["gone.png"]  # the one whose trouble may have passed


def test_a_name_that_is_no_utf8_is_a_problem_not_a_crash(tmp_path: Path):
    add_image(tmp_path / "images", "good.png", (32, 32))
    os.rename(add_image(tmp_path / "images", "x.png", (32, 32)), os.fsencode(tmp_path / "images") + b"/caf\xe9.png")
    assert scan(dataset(tmp_path)).problems == {"its name is not UTF-8: rename it": ("caf\\xe9.png",)}


def test_limits_leave_images_out_by_name(tmp_path: Path):
    add_image(tmp_path / "images", "large.png", (64, 64))
    add_image(tmp_path / "images", "small.png", (31, 64))
    add_image(tmp_path / "images", "wide.png", (200, 64))
    manifest = scan(dataset(tmp_path, minimum_image_size=32, maximum_aspect_ratio=3.0))
    assert manifest.ids == ["large.png"]
    assert manifest.problems == {
        "smaller than minimum_image_size 32 (pixel)": ("small.png",),
        "wider than maximum_aspect_ratio 3": ("wide.png",),
    }
    assert scan(dataset(tmp_path)).rows.num_rows == 3  # limits are not kept in the manifest


def test_mistakes_are_one_line(tmp_path: Path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"^dataset 'pictures': instance_data_dir: no image in '.*images' \(.jpg .*\)$"):
        scan(dataset(tmp_path))
    add_image(tmp_path / "images", "a.png", (32, 32))
    add_image(tmp_path / "images", "b.png", (32, 32))
    (tmp_path / "images" / "c.png").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        scan(dataset(tmp_path, minimum_image_size=512))
    assert caught.value.lines == (
        "dataset 'pictures': every image is left out: 2 smaller than minimum_image_size 512 (pixel) (such as 'a.png'), "
        "1 not an image that can be read (such as 'c.png')",
    )


def test_a_deadline_returns_what_was_seen_and_keeps_no_half_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(40):
        add_image(tmp_path / "images", f"{number:02}.png", (8, 8))
    original, stuck = local.Local.open, threading.Event()

    def slow(self: local.Local, path: str) -> BinaryIO:
        if path >= "20":
            stuck.wait(30)
        return original(self, path)

    monkeypatch.setattr(local.Local, "open", slow)
    start = time.monotonic()
    manifest = scan(dataset(tmp_path), deadline_seconds=1.0)
    assert time.monotonic() - start < 5
    stuck.set()
    assert not manifest.complete
    assert manifest.ids == [f"{number:02}.png" for number in range(20)]
    assert not manifest_path(dataset(tmp_path)).exists()
    assert not scan(dataset(tmp_path), deadline_seconds=0.0).complete


def test_skip_file_discovery_trusts_the_last_scan(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (32, 32))
    skipping = dataset(tmp_path, skip_file_discovery=True)
    assert scan(skipping).ids == ["a.png"]
    add_image(tmp_path / "images", "b.png", (32, 32))
    assert scan(skipping).ids == ["a.png"]
    assert scan(dataset(tmp_path)).ids == ["a.png", "b.png"]


def test_a_damaged_manifest_is_made_anew(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (32, 32))
    scan(dataset(tmp_path))
    path = manifest_path(dataset(tmp_path))
    path.write_bytes(path.read_bytes()[:100])
    assert scan(dataset(tmp_path)).ids == ["a.png"]


def test_max_num_samples_is_a_stable_choice(tmp_path: Path):
    for number in range(20):
        add_image(tmp_path / "images", f"{number:02}.png", (8, 8))
    chosen = scan(dataset(tmp_path, max_num_samples=8)).ids
    assert len(chosen) == 8
    assert chosen == sorted(chosen) != [f"{n:02}.png" for n in range(8)]
    add_image(tmp_path / "images", "new.png", (8, 8))
    assert len(set(scan(dataset(tmp_path, max_num_samples=8)).ids) & set(chosen)) >= 7


def test_every_image_is_in_exactly_one_bucket(tmp_path: Path):
    for number, size in enumerate([(64, 64), (96, 64), (64, 96), (65, 64), (200, 130)]):
        add_image(tmp_path / "images", f"{number}.png", size)
    manifest = scan(dataset(tmp_path))
    buckets = assign(manifest)
    assert {bucket.name: [manifest.ids[row] for row in bucket.entries] for bucket in buckets} == {
        "64x64": ["0.png"] + ["3.png"],
        "64x96": ["2.png"],
        "96x64": ["1.png", "4.png"],
    }
    assert [len(bucket) for bucket in buckets] == [2, 1, 2]


def test_progress_counts(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (8, 8))
    told: list[tuple[int, int, str]] = []
    scan(dataset(tmp_path), progress=lambda *args: told.append(args))
    assert told == [(1, 1, "pictures: scanning")]
