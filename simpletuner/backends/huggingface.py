"""Images in a dataset of the hub, or in parquet and arrow files of this machine; needs the package datasets."""

import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import datasets  # pyright: ignore[reportMissingImports]  (an extra)
from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]

from simpletuner.backends._base import FileEntry, NotFetched, Unusable, own_options, stamp
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
    caption_column: str = setting("caption", "may_change", "Column of the captions: text, or a list of texts.")


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
            yield FileEntry(f"{self._options.split}/{number:08}", 1, version)

    def open(self, path: str) -> BinaryIO:
        """Returns an image opened for reading. Raises OSError, Unusable."""
        image = self._open()[0][_row(path)][self._options.image_column]
        if image is None:
            raise Unusable("row without image")
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        if "://" in str(image["path"]):
            raise Unusable("the dataset holds a url in place of the image: use the csv backend")
        return Path(image["path"]).open("rb")

    def caption(self, path: str) -> str | None:
        """Returns the caption of a row; of several, a line each."""
        captions = self._open()[1]
        if captions is None:
            return None
        found = captions[_row(path)][self._options.caption_column]
        return "\n".join(line for line in found if line) if isinstance(found, list) else found

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
                self._require(rows, "image_column")
                column, captions = self._options.image_column, None
                if self._dataset.caption_strategy == "textfile" and not self._dataset.only_instance_prompt:
                    self._require(rows, "caption_column")
                    captions = rows.select_columns([self._options.caption_column])
                images = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
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
            named = {"path": path.suffix.removeprefix("."), "data_files": {options.split: str(path)}}
        elif not path.exists():
            named |= {"name": options.dataset_config_name, "revision": options.revision}
        datasets.disable_progress_bars()
        return datasets.load_dataset(**named, split=options.split, cache_dir=str(self._prepared))

    def _require(self, rows: Rows, key: str) -> None:
        """Raises UserError when the dataset has no such column."""
        column, names = getattr(self._options, key), list(rows.column_names)
        if column not in names:
            raise UserError(
                f"{self._where}{key}: there is no column '{column}'{suggestion(column, names)} "
                f"(there are {', '.join(names)})"
            )


def _is_saved(path: Path) -> bool:
    """Returns whether a folder was written by ``save_to_disk``: it is read where it is."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _row(path: str) -> int:
    return int(path.rpartition("/")[2])


PLUGIN = HuggingFace
