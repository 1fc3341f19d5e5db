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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..errors import UsageError

DOES = "trains it"
OTHER = "another name with --name NAME"
_held: set[Path] = set()  # by this process: the kernel would give it the same lock twice


@contextmanager
def owned(folder: Path, *, does: str = DOES, other: str = OTHER) -> Iterator[None]:
    """Own the run, or what else is written, in `folder`, which need not be there, until the block or the process ends.

    The lock is a POSIX record lock on the file .NAME.lock beside the folder, which names its owner. The kernel releases
    it with the process, also one that is killed; processes that load data do not inherit it; NFS keeps it for all its
    machines. A file system that has no locks is named on stderr, and the run goes on without.

    Args:
        does: what an owner does, in messages.
        other: what to choose instead, in messages.

    Raises:
        UsageError: another process owns the run, which the message names; or its place cannot be written to.
    """
    path = folder.parent.resolve() / f".{folder.name}.lock"
    if path in _held:
        raise UsageError(_taken(folder, f"this very process ({os.getpid()}) {does}", other))
    try:
        made = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(path, folder, does, other)
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


def _locked(path: Path, folder: Path, does: str, other: str) -> int:
    """A handle of the locked file, which must stay open."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, path, folder, does, other)
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


def _lock(handle: int, path: Path, folder: Path, does: str, other: str) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UsageError(_taken(folder, _owner(path, does), other)) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        print(
            f"{folder}: its file system has no locks ({error.strerror}), so nothing keeps a second process from this "
            "run: do not start another one of this name",
            file=sys.stderr,
            flush=True,
        )


def _owner(path: Path, does: str) -> str:
    """Who owns the run, as far as its file says."""
    for _ in range(20):  # it may be about to write it
        with suppress(OSError, ValueError, TypeError, KeyError):
            owner = json.loads(path.read_text())
            return f"process {owner['process']} on {owner['machine']} {does} since {owner['since']}"
        time.sleep(0.05)
    return f"another process {does} ({path} does not say which)"


def _taken(folder: Path, owner: str, other: str) -> str:
    return f"{folder} is in use: {owner}. Choose {other}, or wait for that process or stop it"


@contextmanager
def owned_by_all(folder: Path, state: Any, **words: str) -> Iterator[None]:
    """Own a folder for all processes of a group; where the first one cannot, each raises its UsageError.

    Args:
        state: accelerate's Accelerator or PartialState.
        words: as of `owned`.
    """
    with ExitStack() as stack:
        refusal = [""]
        if state.is_main_process:
            try:
                stack.enter_context(owned(folder, **words))
            except UsageError as error:
                refusal = [str(error)]
        broadcast_object_list(refusal)
        if refusal[0]:
            raise UsageError(refusal[0])
        yield
