"""The output of `python -m mfkernels.check`: the rows of its table, as text and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mfkernels

from .case import Calls
from .jobs import Outcome, Timed, missing


@dataclass
class Row:
    """The outcomes of one op on one backend in one dtype."""

    op: str
    backend: str
    dtype: str
    outcomes: list[Outcome] = field(default_factory=list)
    times: Timed | None = None

    @property
    def checks(self) -> int:
        return sum(not outcome.not_served for outcome in self.outcomes)

    @property
    def failures(self) -> list[str]:
        return [": ".join(filter(None, (o.case, o.failure))) for o in self.outcomes if o.failure]

    def cases_by(self, what: str) -> dict[str, list[str]]:
        """Cases by the reason ("not_served") or note ("note") that they have."""
        found: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            if getattr(outcome, what):
                found.setdefault(getattr(outcome, what), []).append(outcome.case)
        return found

    def worst(self) -> dict[str, Any] | None:
        """The error that is the largest fraction of its bound."""
        found: list[dict[str, Any]] = [
            {"ratio": error / bound, "error": error, "bound": bound, "quantity": quantity, "case": outcome.case}
            for outcome in self.outcomes
            for quantity, (error, bound) in outcome.errors.items()
        ]
        return max(found, key=lambda entry: entry["ratio"], default=None)

    def as_json(self) -> dict[str, Any]:
        """Infinite numbers, which JSON does not have, are strings."""
        worst = self.worst()
        return {
            "op": self.op,
            "backend": self.backend,
            "dtype": self.dtype,
            "ok": not self.failures,
            "checks": self.checks,
            "worst": worst and {k: str(v) if v in (math.inf, -math.inf) else v for k, v in worst.items()},
            "failures": self.failures,
            "not_served": self.cases_by("not_served"),
            "notes": self.cases_by("note"),
            "timed": self.times and self.times.case.removeprefix("timing, "),
            "microseconds": self.times and {what: self.times.microseconds.get(what) for what in Calls._fields},
        }


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mfkernels": mfkernels.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "gpu": gpu and gpu.name,
        "compute_capability": gpu and f"{gpu.major}.{gpu.minor}",
        "interpreted": "triton" not in missing(device) and device.type == "cpu",
        "missing": missing(device),
    }


def write_json(path: Path | None, about: dict[str, Any], rows: Sequence[Row], *, done: bool) -> None:
    """Replace the file in one step. "ok" is true only when everything was run and nothing is wrong."""
    if path is None:
        return
    ok = done and not any(row.failures for row in rows)
    text = json.dumps({"environment": about, "ok": ok, "rows": [row.as_json() for row in rows]}, indent=1) + "\n"
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def table(rows: Sequence[Row]) -> str:
    """One line per row, then what is wrong, not served, or bounded otherwise."""
    heads = ("op", "backend", "dtype", "of bound", "checks", "dual µs", "plain jvp", "fwd+bwd", "plain", "worst at")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        worst = row.worst()
        figures = [f"{worst['ratio']:.2f}" if worst else "–", str(row.checks)]
        for what in ("dual_forward", "plain_jvp", "forward_backward", "plain_forward_backward"):
            taken = row.times.microseconds.get(what) if row.times else None
            figures.append("–" if taken is None else f"{taken:.0f}" if taken >= 100 else f"{taken:.3g}")
        words = f"{worst['quantity']}, {worst['case']}" if worst else "not served, see below"
        lines.append((row.op, row.backend, row.dtype, *figures, words if not row.failures else "WRONG, see below"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = []
    for line in lines:
        cells = [
            cell.rjust(w) if 3 <= i < 9 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    for row in rows:
        name = f"{row.op}, {row.backend}, {row.dtype}"
        for what, title in (("not_served", "not served"), ("note", "note")):
            for reason, cases in row.cases_by(what).items():
                text.append(f"{title}: {name}: {reason} ({len(cases)} checks, the first of {cases[0]})")
        text += [f"wrong: {name}: {failure}" for failure in row.failures]
    return "\n".join(text)


def summary(rows: Sequence[Row]) -> str:
    checks, wrong = sum(row.checks for row in rows), [row for row in rows if row.failures]
    skipped = sum(bool(outcome.not_served) for row in rows for outcome in row.outcomes)
    tail = f" ({skipped} more are not served, see above)" if skipped else ""
    if not wrong:
        return f"{checks} checks, all right{tail}"
    names = "; ".join(f"{row.op} ({row.backend}, {row.dtype})" for row in wrong)
    return f"{sum(len(row.failures) for row in wrong)} of {checks} wrong: {names}{tail}"
