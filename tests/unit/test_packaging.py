"""What pip installs: version, extras, torch for the machine, example configs; links and commands in the documents."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

import simpletuner
from simpletuner import registry

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "documentation").rglob("*.md")]


def test_the_installed_version_is_the_packages():
    assert version("simpletuner") == simpletuner.__version__


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, simpletuner; print(*(set(sys.modules) & {'torch', 'numpy', 'pydantic', 'yaml', 'typer', 'PIL'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_every_extra_that_an_error_names_exists():
    assert set(registry._EXTRAS.values()) <= set(PROJECT["optional-dependencies"])


def test_python_versions_agree_everywhere():
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert named == ["3.11", "3.12", "3.13"]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "venv.sh").read_text(encoding="utf8")


def test_torch_is_required_once_in_the_range_of_this_machine():
    required = [
        line for line in metadata("simpletuner").get_all("Requires-Dist") or [] if re.match(r"torch\b(?!-)", line)
    ]
    low, _, high = SETUP["TORCH"][SETUP["detect_platform"]()].removeprefix("torch").partition(",")
    assert len(required) == 1
    assert low in required[0]
    assert high in required[0]


@pytest.mark.parametrize(("command", "found"), [("nvidia-smi", "cuda"), ("rocminfo", "rocm"), (None, None)])
def test_the_platform_follows_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str | None, found: str | None
):
    if Path("/proc/driver/nvidia/version").exists() or Path("/opt/rocm").exists():
        pytest.skip("this machine has a GPU driver, which is seen without PATH")
    if command:
        (tmp_path / command).write_text("#!/bin/sh\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    is_apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    assert SETUP["detect_platform"]() == (found or ("apple" if is_apple else "cpu"))


def test_torch_comes_from_the_index_that_has_a_build_for_the_machine():
    index = "https://download.pytorch.org/whl"
    arguments = SETUP["torch_arguments"]
    assert arguments("cpu", "Linux") == ["torch==2.13.0", "--extra-index-url", f"{index}/cpu"]
    assert arguments("cpu", "Darwin") == arguments("apple", "Darwin") == arguments("cuda", "Linux") == ["torch==2.13.0"]


def test_rocm_is_asked_for_its_version(tmp_path: Path):
    (tmp_path / "version").write_text("7.1.1-38\n")
    assert SETUP["rocm_version"](tmp_path / "version") == "7.1"
    with pytest.raises(SystemExit, match="install torch for it first"):
        SETUP["rocm_version"](tmp_path / "missing")


def test_setup_names_torch_before_anything_is_installed():
    """venv.sh asks a bare Python: -I -S hides setuptools and all other packages."""
    command = [sys.executable, "-I", "-S", str(ROOT / "setup.py"), "torch"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(("torch==2.13.0", "torch>=2.8"))


def test_a_wheel_holds_the_example_configs_and_finds_them(tmp_path: Path):
    source = tmp_path / "source"
    for name in ("simpletuner", "config/examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        str(source),
    ]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], check=True, capture_output=True)
    installed = tmp_path / "installed"
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), installed, format="zip")
    code = "import simpletuner; print(simpletuner.examples_folder())"
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    folder = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert folder == str(installed / "simpletuner" / "examples")
    examples = ROOT / "config" / "examples"
    files = sorted(path.relative_to(examples) for path in examples.rglob("*") if path.is_file())
    assert files
    assert files == sorted(path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file())
    assert (installed / "simpletuner" / "py.typed").exists()
    teacher = Path("simpletuner/quickstart/teacher")
    files = sorted(path.relative_to(ROOT) for path in (ROOT / teacher).rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(installed) for path in (installed / teacher).rglob("*") if path.is_file())


def test_links_between_documents_lead_somewhere():
    broken = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf8"))
        if not (document.parent / link).exists()
    ]
    assert broken == []


def shell_lines() -> list[str]:
    blocks = (re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf8"), re.DOTALL) for path in DOCUMENTS)
    lines = (line.partition(" #")[0].strip() for texts in blocks for text in texts for line in text.splitlines())
    return sorted({line for line in lines if line and not line.startswith("#")})


def test_commands_in_the_documents_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE))
    lines = shell_lines()
    assert "bash train.sh" in lines
    assert "make test" in lines
    commands = {match[1] for line in lines if (match := re.match(r"(?:\w+=\S+ )*simpletuner (\w[\w-]*)", line))}
    known = subprocess.run([sys.executable, "-m", "simpletuner", "--help"], capture_output=True, text=True, check=True)
    for line in lines:
        if match := re.match(r"make (\w+)", line):
            assert match[1] in targets, line
        if match := re.match(r"(?:\w+=\S+ )*bash (\S+)", line):
            assert (ROOT / match[1]).exists(), line
    assert [command for command in sorted(commands) if not re.search(rf"\b{command}\b", known.stdout)] == []
