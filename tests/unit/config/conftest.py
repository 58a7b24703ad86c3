"""A run's two files in a temporary folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config import Config, UserError, load

MINIMAL = {"model_family": "sdxl", "pretrained_model_name_or_path": "some/model", "max_train_steps": 10}
IMAGES = {"id": "images", "instance_data_dir": "images"}


@dataclass(frozen=True)
class Run:
    """Writes and loads a run in a folder of its own; the working directory is another folder."""

    folder: Path
    working_dir: Path

    def load(
        self,
        config: Mapping[str, Any] | str = {},
        backend: Any = (IMAGES,),
        overrides: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Loads ``config`` over MINIMAL, or a whole file's text, with the entries of the data backend file."""
        text = config if isinstance(config, str) else json.dumps({**MINIMAL, **config})
        (self.folder / "config.json").write_text(text, encoding="utf8")
        (self.folder / "multidatabackend.json").write_text(
            backend if isinstance(backend, str) else json.dumps(backend), encoding="utf8"
        )
        return load(self.folder, overrides or {}, environ or {}, self.working_dir)

    def problems(self, *args: Any, **kwargs: Any) -> list[str]:
        """Returns the lines of the error that loading raises."""
        with pytest.raises(UserError) as caught:
            self.load(*args, **kwargs)
        assert all("\n" not in line for line in caught.value.lines)
        return list(caught.value.lines)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "run", tmp_path / "here")
    (made.folder / "images").mkdir(parents=True)
    made.working_dir.mkdir()
    return made
