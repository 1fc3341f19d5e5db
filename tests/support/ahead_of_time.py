"""Compile an op's kernels, in their shipped configurations, for GPUs that need not be there.

`compile_shipped.py` beside an op's tests prints reports; it runs in a process of its own, because the tests' process
interprets its kernels and there is no way back.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

ARCHS = ("sm_80", "sm_90", "sm_100")
WIDTHS = (768, 1152, 2730)
TESTS = Path(__file__).parents[1]

Report = dict[str, Any]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def report_of(launch: Any, arch: str, **case: Any) -> Report:
    """What ptxas makes of a launch on meta tensors."""
    from mfkernels.inspect import inspect_launch

    return {"arch": arch, **case, "config": launch.config, **dataclasses.asdict(inspect_launch(launch, arch))}


def print_reports(launches: Mapping[str, Callable[[str, int], Any]], widths: Iterable[int] = WIDTHS) -> None:
    """`launches[op](arch, width)` makes a launch on meta tensors."""
    reports = [
        report_of(make(arch, width), arch, op=op, width=width)
        for arch in ARCHS
        for op, make in launches.items()
        for width in widths
    ]
    print(json.dumps(reports))


def reports_of(op: str, no_table: Path) -> list[Report]:
    """What tests/<op>/compile_shipped.py prints, of the package's table (`no_table`: an empty folder)."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["MFKERNELS_CACHE_DIR"] = str(no_table)
    paths = [str(TESTS.parent), str(Path(__file__).parent), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    script = TESTS / op / "compile_shipped.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads(done.stdout)
    assert reports
    return reports


def assert_compile_well(op: str, no_table: Path, *, uses_stack: bool = False) -> None:
    """Nothing spills and everything fits shared memory, as `reports_of` has it.

    `uses_stack`: local memory is not asked about, because a library function inside keeps a table there.
    """
    from mfkernels.inspect import SHARED_LIMIT

    for report in reports_of(op, no_table):
        assert uses_stack or report["spill_stores"] == report["spill_loads"] == 0, report
        assert report["shared_bytes"] <= SHARED_LIMIT[report["arch"]], report
