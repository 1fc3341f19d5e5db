"""Compile an op's kernels, in their shipped configurations, for GPUs that need not be there.

`compile_shipped.py` beside an op's tests calls `print_reports`; it runs in a process of its own, because the tests'
process interprets its kernels and there is no way back.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ARCHS = ("sm_80", "sm_90", "sm_100")
WIDTHS = (768, 1152, 2730)


def print_reports(launches: Mapping[str, Callable[[str, int], Any]], widths: Iterable[int] = WIDTHS) -> None:
    """`launches[op](arch, width)` makes a launch on meta tensors."""
    from mfkernels.inspect import inspect_launch

    reports = []
    for arch in ARCHS:
        for op, make in launches.items():
            for width in widths:
                launch = make(arch, width)
                report = dataclasses.asdict(inspect_launch(launch, arch))
                reports.append({"arch": arch, "op": op, "width": width, "config": launch.config, **report})
    print(json.dumps(reports))


def assert_compile_well(script: Path, no_table: Path, *, uses_stack: bool = False) -> list[dict[str, Any]]:
    """Nothing spills and everything fits shared memory, in the package's table (`no_table`: an empty folder).

    `uses_stack`: local memory is not asked about, because a library function inside keeps a table there.
    """
    from mfkernels.inspect import SHARED_LIMIT

    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["MFKERNELS_CACHE_DIR"] = str(no_table)
    paths = [str(root), str(Path(__file__).parent), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads(done.stdout)
    assert reports
    for report in reports:
        assert uses_stack or report["spill_stores"] == report["spill_loads"] == 0, report
        assert report["shared_bytes"] <= SHARED_LIMIT[report["arch"]], report
    return reports
