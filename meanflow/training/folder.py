"""The folder of a run: every path in it, and what may be done with it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RUNS
from ..errors import UsageError
from ..files import parse_json, read_text, remove_folder, remove_partials, shown, write_text
from .checkpoint import list_checkpoints, remove_partial
from .state import check_number

_SECONDS = ("seconds", "training_seconds")  # of a report, which are read again


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME, or wherever a run is."""

    path: Path

    @classmethod
    def named(cls, name: str) -> RunFolder:
        """runs/NAME under the working directory.

        Raises:
            UsageError: the name is not one of a folder, or runs/ is a file.
        """
        if not re.fullmatch(r"[\w][\w.\-]*", name):
            raise UsageError(f"expected letters, digits, '_', '-' and '.', got {name!r}", field="name")
        if RUNS.exists() and not RUNS.is_dir():
            raise UsageError(f"{RUNS.absolute()} is a file; expected a folder, which runs are written to")
        return cls(RUNS / name)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb_id.txt"

    @property
    def averages(self) -> Path:
        return self.path / "averages"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def newest(self) -> Path | None:
        """The newest checkpoint; None where there is none."""
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def prepare(self, *, resume: bool, overwrite: bool) -> Path | None:
        """Check that a run may use the folder; returns the checkpoint to resume from. Nothing is changed yet.

        Raises:
            UsageError: it would overwrite something, or has nothing to resume from.
        """
        if resume and overwrite:
            raise UsageError("choose one of them", field="resume, overwrite")
        if resume:
            newest = self.newest()
            if newest is None:
                what = "has no checkpoint" if self.path.exists() else "does not exist"
                raise UsageError(f"{self.path} {what}; start the run without --resume", field="resume")
            return newest
        if self.path.exists() and not self._was_never_begun():
            if not overwrite:
                raise UsageError(
                    f"{self.path} exists already. Choose another name with --name NAME, continue it with --resume, or "
                    "replace it with --overwrite"
                )
            if not self.config.is_file():
                raise UsageError(
                    f"{self.path} does not look like a run (no config.yaml), so it is left alone", field="overwrite"
                )
        return None

    def _was_never_begun(self) -> bool:
        """Whether a run was killed before its config.yaml was written."""
        return self.path.is_dir() and all(entry.match(".config.*.partial.yaml") for entry in self.path.iterdir())

    def remove(self) -> None:
        """Remove all of it; a kill leaves a hidden folder that `remove_leftovers` takes away."""
        if self.path.exists():
            remove_folder(self.path)

    def remove_leftovers(self) -> None:
        """Remove what killed processes of this run had begun to write. Only its owner may do this."""
        shutil.rmtree(self.path.with_name(f".{self.path.name}.removed.partial"), ignore_errors=True)  # of `remove`
        written = (self.config, self.log, self.curve, self.samples, self.report, self.wandb_id)
        remove_partials(self.path, *(path.name for path in written))
        remove_partials(self.averages, "step_*.safetensors")
        remove_partial(self.checkpoints)

    def read_report(self, figures: Iterable[str] = ()) -> dict[str, Any]:
        """report.json; empty where there is none.

        Args:
            figures: names of numbers in it that are used; each, and its reference value, may be null.

        Raises:
            UsageError: it is damaged.
        """
        try:
            report = parse_json(read_text(self.report)) if os.path.lexists(self.report) else {}
            if not isinstance(report, dict):
                raise ValueError(f"expected figures by name, got {shown(report)}")
            for name in _SECONDS:
                check_number(name, report.get(name, 0.0), 0.0)
            for name in (f"{held}{figure}" for figure in figures for held in ("", "held_out_")):
                if report.get(name) is not None:
                    check_number(name, report[name], 0.0)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {self.report} ({error}); remove it, and evaluate the run again") from error
        return report

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Write report.json."""
        write_text(self.report, json.dumps(report, indent=2) + "\n")

    def update_report(self, figures: Mapping[str, Any], step: int | None) -> None:
        """Write the figures of a standard evaluation after `step` steps; what a report says of other steps goes."""
        report = self.read_report()
        kept = {key: value for key, value in report.items() if key != "note"} if report.get("steps") == step else {}
        self.write_report({**kept, **figures, "steps": step})
