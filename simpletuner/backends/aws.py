"""Images in a bucket of S3, or of a server that speaks its language; needs the package s3fs."""

import errno
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import s3fs  # pyright: ignore[reportMissingImports]  (an extra)
from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingImports]

from simpletuner.backends._base import FileEntry, is_image, own_options
from simpletuner.config.backends import DatasetConfig
from simpletuner.config.errors import UserError
from simpletuner.config.fields import Section, setting

_HEADER_BYTES = 1 << 16
"""What is read ahead of what was asked for: most headers are in the first request."""


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
        own = own_options(dataset, Options)
        if (own.aws_access_key_id is None) != (own.aws_secret_access_key is None):
            raise UserError(f"dataset '{dataset.id}': aws_access_key_id, aws_secret_access_key: give both or none")
        self._where = f"dataset '{dataset.id}': aws_bucket_name"
        self._root = f"{own.aws_bucket_name}/{own.aws_data_prefix.strip('/')}".strip("/")
        timeouts = {"connect_timeout": own.aws_timeout_seconds, "read_timeout": own.aws_timeout_seconds}
        self._files = s3fs.S3FileSystem(
            key=own.aws_access_key_id,
            secret=own.aws_secret_access_key,
            endpoint_url=own.aws_endpoint_url,
            client_kwargs={"region_name": own.aws_region_name} if own.aws_region_name else {},
            config_kwargs=timeouts | {"retries": {"max_attempts": own.aws_attempts, "mode": "standard"}},
            use_listings_cache=False,
        )

    def list_images(self, fetch: bool = True) -> Iterator[FileEntry]:
        """Yields every image once. Raises UserError when the bucket cannot be listed."""
        try:
            with _answers():
                found = cast("dict[str, dict[str, Any]]", self._files.find(self._root, detail=True))
        except OSError as error:
            raise UserError(f"{self._where}: 's3://{self._root}' cannot be listed: {error.strerror}") from error
        for name, told in found.items():
            path = name.removeprefix(f"{self._root}/")
            if is_image(path) and not any(part.startswith(".") for part in PurePosixPath(path).parts):
                yield FileEntry(path, int(told["size"]), _stamp(told))

    def open(self, path: str) -> BinaryIO:
        """Returns an image opened for reading; what is not read is not transferred. Raises OSError."""
        with _answers():
            return cast(BinaryIO, self._files.open(f"{self._root}/{path}", "rb", block_size=_HEADER_BYTES))

    def caption(self, path: str) -> str | None:
        """Returns the text object of the same name in UTF-8, None when there is none."""
        try:
            with _answers():
                content = cast(bytes, self._files.cat_file(f"{self._root}/{PurePosixPath(path).with_suffix('.txt')}"))
        except FileNotFoundError:
            return None
        return content.decode("utf-8-sig")


def _stamp(told: dict[str, Any]) -> int:
    """Returns a number that changes with the content: S3 counts time in seconds, and its tag is a digest."""
    return int.from_bytes(str(told.get("ETag", told.get("LastModified"))).encode()[-8:], "little") >> 1


@contextmanager
def _answers() -> Generator[None]:
    """Turns what the libraries raise into OSErrors that have a reason."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(errno.EREMOTEIO, str(error)) from error
    except OSError as error:
        if error.strerror is None:
            error.strerror = str(error)
        raise


PLUGIN = Aws
