"""Files that appear whole or not at all."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.atomic import files_into, new_folder


def test_files_appear_at_the_end_and_keep_their_subfolders(tmp_path: Path) -> None:
    with files_into(tmp_path / "a") as made:
        (made / "scheduler").mkdir()
        (made / "scheduler" / "config.json").write_text("{}")
        assert [path.name for path in (tmp_path / "a").rglob("*.json") if ".writing-" not in str(path)] == []
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "a",
        "a/scheduler",
        "a/scheduler/config.json",
    ]


def test_after_an_exception_there_is_nothing_new(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("old")

    def fail(context: Any, place: Path) -> None:
        with context(place) as made:
            (made / "kept.txt").write_text("new")
            raise ZeroDivisionError

    for context, place in ((files_into, tmp_path), (new_folder, tmp_path / "new")):
        with pytest.raises(ZeroDivisionError):
            fail(context, place)
    assert {path.name: path.read_text() for path in tmp_path.rglob("*")} == {"kept.txt": "old"}


def test_weights_can_be_read_by_other_programs(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with files_into(tmp_path / "a") as made:
            save_file({"x": torch.zeros(1)}, made / "x.safetensors")
        with new_folder(tmp_path / "b") as made:
            save_file({"x": torch.zeros(1)}, made / "x.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644
