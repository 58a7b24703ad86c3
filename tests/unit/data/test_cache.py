import fcntl
import os
from pathlib import Path

import pytest
import torch

from simpletuner.config.errors import UserError
from simpletuner.data.cache import Index, Reader, Store, digest, key_array, remove_stale, write_atomically


def filled(folder: Path) -> Store:
    store = Store(folder, "latents", "f" * 32)
    rows = {"mean": torch.arange(12.0).view(2, 2, 3), "std": torch.ones(2, 2, 3)}
    store.write(["a", "b", "c"], rows, ["a", "c"], {"b": "truncated or corrupt"})
    return store


def place(index: Index, key: str) -> int:
    (found,) = index.places(key_array([key])).tolist()
    return found


def test_rows_come_back_and_bad_keys_are_remembered(tmp_path: Path):
    store = filled(tmp_path)
    store.write(["d"], {"mean": torch.full((1, 2, 3), 7.0), "std": torch.zeros(1, 2, 3)}, ["d"], {})
    index = store.index()
    assert index.missing(key_array(["a", "x", "b", "c", "x", "d"])) == ["x"]
    assert index.bad == {"b": "truncated or corrupt"}
    reader = Reader(index)
    assert reader.row(place(index, "c"))["mean"].tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    assert reader.row(place(index, "d"))["mean"].unique().tolist() == [7.0]


def test_a_key_in_two_shards_is_read_from_the_first(tmp_path: Path):
    store = Store(tmp_path, "latents", "f" * 32)
    for value, planned in enumerate((["x", "a"], ["a", "y"], ["z"])):
        store.write(planned, {"mean": torch.full((len(planned), 1), float(value))}, planned, {})
    index = store.index()
    assert index.places(key_array(["b", "", "zz"])).tolist() == [-1, -1, -1]
    first = min(range(2), key=lambda number: digest(*(["x", "a"], ["a", "y"])[number]))
    assert Reader(index).row(place(index, "a"))["mean"].tolist() == [first]
    assert [Reader(index).row(place(index, key))["mean"].tolist() for key in "xyz"] == [[0.0], [1.0], [2.0]]
    assert Index().places(key_array(["a"])).tolist() == [-1]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path):
    (first,) = filled(tmp_path / "1").index().shards
    (second,) = filled(tmp_path / "2").index().shards
    assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())


def test_a_shard_of_bad_images_only_is_still_a_shard(tmp_path: Path):
    store = Store(tmp_path, "latents", "f" * 32)
    store.write(["a"], {}, [], {"a": "truncated or corrupt"})
    assert store.index().missing(key_array(["a"])) == []


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_damaged_shards_count_as_absent(tmp_path: Path, keep: int):
    store = filled(tmp_path)
    (path,) = store.index().shards
    path.write_bytes(path.read_bytes()[:keep])
    assert store.index().missing(key_array(["a", "b"])) == ["a", "b"]


def test_other_fingerprints_do_not_mix(tmp_path: Path):
    store = filled(tmp_path)
    other = Store(tmp_path, "latents", "f" * 12 + "0" * 20)  # the same folder, by a collision of the short names
    assert other.folder == store.folder
    assert other.index().missing(key_array(["a"])) == ["a"]
    assert Store(tmp_path, "latents", "e" * 32).index().missing(key_array(["a"])) == ["a"]


def test_reading_keeps_no_file_open(tmp_path: Path):
    store = Store(tmp_path, "latents", "f" * 32)
    for number in range(30):
        store.write([str(number)], {"mean": torch.zeros(1, 4)}, [str(number)], {})
    index = store.index()
    reader, before = Reader(index), len(os.listdir("/proc/self/fd"))
    for number in range(30):
        reader.row(place(index, str(number)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    def fail(file: object) -> None:
        raise ValueError("half-way")

    write_atomically(tmp_path / "x", lambda file: file.write(b"old"))
    with pytest.raises(ValueError, match="half-way"):
        write_atomically(tmp_path / "x", fail)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


def test_a_cache_folder_that_is_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"^cannot write the cache file '.*cache/x': "):
        write_atomically(tmp_path / "cache" / "x", lambda file: file.write(b""))


def test_temporary_files_of_dead_writers_go_and_those_of_live_ones_stay(tmp_path: Path):
    dead, live, young = (tmp_path / f".tmp-{name}" for name in ("dead", "live", "young"))
    for path in (dead, live, young):
        path.write_bytes(b"x")
    for path in (dead, live):
        os.utime(path, (0, 0))
    with live.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-live", ".tmp-young"]


def test_digests_tell_where_parts_end():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("a") == digest(b"a")
