"""What a run says while it trains: log.jsonl, TensorBoard and a progress bar. Only the main process writes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from ..errors import UsageError
from ..files import naming, write_text
from .config import TrainConfig

PLOTTED = ("step", "loss", "squared_error")  # what every row has
SECONDS = 60.0  # between progress lines at most


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a log.jsonl; a last line cut short by a crash is left out.

    Raises:
        UsageError: another line is damaged.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in PLOTTED):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{path}: line {number} is damaged; mend it or take it out")
    return rows


class RunLog:
    """Log of one process of a run that goes on after `step` steps.

    Args:
        folder: the run folder.
        step: steps done so far; rows of later steps, which a crashed run has written, are removed.
    """

    def __init__(self, folder: Path, config: TrainConfig, accelerator: Accelerator, step: int) -> None:
        self.accelerator, self.config = accelerator, config
        self.path = folder / "log.jsonl"
        self.main = accelerator.is_main_process
        if self.main:
            kept = [row for row in read_log(self.path) if row["step"] <= step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if config.tensorboard:
            accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        # On a terminal a bar; elsewhere (a pipe, a file) about ten lines a run, and one a minute.
        self.bar = tqdm(
            total=config.steps, initial=step, unit="step", desc=config.name, disable=None if self.main else True
        )
        self.plain = self.main and self.bar.disable
        self.line_every = max(1, config.steps // 10)
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
        if self.config.tensorboard:
            values = {key: value for key, value in row.items() if key != "step"}
            self.accelerator.log(values, step=int(row["step"]))
        summary = f"loss {row['loss']:.4f}, error {row['squared_error']:.4g}, {row['images_per_second']:.0f} images/s"
        self.bar.set_postfix_str(summary, refresh=False)
        if self.plain and (row["step"] >= self.next_line or time.monotonic() >= self.last_line + SECONDS):
            self.next_line = int(row["step"]) + self.line_every
            self.last_line = time.monotonic()
            left = (self.config.steps - row["step"]) * self.config.batch_size / max(row["images_per_second"], 1e-9)
            line = f"{self.config.name}: step {row['step']}/{self.config.steps}, {summary}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
