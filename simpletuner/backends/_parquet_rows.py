"""Rows of parquet files that stay where they are: a group of rows is read when one of them is asked for."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

_NUM_GROUPS = 8
"""Groups of rows that are held: the threads that read ahead are in two or three of them."""


class ParquetRows:
    """The rows of several files, one after the other, by number; as a ``datasets.Dataset`` gives them."""

    def __init__(self, files: Sequence[str], fingerprint: str) -> None:
        """Reads the end of each file, which says where its groups of rows are. Raises OSError, ValueError."""
        self._files, self._fingerprint = files, fingerprint
        self._metadata = [self._open(file).metadata for file in files]
        self._groups = [
            (file, group) for file, held in enumerate(self._metadata) for group in range(held.num_row_groups)
        ]
        counts = [self._metadata[file].row_group(group).num_rows for file, group in self._groups]
        self._ends = list(accumulate(counts))
        self._columns: list[str] | None = None
        self._held: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def column_names(self) -> list[str]:
        """The columns of the first file."""
        return list(self._metadata[0].schema.to_arrow_schema().names)

    def select_columns(self, names: list[str]) -> "ParquetRows":
        """Returns the rows with some columns only: others are not read."""
        chosen = object.__new__(ParquetRows)
        chosen.__dict__ = {**self.__dict__, "_columns": names, "_held": OrderedDict(), "_lock": threading.Lock()}
        return chosen

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns column -> value of a row. Raises OSError."""
        group = bisect_right(self._ends, row)
        start = self._ends[group - 1] if group else 0
        return self._group(group).slice(row - start, 1).to_pylist()[0]

    def _group(self, number: int) -> pa.Table:
        """Returns a group of rows, which one thread reads while the others that want it wait."""
        with self._lock:
            mine = number not in self._held
            future = self._held.setdefault(number, Future())
            self._held.move_to_end(number)
            while len(self._held) > _NUM_GROUPS:
                self._held.popitem(last=False)
        if mine:
            try:
                file, group = self._groups[number]
                opened = self._open(self._files[file], self._metadata[file])
                future.set_result(opened.read_row_group(group, columns=self._columns))
            except (OSError, pa.ArrowException) as error:
                with self._lock:
                    self._held.pop(number, None)
                future.set_exception(error if isinstance(error, OSError) else OSError(str(error)))
        return future.result()

    @staticmethod
    def _open(file: str, metadata: Any = None) -> pq.ParquetFile:  # Any: pyarrow's own
        return pq.ParquetFile(cast(Any, fsspec.open(file, "rb")).open(), metadata=metadata)
