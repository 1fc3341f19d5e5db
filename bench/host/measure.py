"""Python's (host) time of an eager step, forward and backward of 12 DiT blocks, next to plain PyTorch's; without a GPU.

    python bench/host/measure.py [--json FILE] [--rounds 60] [--depth 12]

A small model on a GPU waits for Python: this is how long Python takes to launch a step. Three ways are taken in turns
in one process: plain DiT blocks through PyTorch's fused attention (peers.py), this project's in flow matching, and in
MeanFlow with a tangent on a quarter of the rows. All under bfloat16 autocast with float32 weights, on one thread. The
figures are ratios to the plain blocks, medians over the rounds of the ratio within a round.

Tensors are so small that arithmetic costs next to nothing; a chunk is one token, so that there are several chunks, and
every launch of DiT-B/2 is made. ATen's operators run on the CPU. Triton's kernels are compiled for an H100 (once, into
Triton's cache) and go through all of Triton's own Python up to the launcher, which does nothing. The clock is the
process's own, which stands still while other processes run.

What it does not see: the launcher itself and CUDA's driver (a few µs a Triton launch), `torch.cuda.device` around each
launch, the second thread on which CUDA's autograd runs, and what an ATen operator costs more or less to launch on a GPU
than to run on a CPU (fused attention costs more here). So the ratios on a GPU are somewhat other than these.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest, measure, peers, without_gpu

from conftest import environment
from measure import median_ratio
from without_gpu import WAYS, as_on_h100, blocks, inputs, stub_driver

from mfkernels import launch
from mfkernels.launch import Launch

B, N, D, H = 4, 2, 8, 1  # heads of 8 are the narrowest


def step_of(way: str, depth: int) -> Callable[[], None]:
    """Forward and backward."""
    forward, parameters = blocks(way, depth=depth, width=D, heads=H)
    x, c, x_dot, c_dot, dy = inputs(B, N, D)  # [B, N, D], [B, D], [B_t, N, D], [B_t, D], [B, N, D]

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = forward(x, c, x_dot, c_dot)  # [B, N, D]
        torch.autograd.grad(y, [x, c, *parameters], dy)

    return step


def interleaved_seconds(steps: Mapping[str, Callable[[], None]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """As in bench/measure.py, by the process's clock."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for i in range(warmup + rounds):
        for way, step in steps.items():
            start = time.process_time()
            step()
            if i >= warmup:
                times[way].append(time.process_time() - start)
    return times


def triton_launches(step: Callable[[], None]) -> int:
    """Of one step."""
    run, replay, made = Launch.run, launch.replay, 0

    def counted(this: Launch) -> None:
        nonlocal made
        made += 1
        run(this)

    def counted_again(start: Callable[..., None], arguments: list[Any]) -> None:
        nonlocal made
        made += 1
        replay(start, arguments)

    with patch.object(Launch, "run", counted), patch.object(launch, "replay", counted_again):
        step()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=60, help="how often each way is timed")
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the Python that is measured here; expected it unset")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stub_driver()
    with as_on_h100(chunk=1):
        steps = {way: step_of(way, asked.depth) for way in WAYS}
        launches = {way: triton_launches(step) for way, step in steps.items()}  # compiles
        gc.collect()
        gc.freeze()  # what the imports made is not looked through again
        times = interleaved_seconds(steps, rounds=asked.rounds, warmup=3)
    rows = [
        {
            "way": way,
            "ms": 1e3 * statistics.median(times[way]),
            "ms_least": 1e3 * min(times[way]),
            "ratio": median_ratio(times[way], times["plain"]),
            "ratio_of_least": min(times[way]) / min(times["plain"]),
            "triton_launches": launches[way],
        }
        for way in WAYS
    ]
    for row in rows:
        print(
            f"{row['way']:14} {row['ms']:6.2f} ms, {row['ratio']:.2f} of plain; {row['triton_launches']} of Triton; ",
            end="",
        )
        print(f"least {row['ms_least']:.2f} ms, {row['ratio_of_least']:.2f} of plain's least")
    if asked.json is not None:
        whole = {
            "environment": environment(),
            "sizes": {"B": B, "N": N, "D": D, "H": H, "depth": asked.depth, "rounds": asked.rounds},
            **{row["way"]: row["ratio"] for row in rows if row["way"] != "plain"},
            "rows": rows,
        }
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
