"""Benchmarks. `python -m pytest bench` prints tables; `--json FILE` also writes the figures, after every row.

A row that fails, runs out of memory or hangs costs itself alone: with `-n 1 --timeout SECONDS --timeout-method thread`
(pytest-xdist, pytest-timeout) the process that hangs ends and another one goes on with the next row. What has no figure
is in the table "Not measured", with the reason.

PyTorch is imported where it is used: pytest-xdist's first process does without, and starts seconds earlier.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

NOT_MEASURED = "Not measured"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, default=None, help="write every figure to this file")


# -------------------------------------------------------------------------------------------------------- the figures


class Figures:
    """Rows (dicts), in a file that holds all of them after every row."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict) -> None:
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:  # pytest's process writes what failed
            fcntl.flock(lock, fcntl.LOCK_EX)
            told = self.told()
            write(self.path, [*told.get("figures", []), row], told.get("environment"))

    def told(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def rows(self) -> list[dict]:
        return self.told().get("figures", [])


def write(path: Path, rows: list[dict], about: dict | None = None) -> None:
    """The environment and the rows, replaced in one step: whoever reads it has a whole file."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps({"environment": about or environment(), "figures": rows}, indent=2) + "\n")
    new.replace(path)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    """Append rows here; they are written at once, and printed as tables at the end."""
    return Figures(request.config.getoption("--json"))


def in_worker(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes; the first one has the figures of all."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if in_worker(config):
        return
    path: Path | None = config.option.json
    if path is None:
        folder = config.stash[_folder] = tempfile.TemporaryDirectory()
        path = Path(folder.name) / "figures.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    config.option.json = path  # the workers are told
    config.pluginmanager.register(Failures(Figures(path)))


_folder = pytest.StashKey[tempfile.TemporaryDirectory]()


class Failures:
    """What was not measured is a row as well: in the first process, which a hanging one does not take with it."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures
        self.told: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.told:
            return  # its process has ended after it, see pytest_runtest_protocol
        if report.when == "call" or not report.passed:
            self.told.add(report.nodeid)
        if report.failed or report.skipped:
            self.figures.append({"table": NOT_MEASURED, "row": _short(report.nodeid), "why": _reason(report)})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = self.figures.rows()
        for title in dict.fromkeys(row["table"] for row in rows):
            part = [{k: v for k, v in row.items() if k != "table"} for row in rows if row["table"] == title]
            terminalreporter.write_line(f"\n{title}\n" + table(part))

    def pytest_unconfigure(self) -> None:
        lock = self.figures.path.with_name(self.figures.path.name + ".lock")
        lock.unlink(missing_ok=True)


def _short(nodeid: str) -> str:
    return nodeid.removeprefix("bench/").replace(".py::", " ")


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # a skipped test: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    words = str(crash.message if crash is not None else report.longrepr).strip()
    if "crashed while running" in words:
        return "its process hung or died"
    if "OutOfMemoryError" in words:
        return "out of memory"
    return " ".join(words.split())[:200] if words else "failed"


def environment() -> dict:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        **({"nvidia-smi": _clocks()} if gpu else {}),
        **({"rehearsal": "no figure means anything"} if os.environ.get("BENCH_REHEARSAL") == "1" else {}),
    }


def _triton_version() -> str | None:
    with contextlib.suppress(ImportError):
        import triton

        return triton.__version__
    return None


def _clocks() -> dict[str, str]:
    """Driver, clocks and power as nvidia-smi tells them, right after the first row's work."""
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
        if told:
            return dict(zip(asked, (cell.strip() for cell in told[0].split(",")), strict=False))
    return {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; a row need not have every column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = ["| " + " | ".join(name.ljust(w) for name, w in zip(names, widths, strict=True)) + " |"]
    lines.append("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    lines += ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------------- the device


@pytest.fixture(scope="session")
def device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _own_stream() -> Iterator[None]:
    """A backward runs on its forward's stream: on one of our own it can be recorded into a CUDA graph and timed."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # the peers' convolutions in float32: they are checked against float64
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        if hasattr(sys, name):
            delattr(sys, name)  # of the row before, if it failed: they hold its tensors
    if not torch.cuda.is_available():
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


@pytest.hookimpl(wrapper=True, trylast=True)  # inside pytest-timeout's
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A row ends when the GPU has done its work. A process that cannot go on ends; pytest-xdist starts another one."""
    import torch

    from mfkernels import timing

    result = yield
    usable = not timing.capture_failed
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # an illegal address, a trap
            usable = False
    if not usable and in_worker(item.config):
        os._exit(70)
    return result
