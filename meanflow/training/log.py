"""The log of a run: log.jsonl, its trackers and a progress bar. Only the main process writes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from ..config import Config
from ..errors import UsageError
from ..files import check_regular, naming, parse_json, write_text
from .folder import RunFolder
from .state import is_number
from .trackers import start_trackers

REQUIRED = {"step", "loss"}  # of every row
SECONDS = 60.0  # between progress lines at most


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a log.jsonl; a last line cut short by a crash is left out.

    Raises:
        UsageError: another line is damaged, or it cannot be read.
    """
    try:
        check_regular(path)
        lines = path.read_bytes().splitlines() if os.path.lexists(path) else []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(map(is_number, row.values())) and _has_step(row):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{path}: line {number} is damaged; mend it or take it out")
    return rows


def _has_step(row: dict[str, Any]) -> bool:
    return row.keys() >= REQUIRED and isinstance(row["step"], int) and row["step"] >= 0


class RunLog:
    """Log of one process of a run that goes on after `step` steps.

    Args:
        folder: the run folder.
        step: steps done so far; rows of later steps, which a crashed run has written, are removed.
    """

    def __init__(self, folder: RunFolder, config: Config, accelerator: Accelerator, step: int) -> None:
        self.accelerator = accelerator
        self.name, self.steps, self.batch_size = config.run.name, config.optim.steps, config.optim.batch_size
        self.path = folder.log
        self.main = accelerator.is_main_process
        if self.main:
            kept = [row for row in read_log(self.path) if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        start_trackers(accelerator, config, folder, step)
        # On a terminal a bar; elsewhere (a pipe, a file) about ten lines a run, and one a minute.
        self.bar = tqdm(
            total=self.steps, initial=step, unit="step", desc=self.name, disable=None if self.main else True
        )
        self.plain = self.main and self.bar.disable
        self.line_every = max(1, self.steps // 10)
        self.next_line = step + self.line_every
        self.last_line = time.monotonic()

    def tick(self) -> None:
        """One more step is done."""
        self.bar.update()

    def write(self, row: dict[str, float]) -> None:
        """Log the means of the steps since the last row."""
        if self.main:
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))
        error = f", error {row['squared_error']:.4g}" if "squared_error" in row else ""
        summary = f"loss {row['loss']:.4f}{error}, {row['images_per_second']:.0f} images/s"
        self.bar.set_postfix_str(summary, refresh=False)
        if self.plain and (row["step"] >= self.next_line or time.monotonic() >= self.last_line + SECONDS):
            self.next_line = int(row["step"]) + self.line_every
            self.last_line = time.monotonic()
            left = (self.steps - row["step"]) * self.batch_size / max(row["images_per_second"], 1e-9)
            line = f"{self.name}: step {row['step']}/{self.steps}, {summary}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
