"""A dualized network in DDP and FSDP2 with two real processes: gradients are the single process's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKERS = Path(__file__).with_name("workers.py")
CASES = [
    "ddp",
    "ddp, static_graph",
    "ddp, checkpointed",
    "fsdp",
    "fsdp, dualized after",
    "fsdp, bf16",
    "fsdp, checkpointed",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each process says of each case."""
    folder = tmp_path_factory.mktemp("processes")
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKERS), str(rank), "2", str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0, 0], f"exit codes {codes}\n" + "\n".join(ends)
    return [torch.load(folder / f"told.{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_single_processs(told, case):
    for rank, cases in enumerate(told):
        assert case in cases, f"process {rank} stopped before: {cases}"
        assert cases[case] == "", f"process {rank}: {cases[case]}"
