"""Plans: calls of kernels that are worked out once. They take effect where Triton compiles for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_planned_launches_get_what_unplanned_ones_get(tmp_path):
    pytest.importorskip("triton", minversion="3.4")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "support" / "planned_calls.py"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "functions" in done.stdout
