"""The prompts that are drawn while training: one of the config, a library of the user's, and a built-in one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.fields import Json
from simpletuner.config.files import read_json
from simpletuner.config.validation import ValidationSection, parse_resolutions

_KEYS = ("prompt", "negative_prompt", "guidance", "seed", "resolution")


@dataclass(frozen=True)
class Wish:
    """A prompt, and what is drawn otherwise than the config says; None: not otherwise."""

    prompt: str
    negative_prompt: str | None = None
    guidance: float | None = None
    seed: int | None = None
    sizes_px: tuple[tuple[int, int], ...] | None = None


def wishes(section: ValidationSection) -> list[Wish]:
    """Returns what to draw, each prompt once. Raises UserError for a library that cannot be read."""
    found = [Wish(section.validation_prompt)] if section.validation_prompt else []
    if section.user_prompt_library is not None:
        found += read_library(section.user_prompt_library)
    if section.validation_prompt_library:
        found += [Wish(prompt) for prompt in built_in_prompts()]
    first: dict[str, Wish] = {}
    for wish in found:
        first.setdefault(wish.prompt, wish)
    return list(first.values())


def built_in_prompts() -> list[str]:
    """Returns the prompts that come with the package."""
    return list(json.loads((files("simpletuner") / "prompts.json").read_text(encoding="utf8")).values())


def prompts_from(path: Path) -> list[str]:
    """Returns the prompts of a JSON library, of a text file with one a line, or of a folder's caption files.

    Raises:
        UserError: There is none, or the file cannot be read.
    """
    if path.suffix == ".json":
        return [wish.prompt for wish in read_library(path)]
    try:
        texts = [file.read_text(encoding="utf8") for file in (sorted(path.rglob("*.txt")) if path.is_dir() else [path])]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts-from: '{path}' cannot be read: {error}") from error
    found = list(dict.fromkeys(line.strip() for text in texts for line in text.splitlines() if line.strip()))
    if not found:
        raise UserError(f"--prompts-from: there is no prompt in '{path}': a .json library, lines of text, or captions")
    return found


def read_library(path: Path) -> list[Wish]:
    """Returns the prompts of a JSON file: short name -> prompt, or an object with the prompt and what else is wished.

    Raises:
        UserError: One line for each mistake in it.
    """
    library = read_json(path, "user_prompt_library")
    if not isinstance(library, dict) or not library:
        raise UserError(f'user_prompt_library: \'{path}\' is not of the form {{"name": "prompt", ...}}')
    problems: list[str] = []
    found = [_wish(entry, f"user_prompt_library: '{name}'", problems) for name, entry in library.items()]
    if problems:
        raise UserError(*problems)
    return [wish for wish in found if wish is not None]


def _wish(entry: Json, where: str, problems: list[str]) -> Wish | None:
    """Returns an entry of a library; None, and a problem for each mistake, where it will not do."""
    values: Mapping[str, Json] = (
        {"prompt": entry} if isinstance(entry, str) else entry if isinstance(entry, dict) else {}
    )
    mistakes = [f"{where}: unknown key '{key}'{suggestion(key, _KEYS)}" for key in values if key not in _KEYS]
    prompt, negative = values.get("prompt"), values.get("negative_prompt")
    guidance, seed, resolution = (values.get(key) for key in _KEYS[2:])
    if not isinstance(prompt, str) or not prompt.strip():
        mistakes.append(f"{where}: needs a prompt, as text or in an object")
    if negative is not None and not isinstance(negative, str):
        mistakes.append(f"{where}: negative_prompt: {json.dumps(negative)} is not text")
    if guidance is not None and (isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or guidance < 0):
        mistakes.append(f"{where}: guidance: {json.dumps(guidance)} is no number from 0 on")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        mistakes.append(f"{where}: seed: {json.dumps(seed)} is no whole number from 0 on")
    sizes = None
    try:
        sizes = parse_resolutions(str(resolution)) if resolution is not None else None
    except ValueError as error:
        mistakes.append(f"{where}: resolution: {error}")
    problems.extend(mistakes)
    if mistakes:
        return None
    return Wish(
        str(prompt).strip(),
        negative if isinstance(negative, str) else None,
        float(guidance) if isinstance(guidance, (int, float)) else None,
        seed if isinstance(seed, int) else None,
        sizes,
    )
