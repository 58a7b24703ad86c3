"""``metadata_backend: parquet``: a table that says the names, sizes and captions of images, so that none is opened."""

import json
from pathlib import Path

from simpletuner.config.fields import Json, Section, setting
from simpletuner.config.files import Places
from simpletuner.config.findings import Findings
from simpletuner.config.values import build_known

SUFFIXES = (".parquet", ".jsonl", ".csv")


class ImageTable(Section):
    """A table with a row for each image: parquet, jsonl or csv."""

    path: Path = setting(..., "may_change", "The file: .parquet, .jsonl or .csv.")
    filename_column: str = setting("filename", "may_change", "Column of the paths below instance_data_dir.")
    width_column: str = setting("width", "may_change", "Column of the widths in pixels, after EXIF orientation.")
    height_column: str = setting("height", "may_change", "Column of the heights.")
    caption_column: tuple[str, ...] = setting(
        ("caption",), "may_change", "Columns of the captions, each with a text or a list of texts; all are taken."
    )
    fallback_caption_column: str | None = setting(None, "may_change", "Column for rows without any of these.")
    identifier_includes_extension: bool = setting(
        False, "may_change", "false: names that have no image's ending, none of them, get those of the files."
    )


def read_table(values: dict[str, Json], places: Places, where: str, findings: Findings) -> None:
    """Checks ``parquet``, the object that describes the table, in place."""
    written = values.pop("parquet", None)
    if str(values.get("metadata_backend", "")).strip().lower() != "parquet":
        if written is not None:
            findings.notices.append(f"{where}: parquet: has no effect without metadata_backend: parquet")
        return
    if not isinstance(written, dict):
        example = '{"path": "images.parquet", "filename_column": "filename"}'
        findings.problems.append(f"{where}: parquet: required by metadata_backend: parquet, such as {example}")
        return
    own = dict(written)
    if "path" in own:
        own["path"] = _file(own["path"], places, where, findings)
    values["parquet"] = build_known(ImageTable, own, f"{where}: parquet.", findings).model_dump(mode="json")


def _file(written: Json, places: Places, where: str, findings: Findings) -> Json:
    """Returns where the table is."""
    text = written if isinstance(written, str) else json.dumps(written)
    found = places.find(text)
    if found is None:
        findings.problems.append(f"{where}: parquet.path: there is no file '{text}' {places.looked_at(text)}")
    elif found.suffix.lower() not in SUFFIXES:
        findings.problems.append(f"{where}: parquet.path: '{text}' is none of {', '.join(SUFFIXES)}")
    return str(found or places.written(text))
