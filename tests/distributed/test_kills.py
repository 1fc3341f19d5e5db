"""Killed runs, as `tests/support/kills.py` kills them by the hundred."""

import os
import subprocess
import sys
from pathlib import Path

from minimum import needs_sharding

ROOT = Path(__file__).parents[2]


@needs_sharding
def test_killed_runs_of_one_process_of_ddp_and_of_fsdp_end_with_the_same_curve():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    command = [sys.executable, "-m", "kills", "3", "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["one", "ddp", "fsdp"]
