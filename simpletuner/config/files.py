"""Finds and parses config files; a mistake in a file is told with its line and column."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.fields import Json

CONFIG_NAMES = ("config.json", "config.toml")
BACKEND_NAMES = ("multidatabackend.json", "multidatabackend.toml")


@dataclass(frozen=True)
class Places:
    """Where a relative path is looked for: the working directory, then the config's own folder."""

    working_dir: Path
    config_dir: Path | None = None

    def candidates(self, path: str | Path) -> tuple[Path, ...]:
        """Returns the absolute paths that a written path can mean, best first."""
        folders = (self.working_dir, self.config_dir) if self.config_dir else (self.working_dir,)
        return tuple(dict.fromkeys(folder / Path(path).expanduser() for folder in folders))

    def find(self, path: str | Path) -> Path | None:
        """Returns the first candidate that exists."""
        return next((candidate for candidate in self.candidates(path) if candidate.exists()), None)

    def looked_at(self, path: str | Path) -> str:
        """Returns ``(looked at: ...)`` for an error."""
        return f"(looked at: {', '.join(map(str, self.candidates(path)))})"

    def written(self, path: str | Path) -> Path:
        """Returns the absolute path of something that the run writes: relative to the working directory."""
        return self.working_dir / Path(path).expanduser()


def default_config_path(environ: Mapping[str, str], root: Path) -> Path | None:
    """Returns the config of a run that names none: ``config/$ENV``, else ``config``; None where there is no file.

    A config that ``ENV`` names is returned even where it is missing, so that a misspelt name is an error and not
    another run. POSIX shells keep the path of a start-up file in ``ENV``: an absolute path to a file is not ours.
    """
    name = environ.get("ENV", "").strip()
    if name and not (Path(name).is_absolute() and not Path(name).is_dir()):
        return _config_in(root / "config" / name) or root / "config" / name / CONFIG_NAMES[0]
    return _config_in(root / "config")


def _config_in(folder: Path) -> Path | None:
    return next((folder / name for name in CONFIG_NAMES if (folder / name).is_file()), None)


def config_file(path: Path, places: Places) -> Path:
    """Returns the config file that a path means: the file itself, or the one in the folder.

    Raises:
        UserError: There is none.
    """
    found = places.find(path)
    if found is None:
        raise UserError(f"config: there is no '{path}'{_similar(path, places)} {places.looked_at(path)}")
    if not found.is_dir():
        return found
    file = _config_in(found)
    if file is None:
        raise UserError(f"config: the folder '{found}' has no {' or '.join(CONFIG_NAMES)}")
    return file


def _similar(path: Path, places: Places) -> str:
    """Returns the advice of the folder beside a missing one that has a config and nearly its name."""
    missing = path.parent if path.name in CONFIG_NAMES else path
    beside = (folder.parent.glob("*") for folder in places.candidates(missing))
    return suggestion(missing.name, (folder.name for folders in beside for folder in folders if _config_in(folder)))


def read_json(path: Path, key: str) -> Json:
    """Returns the content of a JSON file that an option names. Raises UserError."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"{key}: '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{key}: '{path}' is no JSON: {error}") from error


def parse(path: Path) -> Json:
    """Returns the content of a JSON or TOML file.

    Raises:
        UserError: The file cannot be read or is malformed, or an object has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not valid TOML: {error}") from error
    return _parse_json(path, text)


def _parse_json(path: Path, text: str) -> Json:
    twice: list[str] = []

    def pairs(items: list[tuple[str, Json]]) -> dict[str, Json]:
        keys = [key for key, _ in items]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1 and not is_comment(key)}))
        return dict(items)

    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {_hint(error)}") from error
    if twice:
        raise UserError(*(f"{path}: {key}: given twice; keep one of them" for key in twice))
    return value


def _hint(error: json.JSONDecodeError) -> str:
    """Returns what is wrong, in the words of the usual mistakes."""
    before, at = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if at[:1] in ("}", "]") and before.endswith(","):
        return "a comma before the closing bracket; delete it"
    if at[:1] == ",":
        return "a comma before the closing bracket, or two commas; delete it"
    if at[:1] == "'":
        return "text in single quotes; use double quotes"
    if at[:2] in ("//", "/*") or at[:1] == "#":
        return 'a comment; write it as a key with a leading underscore: "_comment": "..."'
    if not at:
        return "the file ends too early; a bracket or quote is not closed"
    if error.msg == "Expecting ',' delimiter":
        return "a comma is missing before this place"
    return error.msg


def is_comment(key: str) -> bool:
    """Whether a key holds a comment: ``_comment``, ``//``, ``# note``."""
    return key.lstrip("-").startswith(("_", "//", "#"))
