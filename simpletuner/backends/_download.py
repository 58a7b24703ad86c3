"""Brings files from elsewhere into the cache: whole or not at all, within a limit, with time-outs and new attempts."""

import errno
import fcntl
import hashlib
import http.client
import logging
import os
import select
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from simpletuner.backends._shards import Shard
from simpletuner.config.errors import UserError, printable
from simpletuner.config.fields import Section, setting

_LOG = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_WORTH_ANOTHER_ATTEMPT = frozenset({408, 425, 429, 500, 502, 503, 504})
_USERS_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class DownloadOptions(Section):
    """The keys of a dataset whose files may be elsewhere."""

    max_download_gigabytes: float = setting(200.0, "free", "Room for downloads.", gt=0)
    download_timeout_seconds: float = setting(60.0, "free", "How long to wait for the next bytes.", gt=0)
    download_attempts: int = setting(3, "free", "How often to try a file.", ge=1)


class TooLarge(OSError):
    """A file above the limit of a single one."""


class Downloads:
    """A folder of downloaded files of one kind."""

    def __init__(
        self, folder: Path, options: DownloadOptions, what: str = "shard", suffix: str = ".tar", largest_bytes: int = 0
    ) -> None:
        """Names the folder; nothing is made before the first download.

        Args:
            folder: For these files alone.
            options: Limits of the folder and of patience.
            what: A file is; each shard is announced, other files are too many.
            suffix: Of the files.
            largest_bytes: Of a single file; 0: no limit.
        """
        self.folder, self._options, self._what, self._suffix = folder, options, what, suffix
        self._largest_bytes = largest_bytes
        self._lock = threading.Lock()
        self._taken_bytes: int | None = None

    def path(self, shard: Shard) -> Path:
        """Returns where a file is once it is downloaded; it stays there until someone deletes it."""
        return self.folder / f"{hashlib.blake2b(shard.id.encode(), digest_size=12).hexdigest()}{self._suffix}"

    def fetch(self, shard: Shard) -> Path:
        """Returns the path of a file, downloaded if it was not here.

        Raises:
            OSError: It cannot be had.
            UserError: It does not fit, or the folder cannot be written.
        """
        target = self.path(shard)
        if target.exists():
            return target
        with users_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part").open("ab")
        with part:
            fcntl.flock(part, fcntl.LOCK_EX)  # two processes that want the same file: the second finds it there
            if target.exists():
                return target
            try:
                self._attempts(shard, part)
                with users_errors(self.folder):
                    part.flush()
                    os.fsync(part.fileno())
                    Path(part.name).replace(target)
            finally:
                Path(part.name).unlink(missing_ok=True)
        return target

    def _attempts(self, shard: Shard, part: BinaryIO) -> None:
        """Fills the file. Raises OSError when the last attempt has failed."""
        aloud, last = self._what == "shard", self._options.download_attempts
        for attempt in range(1, last + 1):
            _LOG.log(logging.INFO if aloud else logging.DEBUG, "downloading %s", printable(shard.id))
            part.truncate(0)
            try:
                self._copy(shard, part)
            except OSError as error:
                code = error.code if isinstance(error, urllib.error.HTTPError) else 503
                if attempt == last or code not in _WORTH_ANOTHER_ATTEMPT or isinstance(error, TooLarge):
                    said = f"the {self._what} {shard.id} cannot be downloaded: {error}"
                    _LOG.log(logging.WARNING if aloud else logging.DEBUG, printable(said))
                    raise OSError(str(error)) from error
                time.sleep(min(30.0, 2.0 ** (attempt - 2)))
            else:
                return

    def _copy(self, shard: Shard, part: BinaryIO) -> None:
        opened = _command if shard.source.startswith("pipe:") else _url
        written = reserved = 0
        complete = False
        try:
            with opened(shard.source, self._options.download_timeout_seconds) as (stream, expected):
                reserved = self._reserve(expected or 0, 0, shard)
                while chunk := _read(stream):
                    written += len(chunk)
                    reserved = self._reserve(written, reserved, shard)
                    with users_errors(self.folder):
                        part.write(chunk)
                if expected is not None and written != expected:
                    raise OSError(f"the answer breaks off ({written} of {expected} bytes came)")
            complete = True
        finally:
            if not complete:
                with self._lock:
                    self._taken_bytes = (self._taken_bytes or 0) - reserved

    def _reserve(self, size: int, reserved: int, shard: Shard) -> int:
        """Returns how much of the folder a file of that size, or more, has to itself. Raises TooLarge, UserError."""
        if size <= reserved:
            return reserved
        if 0 < self._largest_bytes < size:
            raise TooLarge(f"larger than {self._largest_bytes / 1e6:g} MB")
        limit = self._options.max_download_gigabytes
        with self._lock:
            if self._taken_bytes is None:
                self._taken_bytes = sum(path.stat().st_size for path in self.folder.glob(f"*{self._suffix}"))
            if self._taken_bytes + size - reserved > limit * 1e9:
                raise UserError(
                    f"{self._what}s: '{shard.id}' does not fit into the {limit:g} GB of max_download_gigabytes "
                    f"with what is in '{self.folder}': raise it, or name fewer {self._what}s"
                )
            self._taken_bytes += size - reserved
        return size


@contextmanager
def users_errors(folder: Path) -> Generator[None]:
    """Turns a full disk or a folder that cannot be written, which no new attempt would change, into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in _USERS_ERRORS:
            raise UserError(f"cannot write downloads into '{folder}': {error.strerror}") from error
        raise


def _read(stream: _Readable) -> bytes:
    try:
        return stream.read(_CHUNK_BYTES)
    except http.client.HTTPException as error:
        raise OSError(f"the answer breaks off ({error})") from error


@contextmanager
def _url(url: str, timeout_seconds: float) -> Generator[tuple[_Readable, int | None]]:
    """Gives the body of a url and the length that it announces."""
    try:
        response = cast(http.client.HTTPResponse, _opener().open(url, timeout=timeout_seconds))
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no valid answer ({error})") from error
    with response:
        yield response, response.length


def _opener() -> urllib.request.OpenerDirector:
    """Returns an opener of http(s) only: a redirection cannot lead to ftp or to a file of this machine."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


class _Pipe:
    """The output of a command, which must not pause longer than the time-out."""

    def __init__(self, descriptor: int, timeout_seconds: float) -> None:
        self._descriptor, self._timeout_seconds = descriptor, timeout_seconds

    def read(self, size: int, /) -> bytes:
        if not select.select([self._descriptor], [], [], self._timeout_seconds)[0]:
            raise TimeoutError(f"the command wrote nothing for {self._timeout_seconds:g} s")
        return os.read(self._descriptor, size)


@contextmanager
def _command(source: str, timeout_seconds: float) -> Generator[tuple[_Readable, int | None]]:
    """Gives what a command writes; ``find_shards`` has refused it unless the user allowed commands."""
    command = source.removeprefix("pipe:").strip()
    process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    try:
        yield _Pipe(process.stdout.fileno(), timeout_seconds), None
        status = process.wait(timeout_seconds)
        if status:
            raise OSError(f"the command ended with status {status}")
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"the command did not end within {timeout_seconds:g} s of its output") from error
    finally:
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
            process.wait()
