"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context in which an OSError that names no file, as that of a full disk does not, gets the name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path of the same suffix to write to, which becomes `path` at the end of the block.

    `path` never holds half a file; where the block raises it is as before, and nothing else is left.
    """
    path = path.resolve()  # what a link points to
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with naming(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path, *names: str) -> None:
    """Remove what `replaced` left of the files `names` in `folder` where a process was killed in it."""
    for path in map(Path, names):
        for partial in folder.glob(f".{path.stem}.*.partial{path.suffix}"):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file at once."""
    with replaced(path) as partial:
        partial.write_text(text)
