"""One run at a time in an output_dir: a lock that dies with the process that holds it."""

import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.errors import UserError

FILE_NAME = ".simpletuner.lock"


@dataclass
class RunLock:
    """A held lock; it is released by ``release`` or by the end of the process, however that comes about."""

    path: Path
    _descriptor: int | None

    def release(self) -> None:
        """Lets another run have the folder; the file stays, as removing it would race with a run that has opened it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def hold(output_dir: Path) -> RunLock:
    """Returns the lock of the folder, which is made if it is not there.

    Raises:
        UserError: Another run holds it (its process id is named), or the file system has no locks.
    """
    path = output_dir / FILE_NAME
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"output_dir: {output_dir} cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise UserError(
            f"output_dir: {output_dir} is in use by another run ({holder or 'process unknown'}); "
            "wait for it, stop it, or choose another output_dir"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"output_dir: {output_dir} cannot be locked ({error.strerror}); choose a folder on a local disk"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode("ascii", "replace"), 0)
    lock = RunLock(path, descriptor)
    # A forked data loader worker that outlives a killed run would keep the folder locked through its copy.
    os.register_at_fork(after_in_child=lock.release)
    return lock
