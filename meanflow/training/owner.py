"""A run belongs to one process, or one group of processes, at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UsageError

_held: set[Path] = set()  # by this process: the kernel would give it the same lock twice


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the run in `folder`, which need not be there yet, until the block or the process ends, however it ends.

    The lock is a POSIX record lock on the file .NAME.lock beside the folder, which names its owner. The kernel releases
    it with the process, also one that is killed; processes that load data do not inherit it; NFS keeps it for all its
    machines. A file system that has no locks is named on stderr, and the run goes on without.

    Raises:
        UsageError: another process owns the run, which the message names; or its place cannot be written to.
    """
    path = folder.parent.resolve() / f".{folder.name}.lock"
    if path in _held:
        raise UsageError(_taken(folder, f"this very process ({os.getpid()}) trains it"))
    try:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(path, folder)
    except OSError as error:
        raise UsageError(f"{folder}: cannot write {error.filename or path}: {error.strerror}") from error
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)  # while it is locked: whoever has it open already looks again
        os.close(handle)
        if made:
            with suppress(OSError):  # not empty: the run is in it
                path.parent.rmdir()


def _locked(path: Path, folder: Path) -> int:
    """A handle of the locked file, which must stay open."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, path, folder)
            # an owner that has just ended took its file away, perhaps between the two lines above
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    owner = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%F %T")}
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, json.dumps(owner).encode(), 0)
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path, folder: Path) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UsageError(_taken(folder, _owner(path))) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        print(
            f"{folder}: its file system has no locks ({error.strerror}), so nothing keeps a second process from this "
            "run: do not start another one of this name",
            file=sys.stderr,
            flush=True,
        )


def _owner(path: Path) -> str:
    """Who owns the run, as far as its file says."""
    for _ in range(20):  # it may be about to write it
        with suppress(OSError, ValueError, TypeError, KeyError):
            owner = json.loads(path.read_text())
            return f"process {owner['process']} on {owner['machine']} trains it since {owner['since']}"
        time.sleep(0.05)
    return f"another process trains it ({path} does not say which)"


def _taken(folder: Path, owner: str) -> str:
    return f"{folder} is in use: {owner}. Choose another name with --name NAME, or wait for that process or stop it"
