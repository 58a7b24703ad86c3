"""Adds to pyproject.toml what depends on the machine: the range of torch, and the example configs in a built package.

``python setup.py torch`` prints the arguments with which pip installs the right torch; venv.sh hands them on.
A wheel keeps the range of the machine that built it, so publish the source distribution.
"""

import platform
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

DEPENDENCIES = [
    "accelerate>=1.15,<2",
    "diffusers>=0.42.1,<1",
    "huggingface_hub>=2.4,<3",
    "jinja2>=3.1,<4",
    "numpy>=2",
    "optimum-quanto>=0.2.7,<1",
    "peft>=0.21.2,<1",
    "pillow>=12",
    "pyarrow>=22",
    "pydantic>=2.12,<3",
    "pyyaml>=6",
    "rich>=14",
    "safetensors>=0.8",
    "tokenizers>=0.22",
    "torch-optimi>=0.3.3,<1",
    "transformers>=5.23,<6",
    "typer>=0.29",
]

TORCH = {
    "cuda": "torch>=2.8,<3",
    "rocm": "torch>=2.8,<3",
    "apple": "torch>=2.8,<3",
    # The newest release that is tested. On Linux a newer one would come from PyPI as a CUDA build, several GB of
    # libraries that such a machine cannot use.
    "cpu": "torch>=2.8,<2.14",
}

TESTED_TORCH = "torch==2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl"


def detect_platform() -> str:
    """Returns "cuda", "rocm", "apple" or "cpu"; looks only at files and at PATH, so it is quick and cannot fail."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "cuda"
    if Path("/opt/rocm").exists() or shutil.which("rocminfo"):
        return "rocm"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "apple"
    return "cpu"


def rocm_version(version_file: Path = Path("/opt/rocm/.info/version")) -> str:
    """Returns "major.minor" of the installed ROCm.

    Raises:
        SystemExit: It is not written where ROCm's packages write it.
    """
    try:
        return ".".join(version_file.read_text(encoding="utf8").strip().split(".")[:2])
    except OSError as error:
        raise SystemExit(
            f"ROCm is here, but {version_file} is not: install torch for it first (https://pytorch.org/get-started)"
        ) from error


def torch_arguments(machine: str, system: str) -> list[str]:
    """Returns pip's arguments for a new torch: the index with builds for the machine, where PyPI has another one."""
    if machine == "rocm":
        return [TORCH["rocm"], "--index-url", f"{TORCH_INDEX}/rocm{rocm_version()}"]
    if machine == "cpu" and system == "Linux":
        return [TESTED_TORCH, "--extra-index-url", f"{TORCH_INDEX}/cpu"]
    return [TESTED_TORCH]


def _setup() -> None:
    # setuptools is here only when pip builds; `python setup.py torch` must run before anything is installed.
    from setuptools import setup
    from setuptools.command.build_py import build_py

    class BuildWithExamples(build_py):
        """Copies config/examples into the package; a checkout reads them where they are."""

        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                target = Path(self.build_lib) / "simpletuner" / "examples"
                shutil.copytree(ROOT / "config" / "examples", target, dirs_exist_ok=True)

    setup(
        install_requires=[TORCH[detect_platform()], *DEPENDENCIES],
        cmdclass={"build_py": BuildWithExamples},
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["torch"]:
        print(*torch_arguments(detect_platform(), platform.system()))
    else:
        _setup()
