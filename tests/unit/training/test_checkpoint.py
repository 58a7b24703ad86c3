"""Checkpoint folders: whole or not there, kept bit for bit, and clear about damage."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpletuner.config.errors import UserError
from simpletuner.training import checkpoint

REPOSITORY = Path(__file__).parents[3]


def write(root: Path, *steps: int, keep: int | None = None) -> None:
    for step in steps:
        checkpoint.save(root, step, {"w": {"a": torch.full((100,), float(step))}}, {"n": step}, keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_every_dtype_and_shape_is_kept_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.randint(-(2**15), 2**15, (4, 6), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    base = torch.arange(24.0).view(4, 6)
    members = {
        "bf16": bits.view(torch.bfloat16),  # NaN payloads included
        "fp16": bits.view(torch.float16),
        "int16": bits,
        "fp64": torch.tensor(1 / 3, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "step": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": base.t(),
        "slice": base[1],
        "whole": base,
        "tied": base,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    path = checkpoint.save(tmp_path, 3, {"a": members, "none": {}}, {"x": [1, None, 0.1], "inf": float("inf")}, None)
    loaded = checkpoint.load(path)
    assert (loaded.step, loaded.state) == (3, {"x": [1, None, 0.1], "inf": float("inf")})
    assert loaded.tensors["none"] == {}
    assert loaded.tensors["a"].keys() == members.keys()
    for key, tensor in members.items():
        found = loaded.tensors["a"][key]
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert found.contiguous().view(-1).view(torch.uint8).tolist() == tensor.contiguous().view(-1).view(torch.uint8).tolist()  # fmt: skip  # noqa: E501


def test_a_large_group_is_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1000)
    members = {f"t.{i}": torch.full((100,), float(i)) for i in range(5)}
    path = checkpoint.save(tmp_path, 1, {"optimizer": members}, {}, None)
    assert names(path) == ["optimizer.1.safetensors", "optimizer.2.safetensors", "optimizer.safetensors", "state.json"]
    loaded = checkpoint.load(path).tensors["optimizer"]
    assert {key: value[0].item() for key, value in loaded.items()} == {f"t.{i}": float(i) for i in range(5)}


def test_the_oldest_are_deleted_by_number_and_the_newest_never(tmp_path: Path) -> None:
    write(tmp_path, 8, 9, 10, 11, keep=3)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    write(tmp_path, 12, keep=0)
    assert names(tmp_path) == ["checkpoint-12"]
    write(tmp_path, 5, keep=1)  # after going back to an older step
    assert "checkpoint-5" in names(tmp_path)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-best", "checkpoint-1-copy", "samples"):
        (tmp_path / name).mkdir()
    write(tmp_path, 1, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1-copy", "checkpoint-2", "checkpoint-best", "samples"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1)
    checkpoint.save(tmp_path, 1, {"w": {}}, {"n": "new"}, None)
    assert names(tmp_path) == ["checkpoint-1"]
    assert checkpoint.load(tmp_path / "checkpoint-1").state == {"n": "new"}


def test_find(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "latest") is None
    assert checkpoint.find(tmp_path / "not yet", "latest") is None
    write(tmp_path, 9, 10)
    assert checkpoint.find(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert checkpoint.find(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert checkpoint.find(tmp_path / "elsewhere", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    with pytest.raises(UserError, match=re.escape(f"'checkpoint-8' is no checkpoint (in {tmp_path}: checkpoint-9, ch")):
        checkpoint.find(tmp_path, "checkpoint-8")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def scrambled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncated, scrambled, missing])
@pytest.mark.parametrize("name", ["w.safetensors", "state.json"])
def test_damage_is_one_line_that_names_an_older_checkpoint(tmp_path: Path, damage, name: str) -> None:  # noqa: ANN001
    write(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoint-3" / name)
    newest = checkpoint.find(tmp_path, "latest")
    assert newest is not None
    with pytest.raises(UserError) as raised:
        checkpoint.load(newest)
    (line,) = raised.value.lines
    assert "\n" not in line
    assert line.startswith(f"resume_from_checkpoint: {tmp_path / 'checkpoint-3'} is damaged (")
    assert line.endswith("set resume_from_checkpoint to 'checkpoint-2'")
    damage(tmp_path / "checkpoint-1" / name)
    with pytest.raises(UserError, match="no older checkpoint exists: start anew"):
        checkpoint.load(tmp_path / "checkpoint-1")


def test_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        checkpoint.load(tmp_path / "checkpoint-1")


def test_the_course_that_was_left_is_set_aside(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 10)
    assert checkpoint.set_aside(tmp_path, 10) == []
    assert checkpoint.set_aside(tmp_path, 1) == [tmp_path / "abandoned-2", tmp_path / "abandoned-10"]
    write(tmp_path, 2)
    assert checkpoint.set_aside(tmp_path, 0) == [tmp_path / "abandoned-1", tmp_path / "abandoned-2.2"]
    assert checkpoint.find(tmp_path, "latest") is None
    assert checkpoint.load(tmp_path / "abandoned-10").step == 10
    assert checkpoint.find(tmp_path, "abandoned-10") == tmp_path / "abandoned-10"


def test_a_failed_write_leaves_the_old_checkpoint_and_no_half_one(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, {"w": {"a": torch.zeros(1)}}, {"x": object()}, None)
    assert checkpoint.find(tmp_path, "latest") == tmp_path / "checkpoint-1"
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.deleting")
    (tmp_path / ".checkpoint-2.writing").mkdir()
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert checkpoint.load(tmp_path / "checkpoint-2").state == {"n": 2}


def test_a_process_killed_at_random_points_leaves_only_loadable_checkpoints(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.training.killed_while_saving", str(tmp_path), "0"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_saved, num_left_over = (int(word) for word in done.stdout.split())
    assert num_saved > 5  # the children got somewhere,
    assert num_left_over > 0  # and were hit in the middle of writing


def test_provenance_names_versions_and_the_commit() -> None:
    found = checkpoint.provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"python", "simpletuner", "diffusers", "peft", "accelerate"}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert found["dirty"] in ((True, False) if found["commit"] else (None,))


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = checkpoint.provenance()
    assert (found["commit"], found["dirty"]) == (None, None)
    assert found["versions"]["torch"] == torch.__version__
