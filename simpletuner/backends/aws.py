"""Images, and caches, in a bucket of S3, or of a server that speaks its language; needs the package s3fs."""

import errno
import io
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import s3fs  # pyright: ignore[reportMissingImports]  (an extra)
from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingImports]

from simpletuner.backends._base import FileEntry, Owner, is_image, own_options, stamp
from simpletuner.config.backends import DatasetConfig, RemoteFolder
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Section, setting

_HEADER_BYTES = 1 << 16
"""What one request brings while a header is read: most headers are in the first."""
_PAGE = 1000
"""Objects that one request lists: as many as S3 gives."""


class Options(Section):
    """The keys of a dataset of this type, beside those that all datasets have."""

    aws_bucket_name: str = setting(..., "may_change", "The bucket.")
    aws_data_prefix: str = setting("", "may_change", "Folder in the bucket, with all folders below it.")
    aws_endpoint_url: str | None = setting(None, "free", "Server, where it is not Amazon's.")
    aws_region_name: str | None = setting(None, "free", "Region of the bucket.")
    aws_access_key_id: str | None = setting(None, "free", "Key. Default: what AWS's own variables and files say.")
    aws_secret_access_key: str | None = setting(None, "free", "Secret of the key.")
    aws_timeout_seconds: float = setting(60.0, "free", "How long to wait for an answer.", gt=0)
    aws_attempts: int = setting(5, "free", "How often to ask, with pauses that grow.", ge=1)


class Aws:
    """A bucket, or a folder in it: read in place; hidden files and folders are passed over."""

    def __init__(self, dataset: DatasetConfig) -> None:
        """Asks for nothing yet. Raises UserError when a key is wrong."""
        self._files, self._bucket, self._prefix = _open(dataset)
        self._where = f"dataset '{dataset.id}': aws_bucket_name"

    @staticmethod
    def files(remote: RemoteFolder) -> "Folder":
        """Returns a folder of a bucket to write in. Raises UserError when a key is wrong."""
        return Folder(remote)

    def list_images(self, fetch: bool = True) -> Iterator[FileEntry]:
        """Yields every image once, page by page. Raises UserError when the bucket cannot be listed."""
        for path, told in _listed(self._files, self._bucket, self._prefix, self._where):
            if is_image(path) and not any(part.startswith(".") for part in PurePosixPath(path).parts):
                yield FileEntry(path, int(told["Size"]), stamp(str(told["ETag"])))

    def open(self, path: str) -> BinaryIO:
        """Returns an image opened for reading; what is not read is not transferred. Raises OSError."""
        return io.BufferedReader(_Object(self._files, f"{self._bucket}/{self._prefix}{path}"), _HEADER_BYTES)

    def caption(self, path: str) -> str | None:
        """Returns the text object of the same name in UTF-8, None when there is none."""
        try:
            with _answers():
                name = f"{self._bucket}/{self._prefix}{PurePosixPath(path).with_suffix('.txt')}"
                content = cast(bytes, self._files.cat_file(name))
        except FileNotFoundError:
            return None
        return content.decode("utf-8-sig")


class Folder:
    """A folder of a bucket. A file of it is put by one request, so it is there whole or not at all."""

    def __init__(self, remote: RemoteFolder) -> None:
        """Asks for nothing yet. Raises UserError when a key is wrong."""
        self._files, self._bucket, prefix = _open(remote)
        self._prefix = f"{prefix}{remote.folder}/" if remote.folder else prefix
        self._where = f"dataset '{remote.id}': aws_bucket_name"

    def sizes(self) -> dict[str, int]:
        """Returns name -> bytes of all files below the folder. Raises UserError."""
        return {name: int(told["Size"]) for name, told in _listed(self._files, self._bucket, self._prefix, self._where)}

    def read(self, name: str) -> bytes:
        """Returns the content of a file. Raises UserError."""
        with self._told(f"'{name}' cannot be read"):
            return cast(bytes, self._files.cat_file(f"{self._bucket}/{self._prefix}{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file. Raises UserError."""
        with self._told(f"'{name}' cannot be written"):
            self._files.pipe_file(f"{self._bucket}/{self._prefix}{name}", content)

    @contextmanager
    def _told(self, what: str) -> Generator[None]:
        try:
            with _answers():
                yield
        except OSError as error:
            raise UserError(f"{self._where}: '{self._bucket}': {what}: {error.__cause__ or error}") from error


def _open(owner: Owner) -> tuple[Any, str, str]:  # Any: of an extra
    """Returns the files of S3, the bucket, and what the names in a folder of it begin with. Raises UserError."""
    own = own_options(owner, Options)
    if (own.aws_access_key_id is None) != (own.aws_secret_access_key is None):
        raise UserError(f"dataset '{owner.id}': aws_access_key_id, aws_secret_access_key: give both or none")
    folder = own.aws_data_prefix.strip("/")
    timeouts = {"connect_timeout": own.aws_timeout_seconds, "read_timeout": own.aws_timeout_seconds}
    files = s3fs.S3FileSystem(
        key=own.aws_access_key_id,
        secret=own.aws_secret_access_key,
        endpoint_url=own.aws_endpoint_url,
        client_kwargs={"region_name": own.aws_region_name} if own.aws_region_name else {},
        config_kwargs=timeouts | {"retries": {"max_attempts": own.aws_attempts, "mode": "standard"}},
        use_listings_cache=False,
    )
    return files, own.aws_bucket_name, f"{folder}/" if folder else ""


def _listed(files: Any, bucket: str, prefix: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:  # Any: as above
    """Yields the name of each object below a folder and what S3 tells of it, page by page. Raises UserError."""
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE}
    while True:
        try:
            with _answers():
                page = cast("dict[str, Any]", files.call_s3("list_objects_v2", **asked))
        except OSError as error:
            raise UserError(f"{where}: '{bucket}' cannot be listed: {error.__cause__ or error}") from error
        for told in page.get("Contents", ()):
            yield str(told["Key"]).removeprefix(prefix), told
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


class _Object(io.RawIOBase):
    """An object of a bucket, read range by range."""

    def __init__(self, files: Any, name: str) -> None:  # Any: of an extra
        with _answers():
            self._file = files.open(name, "rb", block_size=_HEADER_BYTES, cache_type="none")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # any buffer
        with _answers():
            data = cast(bytes, self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        with _answers():
            return cast(bytes, self._file.read())


@contextmanager
def _answers() -> Generator[None]:
    """Turns what the libraries raise into OSErrors whose reason is the same for all objects."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(errno.EREMOTEIO, type(error).__name__) from error
    except OSError as error:
        error.strerror = error.strerror or type(error).__name__
        raise


PLUGIN = Aws
