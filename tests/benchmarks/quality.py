"""Measures how good the quickstart's result is, and puts what was found where people look for it.

Usage:

    python -m tests.benchmarks.quality

Trains the quickstart with three seeds, judges 512 prompts (``simpletuner evaluate --full``), and rewrites the table and
the picture at the top of README.md and the teacher's ``undistilled.json``. Finished runs are not made again.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from simpletuner.quickstart import FOLDER, TEACHER, config_path, prepare

ROOT = Path(__file__).parents[2]
PICTURE = Path("documentation/pictures/quickstart.png")
BEGIN, END = "<!-- quality -->\n", "<!-- /quality -->\n"


def main() -> None:
    """Trains, judges, and writes."""
    prepare()
    command = [sys.executable, "-m", "simpletuner", "evaluate", "--full", "--config", str(config_path())]
    subprocess.run(command, check=True)
    found = FOLDER / "run" / "evaluation"
    if (found / "undistilled.json").is_file():
        shutil.copyfile(found / "undistilled.json", TEACHER / "undistilled.json")
    (ROOT / PICTURE).parent.mkdir(exist_ok=True)
    shutil.copyfile(found / "contact_sheet.png", ROOT / PICTURE)
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text(encoding="utf8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    table = (found / "evaluation.md").read_text(encoding="utf8").partition("\n\n")[0]
    readme.write_text(f"{head}{BEGIN}{table}\n{END}{tail}", encoding="utf8")


if __name__ == "__main__":
    main()
