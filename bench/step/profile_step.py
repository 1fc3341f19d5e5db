"""Where a training step's time goes: `python bench/step/profile_step.py [MODEL] [--ways mf plain] [--batch B]`.

Prints the kernels of a step (on a GPU; PyTorch's operators without one) by their own time, as a Markdown table: calls,
time, share. The steps are those of test_whole_step.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # measure, peers

from test_whole_step import BATCH, DTYPE, GPU, MODELS, WAYS, Step, build

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
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["mf"], help="mf: MeanFlow, fm: flow matching, plain: a plain DiT's"
    )
    parser.add_argument("--kappa", type=float, default=0.0, help="guidance")
    parser.add_argument("--top", type=int, default=25)
    chosen = parser.parse_args()
    device = torch.device("cuda" if GPU else "cpu")
    net = build(chosen.model, device)
    for way in (WAYS[key] for key in chosen.ways):
        print(f"{way.name}: {chosen.model}, batch {chosen.batch}, κ = {chosen.kappa}, {DTYPE}, {device}\n")
        print(table(Step(way, net, chosen.batch, DTYPE, chosen.kappa), chosen.top) + "\n")


if __name__ == "__main__":
    main()
