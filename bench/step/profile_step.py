"""Where a training step's time goes: `python bench/step/profile_step.py [MODEL] [--batch B] [--rows 0.25] [--kappa K]`.

Prints the kernels of a MeanFlow step (on a GPU; PyTorch's operators without one) by their own time, as a Markdown
table: calls, time, share. The step is that of test_whole_step.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # measure, peers

from test_whole_step import DTYPE, GPU, MODELS, Step, Way, build

from meanflow.objectives import MeanFlow

STEPS = 3


def table(step: Step, top: int) -> str:
    step()  # compiles and tunes what there is to
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as recorded:
        for _ in range(STEPS):
            step()
        if GPU:
            torch.cuda.synchronize()
    rows = [
        (e.key, e.count, e.self_device_time_total if GPU else e.self_cpu_time_total) for e in recorded.key_averages()
    ]
    rows.sort(key=lambda row: -row[2])
    whole = sum(microseconds for *_, microseconds in rows)
    lines = ["| kernel | calls a step | ms a step | share |", "|---|---|---|---|"]
    for key, count, microseconds in rows[:top]:
        share = f"{100 * microseconds / whole:.1f} %"
        lines.append(f"| `{key[:90]}` | {count / STEPS:g} | {microseconds / STEPS / 1e3:.3f} | {share} |")
    lines.append(f"| all {len(rows)} | {sum(row[1] for row in rows) / STEPS:g} | {whole / STEPS / 1e3:.3f} | 100 % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=MODELS[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=float, default=0.25, help="share of rows with r ≠ t")
    parser.add_argument("--kappa", type=float, default=0.0, help="guidance")
    parser.add_argument("--top", type=int, default=25)
    chosen = parser.parse_args()
    device = torch.device("cuda" if GPU else "cpu")
    objective = MeanFlow(ratio=chosen.rows, kappa=chosen.kappa, label_dropout=0.0)
    step = Step(Way("MeanFlow", objective), build(chosen.model, device), chosen.batch, DTYPE)
    print(f"{chosen.model}, batch {chosen.batch}, {chosen.rows:.0%} of rows, κ = {chosen.kappa}, {DTYPE}, {device}\n")
    print(table(step, chosen.top))


if __name__ == "__main__":
    main()
