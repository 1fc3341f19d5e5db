"""(Improved) MeanFlow steps in DDP and FSDP2 with real processes: losses and gradients are the single process's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKERS = Path(__file__).with_name("workers.py")
FORMS = [
    "ddp",
    "ddp, static_graph",
    "ddp, checkpointed",
    "ddp, no_sync",
    "fsdp",
    "fsdp, accumulated",
    "fsdp, checkpointed",
    "fsdp, bf16",
    "fsdp, bf16, checkpointed",
    "the trainer's ddp",
    "the trainer's fsdp",
    "the trainer's fsdp, bf16",
]
COMPILED = ["DiT: ddp, compiled", "DiT: fsdp, compiled, checkpointed", "iMF-DiT: fsdp, compiled"]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def told(request, tmp_path_factory):
    """What each process says of each case."""
    folder, world = tmp_path_factory.mktemp("processes"), request.param
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKERS), str(rank), str(world), str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        ends = [process.communicate(timeout=480)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(ends)
    return [torch.load(folder / f"told.{rank}") for rank in range(world)]


def says_nothing(told, case):
    for rank, cases in enumerate(told):
        assert case in cases, f"process {rank} stopped before: {cases}"
        assert cases[case] == "", f"process {rank}: {cases[case]}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net", ["DiT", "iMF-DiT"])
def test_losses_and_gradients_are_the_single_processs(told, net, form):
    says_nothing(told, f"{net}: {form}")


@pytest.mark.parametrize("told", [2], indirect=True, ids=["2 processes"])  # four would take a minute to compile
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_steps_are_the_single_processs_and_compile_once(told, case):
    says_nothing(told, case)
