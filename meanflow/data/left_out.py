"""Images that cannot be read: the error that says why, and the record of those that a run left out."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

from tqdm import tqdm

from ..errors import UsageError

NAMED = 10  # images that are named on stderr, and in the words at the end
LISTED = 100  # in report.json


class UnreadableImage(UsageError):
    """A file, or a part of one, that is no image, is damaged, or has more than 8 bits a channel.

    path: where it is: its name in messages.
    reason: why, without the path.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"data: cannot read the image {path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # from a worker process


class LeftOut:
    """The unreadable images that a process has met, with the reason of each; another image stands in for each.

    reasons: by path, in the order in which they were met.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._taken = self._named = 0

    def add(self, path: str, reason: str) -> None:
        """One more; nothing if it is known."""
        self.reasons.setdefault(path, reason)

    def add_named(self, others: Iterable[tuple[str, str]]) -> None:
        """Those of all processes, each of which has named its own; or the same ones, of one process."""
        for path, reason in others:
            self.add(path, reason)
        self._named = len(self.reasons)

    def take(self) -> dict[str, str]:
        """Those since the last call, which a process that decodes images hands to the one that trains."""
        new = dict(islice(self.reasons.items(), self._taken, None))
        self._taken = len(self.reasons)
        return new

    def name_new(self) -> None:
        """Name on stderr those that have not been named; beyond the first ten they are only counted."""
        for path, reason in islice(self.reasons.items(), self._named, None):
            self._named += 1
            if self._named <= NAMED:
                tqdm.write(f"left out: {path}: {reason}", file=sys.stderr)
            elif self._named == NAMED + 1:
                tqdm.write("left out: more images, which are counted at the end", file=sys.stderr)

    def summary(self) -> str:
        """Their number and the first of them in words; "" where there are none."""
        count = len(self.reasons)
        if not count:
            return ""
        names = ", ".join(islice(self.reasons, NAMED)) + (", …" if count > NAMED else "")
        them = "1 image that cannot be read was" if count == 1 else f"{count} images that cannot be read were"
        return f"{them} left out, others of the same class in their places: {names}"

    def figures(self) -> dict[str, Any]:
        """As report.json has them; empty where there are none."""
        if not self.reasons:
            return {}
        return {"unreadable": {"count": len(self.reasons), "files": list(islice(self.reasons, LISTED))}}
