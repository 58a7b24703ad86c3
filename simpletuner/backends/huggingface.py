"""Images in a dataset of the hub, or in parquet and arrow files of this machine; needs the package datasets.

With ``streaming`` parquet files are read where they are, a group of rows at a time, and nothing is kept of them.
"""

import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import datasets  # pyright: ignore[reportMissingImports]  (an extra)
from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]
from datasets.packaged_modules.parquet.parquet import Parquet  # pyright: ignore[reportMissingImports]

from simpletuner.backends._base import FileEntry, NotFetched, Unusable, own_options, stamp
from simpletuner.backends._parquet_rows import ParquetRows
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError, suggestion
from simpletuner.config.fields import Section, setting

Rows: TypeAlias = Any
"""datasets.Dataset, which type checkers do not know where the extra is not installed."""


class Options(Section):
    """The keys of a dataset of this type, beside those that all datasets have."""

    dataset_name: str = setting(..., "may_change", "Name on the hub, or a folder or file of this machine.")
    dataset_config_name: str | None = setting(None, "may_change", "Configuration, where the dataset has several.")
    revision: str | None = setting(None, "may_change", "Branch, tag or commit on the hub.")
    split: str = setting("train", "may_change", "Which part of the dataset.")
    image_column: str = setting("image", "may_change", "Column of the images.")
    caption_column: tuple[str, ...] = setting(
        ("caption",), "may_change", "Columns of the captions, each with a text or a list of texts; `a.b` is b in a."
    )
    fallback_caption_column: str | None = setting(None, "may_change", "Column for rows without any of these.")
    streaming: bool = setting(False, "free", "Read parquet files where they are, and keep nothing of them.")

    @property
    def captions(self) -> tuple[str, ...]:
        """All columns that captions may come from."""
        return (*self.caption_column, *filter(None, (self.fallback_caption_column,)))


class HuggingFace:
    """The rows of one split; an image is known by its row number."""

    def __init__(self, dataset: DatasetConfig) -> None:
        """Opens nothing yet. Raises UserError when a key is wrong."""
        self._dataset, self._options = dataset, own_options(dataset, Options)
        self._where = f"dataset '{dataset.id}': "
        which = f"{self._path} {self._options.dataset_config_name} {self._options.revision}"
        self._prepared = dataset.files_folder / f"rows-{hashlib.blake2b(which.encode(), digest_size=6).hexdigest()}"
        self._lock = threading.Lock()
        self._opened: tuple[Rows, Rows, str] | None = None

    def list_images(self, fetch: bool = True) -> Iterator[FileEntry]:
        """Yields every row. Raises UserError when there is no such dataset, split or column."""
        if not fetch and not self._prepared.exists() and not _is_saved(self._path):
            raise NotFetched
        images, _, fingerprint = self._open()
        version = stamp(fingerprint)
        for number in range(len(images)):
            yield FileEntry(f"{self._options.split}/{number:08}", 1, version, version)

    def open(self, path: str) -> BinaryIO:
        """Returns an image opened for reading. Raises OSError, Unusable."""
        image: Any = self._open()[0][_row(path)][self._options.image_column]
        if isinstance(image, dict):  # a column that was written as one of images
            image = image["path"] if image["bytes"] is None else image["bytes"]
        if image is None:
            raise Unusable("row without image")
        if isinstance(image, bytes):
            return io.BytesIO(image)
        if "://" in str(image):
            raise Unusable("the dataset holds a url in place of the image: use the csv backend")
        return Path(str(image)).open("rb")

    def caption(self, path: str) -> str | None:
        """Returns the caption of a row; of several, a line each. Raises OSError."""
        rows, options = self._open()[1], self._options
        if rows is None:
            return None
        row = rows[_row(path)]
        found = [text for column in options.caption_column for text in _texts(row, column)]
        if not found and options.fallback_caption_column:
            found = _texts(row, options.fallback_caption_column)
        return "\n".join(found)

    @property
    def _path(self) -> Path:
        return self._dataset.instance_data_dir / self._options.dataset_name

    def _open(self) -> tuple[Rows, Rows, str]:
        """Returns the column of images, that of captions and what identifies them. Raises UserError.

        Captions are None where none is asked for.
        """
        with self._lock:
            if self._opened is None:
                try:
                    rows = self._load()
                except (OSError, ValueError, KeyError, DatasetsError) as error:
                    raise UserError(
                        f"{self._where}dataset_name: '{self._options.dataset_name}' cannot be read: "
                        f"{str(error).partition(chr(10))[0]}"
                    ) from error
                column, captions = self._options.image_column, None
                self._require(rows, "image_column", column)
                if self._dataset.caption_strategy == "textfile" and not self._dataset.only_instance_prompt:
                    names = [name.partition(".")[0] for name in self._options.captions]
                    for name in names:
                        self._require(rows, "caption_column", name)
                    captions = rows.select_columns(names)
                images = rows.select_columns([column])
                if not self._options.streaming:
                    images = images.cast_column(column, datasets.Image(decode=False))
                self._opened = images, captions, str(rows._fingerprint)  # pyright: ignore[reportPrivateUsage]
            return self._opened

    def _load(self) -> Rows:
        """Returns the rows of the split; what has to be downloaded or unpacked goes to the dataset's cache folder."""
        options, path = self._options, self._path
        if _is_saved(path):
            saved = datasets.load_from_disk(str(path))
            return saved[options.split] if isinstance(saved, datasets.DatasetDict) else saved
        named: dict[str, Any] = {"path": str(path) if path.exists() else options.dataset_name}
        if path.is_file():
            named = {
                "path": path.suffix.removeprefix(".").replace("jsonl", "json"),
                "data_files": {options.split: str(path)},
            }
        elif not path.exists():
            named |= {"name": options.dataset_config_name, "revision": options.revision}
        datasets.disable_progress_bars()
        if options.streaming:
            return self._stream(datasets.load_dataset_builder(**named, cache_dir=str(self._prepared)))
        return datasets.load_dataset(**named, split=options.split, cache_dir=str(self._prepared))

    def _stream(self, builder: Any) -> Rows:  # Any: of an extra
        """Returns the rows of the split where they are. Raises ValueError, OSError."""
        files = builder.config.data_files or {}
        if not isinstance(builder, Parquet):
            raise ValueError("streaming reads parquet files, and these are none; set streaming to false")
        if self._options.split not in files:
            raise ValueError(f"split: there is no '{self._options.split}' (there are {', '.join(map(str, files))})")
        own = files[self._options.split]
        return ParquetRows([str(file) for file in own], str(own.origin_metadata))

    def _require(self, rows: Rows, key: str, column: str) -> None:
        """Raises UserError when the dataset has no such column."""
        names = list(rows.column_names)
        if column not in names:
            raise UserError(
                f"{self._where}{key}: there is no column '{column}'{suggestion(column, names)} "
                f"(there are {', '.join(names)})"
            )


def _is_saved(path: Path) -> bool:
    """Returns whether a folder was written by ``save_to_disk``: it is read where it is."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _texts(row: dict[str, Any], column: str) -> list[str]:
    """Returns the texts of a column of a row; of ``a.b``, of what is called b in the object a."""
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return [str(text) for text in (value if isinstance(value, list) else [value]) if text]


def _row(path: str) -> int:
    return int(path.rpartition("/")[2])


PLUGIN = HuggingFace
