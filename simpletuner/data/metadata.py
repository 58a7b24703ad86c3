"""The manifest of a dataset whose table says the names, sizes and captions of its images: none of them is opened.

The table is read when it has changed. The digests of the images that are in it as before are kept.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from simpletuner.backends._base import IMAGE_SUFFIXES, open_backend, stamp
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.metadata import ImageTable
from simpletuner.data.columns import Column, booleans, each
from simpletuner.data.columns import compute as pc

pa: Any = pyarrow  # its stubs refuse much of what it takes

TWICE = "named more than once in the table"
NO_SIZE = "without width and height in the table"
NO_FILE = "there is no image of that name"


def table_rows(dataset: DatasetConfig, schema: pyarrow.Schema, known: pyarrow.Table | None) -> pyarrow.Table:
    """Returns the rows of a manifest as a table says them, ordered by path.

    Args:
        dataset: Has a table.
        schema: Of the manifest.
        known: The manifest as it was; it is returned when the table has not changed since.

    Raises:
        UserError: The table cannot be read, or has not the columns that are named.
    """
    table = dataset.parquet
    assert table is not None
    with_captions = dataset.caption_strategy == "parquet"
    version = _version(table, with_captions)
    if known is not None and known.num_rows and known["mtime_ns"][0].as_py() == version:
        return known
    read = _read(table, with_captions, f"dataset '{dataset.id}': parquet")
    names = read[table.filename_column].cast(pa.string())
    read = read.set_column(read.schema.get_field_index(table.filename_column), "path", _completed(dataset, names))
    read = read.filter(pc.is_valid(read["path"])).sort_by("path").combine_chunks()
    width, height = (_size(read[name]) for name in (table.width_column, table.height_column))
    count = read.num_rows
    captions = _captions(table, read) if with_captions else pa.nulls(count, pa.string())
    columns = {
        "path": read["path"],
        "size_bytes": pa.array(np.zeros(count, np.int64)),
        "mtime_ns": pa.array(np.full(count, version)),
        "width": width,
        "height": height,
        "problem": _problems(read["path"], width, height),
        "digest": _digests(read["path"], width, height, known),
        "caption_ns": pa.array(np.full(count, version if with_captions else -1)),
        "caption": captions,
    }
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _version(table: ImageTable, with_captions: bool) -> int:
    """Returns what changes when the table, or what is read of it, does."""
    try:
        stat = table.path.stat()
    except OSError as error:
        raise UserError(f"parquet.path: '{table.path}' cannot be read: {error.strerror}") from error
    told = table.model_dump(mode="json")
    return stamp(f"{stat.st_size}/{max(stat.st_mtime_ns, stat.st_ctime_ns)}/{told}/{with_captions}")


def _read(table: ImageTable, with_captions: bool, where: str) -> Any:  # Any: of arrow
    """Returns the columns that are needed. Raises UserError."""
    keys = {key: getattr(table, key) for key in ("filename_column", "width_column", "height_column")}
    if with_captions:
        keys |= {f"caption_column {name}": name for name in table.caption_column}
        keys |= {"fallback_caption_column": table.fallback_caption_column} if table.fallback_caption_column else {}
    try:
        there, read = _opened(table.path)
        for key, name in keys.items():
            if name not in there:
                key = key.partition(" ")[0]
                others = f"{suggestion(name, there)} (there are {', '.join(there)})"
                raise UserError(f"{where}.{key}: there is no column '{name}'{others}")
        return read(list(dict.fromkeys(keys.values())))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}.path: '{table.path}' cannot be read: {str(error).partition(chr(10))[0]}") from error


def _opened(path: Path) -> tuple[list[str], Any]:  # Any: columns -> table
    """Returns the names of the columns, and what reads some of them."""
    if path.suffix.lower() == ".parquet":
        return list(pyarrow.parquet.read_schema(path).names), lambda names: pyarrow.parquet.read_table(
            path, columns=names
        )
    if path.suffix.lower() == ".csv":
        options = pyarrow.csv.ParseOptions(newlines_in_values=True)
        table = pyarrow.csv.read_csv(path, parse_options=options)
    else:
        table = pyarrow.json.read_json(path)
    return list(table.column_names), table.select


def _completed(dataset: DatasetConfig, names: Column) -> Column:
    """Returns the names with the endings of the files, where no name has one; null becomes null."""
    table = dataset.parquet
    assert table is not None
    if table.identifier_includes_extension or pc.any(_are_images(names)).as_py():
        return names
    listed = (entry.path for entry in open_backend(dataset).list_images())
    files = {path.rpartition(".")[0]: path for path in listed}
    return pa.chunked_array([[files.get(name, name) for name in each(names)]], pa.string())


def _size(column: Column) -> Column:
    """Returns whole numbers, 0 where there is none."""
    return pc.fill_null(pc.cast(column, pa.int32(), safe=False), 0)


def _captions(table: ImageTable, rows: Any) -> Column:  # Any: of arrow
    """Returns the captions of each row, a line each."""
    columns = [_lines(rows[name]) for name in table.caption_column]
    found = pc.binary_join_element_wise(*columns, "\n") if len(columns) > 1 else columns[0]
    if table.fallback_caption_column is not None:
        nothing = pc.equal(pc.utf8_trim_whitespace(found), "")
        found = pc.if_else(nothing, _lines(rows[table.fallback_caption_column]), found)
    return found


def _lines(column: Column) -> Column:
    """Returns texts, or lists of them a line each, as one text; "" where there is none."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.binary_join(pc.cast(column, pa.list_(pa.string())), "\n")
    return pc.fill_null(pc.cast(column, pa.string()), "")


def _problems(path: Column, width: Column, height: Column) -> Column:
    """Returns what is wrong with each row, "" for those that are right; paths are in order."""
    sized = booleans(pc.and_(pc.greater(width, 0), pc.greater(height, 0)))
    again = np.zeros(len(path), bool)
    if len(path) > 1:
        again[1:] = booleans(pc.equal(path[1:], path[:-1]))
    code = np.where(~booleans(_are_images(path)), 1, np.where(~sized, 2, np.where(again, 3, 0)))
    return pa.array(["", NO_FILE, NO_SIZE, TWICE]).take(pa.array(code))


def _are_images(names: Column) -> Column:
    """Returns which names are of images, as ``is_image`` does; null is none."""
    endings = "|".join(suffix.removeprefix(".") for suffix in sorted(IMAGE_SUFFIXES))
    return pc.fill_null(pc.match_substring_regex(names, rf"(?i)(^|/)[^./][^/]*\.({endings})$"), False)


def _digests(path: Column, width: Column, height: Column, known: pyarrow.Table | None) -> Column:
    """Returns the digests of images that are in the table as they were; "" for others."""
    if known is None:
        return pa.array([""]).take(pa.array(np.zeros(len(path), np.int64)))
    keys = ["path", "width", "height"]
    now = pa.table([path, width, height, pa.array(np.arange(len(path)))], [*keys, "order"])
    before = known.select([*keys, "digest"]).group_by(keys).aggregate([("digest", "max")])
    found = now.join(before, keys, join_type="left outer").sort_by("order")
    return pc.fill_null(found["digest_max"], "")
