"""Columns of arrow tables, as numpy arrays and as texts of Python."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute

compute: Any = pyarrow.compute  # its stubs refuse much of what it takes
Column = Any
"""An array or a chunked array, of which the stubs know too little."""

_PART = 65536


def strings(table: pyarrow.Table, name: str) -> list[str]:
    """Returns a text column."""
    return cast("list[str]", table[name].to_pylist())


def each(column: Column, rows: npt.NDArray[np.int64] | None = None) -> Iterator[str]:
    """Yields the texts of a column, of some rows if not of all; only a part of them is in Python's memory at once."""
    for start in range(0, len(column) if rows is None else len(rows), _PART):
        part = slice(start, start + _PART)
        yield from column[part].to_pylist() if rows is None else column.take(pyarrow.array(rows[part])).to_pylist()


def cell(table: pyarrow.Table, name: str, row: int) -> str:
    """Returns one text."""
    column: Column = table[name]
    return cast(str, column[row].as_py())


def integers(table: pyarrow.Table, name: str) -> npt.NDArray[np.int64]:
    """Returns a number column."""
    return np.asarray(table[name].to_numpy(), dtype=np.int64)


def booleans(column: Column) -> npt.NDArray[np.bool_]:
    """Returns a column of truths without nulls."""
    chunks = column.chunks if isinstance(column, pyarrow.ChunkedArray) else [column]
    return np.concatenate([np.zeros(0, bool), *(chunk.to_numpy(zero_copy_only=False) for chunk in chunks)])
