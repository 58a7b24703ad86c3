"""Few-step distillation and fine-tuning of diffusion models, from two JSON files."""

from pathlib import Path

__version__ = "0.1.0"


def examples_folder() -> Path:
    """Returns the folder of the example runs: the installed package's copy, or config/examples of the checkout."""
    package = Path(__file__).resolve().parent
    copy = package / "examples"
    return copy if copy.is_dir() else package.parent / "config" / "examples"
