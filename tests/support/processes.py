"""Tests with real gloo processes: each runs every case in turn, so that the start-up is paid once."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def what_processes_say(script: Path, world: int, folder: Path, *, seconds: int) -> list[dict[str, str]]:
    """Run `script RANK WORLD FOLDER` in `world` processes; what each says of each case: "" or a traceback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    support = os.path.dirname(__file__)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [support, os.environ.get("PYTHONPATH")]))
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        ends = [process.communicate(timeout=seconds)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(ends)
    return [torch.load(folder / f"told.{rank}") for rank in range(world)]


def assert_nothing_said(told: list[dict[str, str]], case: str) -> None:
    for rank, cases in enumerate(told):
        assert case in cases, f"process {rank} stopped before: {cases}"
        assert cases[case] == "", f"process {rank}: {cases[case]}"


def run_cases(cases_of: Callable[[int], Mapping[str, Callable[[int, int], None]]], *, seconds: int) -> None:
    """The main program of a script: the cases of this many processes, until one fails; does not return."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    gc.disable()  # gloo's threads let go of tensors, and a collection there would take whole networks down with it
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    told = {}
    for name, case in cases_of(world).items():
        try:
            case(rank, world)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
            break  # the other processes may be waiting elsewhere by now
    torch.save(told, f"{folder}/told.{rank}")
    os._exit(0)  # gloo's threads, torn down with the interpreter, abort now and then: all has been told by now
