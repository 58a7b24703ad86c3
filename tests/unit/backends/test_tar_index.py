"""What a damaged or hostile tar file costs: what it hit, counted by name."""

import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from simpletuner.backends import _tar_index as tar
from simpletuner.backends._base import Unusable, open_backend
from simpletuner.config.errors import UserError
from simpletuner.data.manifest import scan
from tests.unit.backends.shards import add_member, image_bytes, samples, scanned, shards, write_shard


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
                ours[sample.key] = (file.read(), backend.caption(f"a.tar/{sample.name}") or "")
    assert len(reference) == 4
    assert ours == reference


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


def test_open_names_the_reason(tmp_path: Path):
    path = write_shard(tmp_path / "shards" / "a.tar", {"0.png": image_bytes((64, 64))})
    os.truncate(path, 600)
    with pytest.raises(Unusable, match=f"^{tar.CUT_OFF}$"):
        open_backend(shards(tmp_path)).open("a.tar/0.png")
