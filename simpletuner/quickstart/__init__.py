"""The embedded default: a small trained SDXL and a generator of captioned pictures, so that nothing is downloaded."""

import filecmp
import shutil
from pathlib import Path

from simpletuner import examples_folder

FOLDER = Path("output/quickstart")
"""Where the example's pictures and model are put, below the working directory: what its config names."""
TEACHER = Path(__file__).with_name("teacher")
"""The model as it comes with the package."""
_NUM_PICTURES = 1500
_MARK = "scores.json"
"""A file of the teacher's: where it is, the folder was laid out here."""


def prepare() -> Path:
    """Draws the pictures and lays out the model where they are missing; returns the path of the example's config."""
    from simpletuner.quickstart.drawing import draw

    draw(FOLDER / "pictures", _NUM_PICTURES)
    _lay_out(FOLDER / "teacher")
    return config_path()


def config_path() -> Path:
    """Returns the example's config."""
    return examples_folder() / "quickstart" / "config.json"


def _lay_out(folder: Path) -> None:
    """Copies the teacher into a folder, whole or not at all; that of another version gives way to it."""
    from simpletuner.atomic import new_folder

    if (folder / _MARK).is_file():
        names = [str(path.relative_to(TEACHER)) for path in TEACHER.rglob("*") if path.is_file()]
        if names == filecmp.cmpfiles(TEACHER, folder, names, shallow=False)[0]:
            return
        shutil.rmtree(folder)
    with new_folder(folder) as made:
        shutil.copytree(TEACHER, made, dirs_exist_ok=True)
