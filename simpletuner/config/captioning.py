"""What is done to captions before they are encoded: filters, and tags in another order."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from simpletuner.config.errors import UserError
from simpletuner.config.fields import Json, Section, setting
from simpletuner.config.files import Places, parse
from simpletuner.config.findings import Findings
from simpletuner.config.values import build_known

_SED = re.compile(r"s/((?:\\.|[^/\\])*)/((?:\\.|[^/\\])*)/([gi]*)", re.DOTALL)
_SLASH = r"\/"


class CaptionShuffle(Section):
    """Captions of tags in other orders, each of them a caption of its own."""

    enable: bool = setting(True, "may_change", "false: not at all.")
    count: int = setting(1, "may_change", "Orders of each caption, beside its own.", ge=1, le=64)
    split_on: Literal["comma", "space", "period"] = setting("comma", "may_change", "What stands between two tags.")
    position_start: int = setting(0, "may_change", "So many tags stay in front.", ge=0)
    include_original: bool = setting(True, "may_change", "Show the caption as it was written too.")
    seed: int = setting(0, "may_change", "Another one gives other orders.")


@dataclass(frozen=True)
class Filter:
    """A line of a filter list."""

    pattern: re.Pattern[str]
    replacement: str
    count: int
    """Places that are replaced; 0: all."""


@lru_cache(maxsize=4096)
def read_filter(line: str) -> Filter:
    """Returns what a line of a filter list does.

    A line is a regular expression, and what matches is removed. ``s/regex/replacement/`` replaces the first match,
    with ``g`` behind it all, with ``i`` in small and capital letters.

    Raises:
        ValueError: It is no regular expression, or begins like a replacement and is none.
    """
    expression, replacement, count, options = line, "", 0, 0
    if line.startswith("s/"):
        parts = _SED.fullmatch(line)
        if parts is None:
            raise ValueError("not of the form s/regex/replacement/, with g or i behind it or neither")
        expression, replacement = (part.replace(_SLASH, "/") for part in parts.groups()[:2])
        count = 0 if "g" in parts[3] else 1
        options = re.IGNORECASE if "i" in parts[3] else 0
    try:
        pattern = re.compile(expression, options)
        pattern.sub(replacement, "")  # reads the replacement too
    except (re.error, IndexError) as error:
        raise ValueError(f"no regular expression: {error} (a character stands for itself behind a \\)") from error
    return Filter(pattern, replacement, count)


def filtered(caption: str, lines: Iterable[str]) -> str:
    """Returns a caption with the filters applied one after the other; the gaps that they leave are closed."""
    changed = caption
    for line in lines:
        rule = read_filter(line)
        changed = rule.pattern.sub(rule.replacement, changed, rule.count)
    return caption if changed == caption else re.sub(r"[ \t]{2,}", " ", changed).strip()


def read_shuffle(values: dict[str, Json], where: str, findings: Findings) -> None:
    """Checks ``caption_shuffle``, an object or a switch, in place."""
    written = values.pop("caption_shuffle", False)
    if written in (False, "false"):
        return
    own = {} if written in (True, "true") else written
    if not isinstance(own, dict):
        example = '{"count": 3, "position_start": 1}'
        findings.problems.append(f"{where}: caption_shuffle: {json.dumps(written)} is no object, such as {example}")
        return
    values["caption_shuffle"] = build_known(CaptionShuffle, own, f"{where}: caption_shuffle.", findings).model_dump()


def resolve_filters(values: dict[str, Json], places: Places, where: str, findings: Findings) -> None:
    """Replaces ``caption_filter_list``, a list or the path of a text or JSON file, by its lines, in place."""
    if "caption_filter_list" not in values:
        return
    try:
        values["caption_filter_list"] = list[Json](_filter_lines(values["caption_filter_list"], places))
    except UserError as error:
        findings.problems.extend(f"{where}: caption_filter_list: {line}" for line in error.lines)
        del values["caption_filter_list"]


def _filter_lines(value: Json, places: Places) -> list[str]:
    """Returns the lines of a filter list, without comments. Raises UserError with a line for each that will not do."""
    origin, numbered = _read_list(value, places)
    kept: list[str] = []
    problems: list[str] = []
    for number, line in numbered:
        if not line.strip() or line.startswith("#"):
            continue
        try:
            read_filter(line.strip())
        except ValueError as error:
            problems.append(f"{origin}{number}: '{line.strip()}' is {error}")
        kept.append(line.strip())
    if problems:
        raise UserError(*problems)
    return kept


def _read_list(value: Json, places: Places) -> tuple[str, Iterator[tuple[int, str]]]:
    """Returns where the lines stand, for messages, and the lines with their numbers."""
    if not isinstance(value, (list, str)):
        raise UserError(f"{json.dumps(value)} is no list of texts, and no path of a file")
    origin, lines = "item ", value
    if isinstance(value, str):
        path = places.find(value)
        if path is None or not path.is_file():
            raise UserError(f"there is no file '{value}' {places.looked_at(value)}")
        origin = f"'{value}', line "
        lines = parse(path) if path.suffix == ".json" else _text(path).splitlines()
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise UserError(
            f"'{value}' is no list of texts" if isinstance(value, str) else "an item of the list is no text"
        )
    return origin, enumerate(map(str, lines), start=1)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not a text file in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
