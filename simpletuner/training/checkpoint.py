"""Checkpoints: folders ``checkpoint-<step>`` of safetensors and JSON that are there whole or not at all.

    checkpoint-500/
        state.json                     format, step, size of each file, and the caller's state
        <group>.safetensors            the tensors of one group; a large one is cut into <group>.1.safetensors, ...

A folder is written under a hidden name, flushed to the disk and renamed; it is deleted by renaming it to a hidden name
first. So a process that is killed at any point leaves only complete folders under the real name. Nothing is pickled.
"""

import importlib.metadata
import itertools
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]  (its own types)
from torch import Tensor

from simpletuner.atomic import flush
from simpletuner.config.errors import UserError

FORMAT = 1
STATE_FILE = "state.json"
FILE_BYTES = 2**31
"""Largest file of a group, unless a tensor alone is larger: a GPU's state passes through that much host memory."""

_NAME = re.compile(r"checkpoint-(\d+)")
_WRITING, _DELETING = ".writing", ".deleting"

Json = Any  # Any: JSON is recursive (dict, list, str, int, float, bool, None)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as it was saved; the tensors are mapped from the files, so copy what is to be changed."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Json]


def save(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Json], keep: int | None
) -> Path:
    """Returns the folder of the new checkpoint, after the oldest ones above ``keep`` have been deleted.

    Args:
        root: The output_dir; one process at a time may save there.
        step: Finished optimizer steps; a checkpoint of the same step is replaced.
        tensors: Tensors by group and name; each group becomes a file. Kept bit for bit, in their dtypes.
        state: What else is needed to go on, as JSON.
        keep: How many checkpoints may stay, the new one included; None for all.
    """
    target = root / f"checkpoint-{step}"
    writing = _hidden(target, _WRITING)
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    for group, members in tensors.items():
        for number, part in enumerate(_parts(members)):
            path = writing / (f"{group}.{number}.safetensors" if number else f"{group}.safetensors")
            save_file(part, path)
            flush(path)
    files = {path.name: path.stat().st_size for path in sorted(writing.iterdir())}
    document = {"format": FORMAT, "step": step, "groups": list(tensors), "files": files, "state": dict(state)}
    path = writing / STATE_FILE
    path.write_text(json.dumps(document, indent=1), encoding="ascii")
    flush(path)
    flush(writing)
    if target.exists():
        target.rename(_hidden(target, _DELETING))
    writing.rename(target)
    flush(root)
    shutil.rmtree(_hidden(target, _DELETING), ignore_errors=True)
    if keep is not None:
        for old in _checkpoints(root)[: -max(1, keep)]:
            if old != target:
                _delete(old)
    return target


def clean(root: Path) -> None:
    """Removes what killed runs left half written or half deleted; call it at the start, while holding the folder."""
    for left in root.glob(f".checkpoint-*{_DELETING}"):
        target = root / left.name.removeprefix(".").removesuffix(_DELETING)
        # Killed between the two renames that replace a checkpoint: the old one is whole and the only one of its step.
        if _hidden(target, _WRITING).exists() and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left)
    for left in root.glob(f".checkpoint-*{_WRITING}"):
        shutil.rmtree(left)


def find(root: Path, wanted: str) -> Path | None:
    """Returns the checkpoint folder that ``resume_from_checkpoint`` names.

    Args:
        root: The output_dir.
        wanted: ``latest`` (None when there is none yet), a folder's name in root, or a path.

    Raises:
        UserError: The name or path is no checkpoint.
    """
    existing = _checkpoints(root)
    if wanted == "latest":
        return existing[-1] if existing else None
    for path in (root / wanted, Path(wanted).expanduser()):
        if (path / STATE_FILE).is_file():
            return path
    names = ", ".join(p.name for p in existing) or "none"
    raise UserError(f"resume_from_checkpoint: '{wanted}' is no checkpoint (in {root}: {names}; or 'latest')")


def load(path: Path) -> Loaded:
    """Returns a checkpoint's content.

    Raises:
        UserError: A file is missing, truncated or unreadable; the line names an older checkpoint to use instead.
    """
    try:
        document = json.loads((path / STATE_FILE).read_text(encoding="ascii"))
        if document["format"] != FORMAT:
            raise UserError(
                f"resume_from_checkpoint: {path} has format {document['format']}, this version reads {FORMAT}; "
                "resume with the version that wrote it (named in its state.json)"
            )
        for name, num_bytes in document["files"].items():
            if (actual := (path / name).stat().st_size) != num_bytes:
                raise ValueError(f"{name} has {actual} bytes, {num_bytes} were written")
        tensors: dict[str, dict[str, Tensor]] = {group: {} for group in document["groups"]}
        for name in document["files"]:
            tensors[_group(name)].update(load_file(path / name))
        return Loaded(path, document["step"], tensors, document["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        older = [p for p in _checkpoints(path.parent) if p.name != path.name and _step(p) < _step(path)]
        how = f"set resume_from_checkpoint to '{older[-1].name}'" if older else "no older checkpoint exists: start anew"
        raise UserError(f"resume_from_checkpoint: {path} is damaged ({error}); {how}") from error


def set_aside(root: Path, step: int) -> list[Path]:
    """Returns the checkpoints after ``step`` under their new names, ``abandoned-<step>``.

    Call it when a run goes on from an earlier checkpoint: else ``latest`` would later find the course that was left.
    They are not deleted, since nobody asked for that.
    """
    moved: list[Path] = []
    for path in _checkpoints(root):
        if _step(path) > step:
            target = root / f"abandoned-{_step(path)}"
            for number in itertools.count(2):
                if not target.exists():
                    break
                target = root / f"abandoned-{_step(path)}.{number}"
            moved.append(path.rename(target))
    return moved


def provenance() -> dict[str, Json]:
    """Returns what made a run: versions of the packages, and commit and dirty flag when the code is a git checkout."""
    packages = ("simpletuner", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")
    versions = {name: _version(name) for name in packages}
    return {"versions": {"python": platform.python_version(), **versions}, **_git(Path(__file__).resolve().parent)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Json]:
    def run(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into a venv inside somebody's own repository, the package would report that repository's commit.
    if run("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "dirty": None}
    changes = run("status", "--porcelain", "--untracked-files=no")
    return {"commit": run("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _parts(members: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors on the CPU, contiguous and each with its own memory, at most FILE_BYTES at a time."""
    part: dict[str, Tensor] = {}
    num_bytes = 0
    seen: set[int] = set()
    for name, tensor in members.items():
        if part and num_bytes + tensor.nbytes > FILE_BYTES:
            yield part
            part, num_bytes = {}, 0
            seen.clear()
        moved = tensor.detach().cpu().contiguous()
        storage = moved.untyped_storage()
        # safetensors refuses tensors that share memory: slices of a larger one, or one tensor under two names.
        part[name] = moved.clone() if storage.nbytes() != moved.nbytes or storage.data_ptr() in seen else moved
        seen.add(storage.data_ptr())
        num_bytes += tensor.nbytes
    yield part


def _group(file_name: str) -> str:
    return re.sub(r"(\.\d+)?\.safetensors$", "", file_name)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _checkpoints(root: Path) -> list[Path]:
    """Returns the checkpoint folders, oldest first."""
    return sorted((p for p in root.glob("checkpoint-*") if _step(p) >= 0 and p.is_dir()), key=_step)


def _hidden(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}{suffix}")


def _delete(path: Path) -> None:
    hidden = _hidden(path, _DELETING)
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)
