"""Few-step distillation and fine-tuning of diffusion models, from two JSON files."""

from pathlib import Path

__version__ = "0.1.0"


def examples_folder() -> Path:
    """Returns the folder of the example runs: config/examples of the checkout, or its copy in an installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "config" / "examples"
    return checkout if checkout.is_dir() else package / "examples"
