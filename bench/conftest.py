"""Benchmarks. `python -m pytest bench` prints tables; `--json FILE` also writes the figures and versions."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # the peers' convolutions in float32: they are checked against float64


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, default=None, help="write every figure to this file")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest):
    """Append rows (dicts) here; they are printed as tables and written to --json at the end."""
    rows: list[dict] = []
    yield rows
    for title in dict.fromkeys(row["table"] for row in rows):
        part = [{k: v for k, v in row.items() if k != "table"} for row in rows if row["table"] == title]
        print(f"\n\n{title}\n" + _table(part))
    path = request.config.getoption("--json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), "figures": rows}, indent=2) + "\n")


def environment() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(rows: list[dict]) -> str:
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = ["| " + " | ".join(name.ljust(w) for name, w in zip(names, widths, strict=True)) + " |"]
    lines.append("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    lines += ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
