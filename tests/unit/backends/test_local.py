import os
import sys
from pathlib import Path

import pytest

from simpletuner.backends._base import open_backend
from simpletuner.config.errors import UserError
from tests.unit.data.support import add_image, dataset


def listed(root: Path) -> list[str]:
    return [entry.path for entry in open_backend(dataset(root)).list_images()]


def test_lists_images_in_all_folders_and_nothing_else(tmp_path: Path):
    images = tmp_path / "images"
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp"):
        add_image(images, name, (8, 8))
    for name in (".hidden.png", "._a.jpg", ".git/x.png", "notes.md", "Thumbs.db"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"x")
    (images / "folder.png").mkdir()
    assert sorted(listed(tmp_path)) == ["a.jpg", "b.PNG", "deep/er/c.webp"]


def test_follows_links_once_and_ends_on_loops(tmp_path: Path):
    images = tmp_path / "images"
    add_image(images, "real/a.png", (8, 8))
    add_image(tmp_path / "elsewhere", "b.png", (8, 8))
    (images / "real" / "loop").symlink_to(images)
    (images / "again").symlink_to(images / "real")
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    assert sorted(listed(tmp_path)) == ["linked/b.png", "real/a.png"]


def test_a_pipe_named_like_an_image_does_not_block(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (8, 8))
    os.mkfifo(tmp_path / "images" / "pipe.png")
    assert listed(tmp_path) == ["a.png"]


def test_a_change_that_keeps_size_and_mtime_is_seen(tmp_path: Path):
    path = add_image(tmp_path / "images", "a.png", (8, 8))
    (before,) = open_backend(dataset(tmp_path)).list_images()
    stat = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (after,) = open_backend(dataset(tmp_path)).list_images()
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert after.size_bytes == before.size_bytes
    assert after.mtime_ns > before.mtime_ns


def test_missing_folder_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"^dataset 'pictures': instance_data_dir: there is no folder '.*images'$"):
        open_backend(dataset(tmp_path))


def test_reads_text_without_byte_order_mark(tmp_path: Path):
    add_image(tmp_path / "images", "a.png", (8, 8))
    (tmp_path / "images" / "a.txt").write_bytes(b"\xef\xbb\xbfa cat")
    backend = open_backend(dataset(tmp_path))
    assert backend.caption("a.png") == "a cat"
    assert backend.caption("b.png") is None


@pytest.mark.parametrize(
    ("kind", "package", "extra"), [("aws", "s3fs", "aws"), ("huggingface", "datasets", "datasets")]
)
def test_a_backend_without_its_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, extra: str
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"simpletuner.backends.{kind}", raising=False)
    with pytest.raises(
        UserError, match=rf"'{kind}' needs the package '{package}': pip install \"simpletuner\[{extra}\]\""
    ):
        open_backend(dataset(tmp_path, type=kind))
