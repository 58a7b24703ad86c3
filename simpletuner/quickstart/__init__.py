"""The embedded default: a tiny SDXL and a generator of captioned pictures, so that a first run needs no download."""

from pathlib import Path

from simpletuner import examples_folder

FOLDER = Path("output/quickstart")
"""Where the example's pictures and model are put, below the working directory: what its config names."""


def prepare() -> Path:
    """Draws the pictures and makes the model where they are missing; returns the path of the example's config."""
    from simpletuner.quickstart.drawing import draw
    from simpletuner.quickstart.model import write_model
    from simpletuner.quiet import quieten_libraries

    quieten_libraries()
    draw(FOLDER / "scenes")
    write_model(FOLDER / "model")
    return config_path()


def config_path() -> Path:
    """Returns the example's config."""
    return examples_folder() / "quickstart" / "config.json"
