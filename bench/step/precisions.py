"""Curves of one run of the digits in each precision: `python bench/step/precisions.py --out FOLDER`.

Every run has the same weights, images and draws, so the curves differ by rounding alone. Prints the accuracy of each,
and how far its squared error is from float32's (the median over the second half of the run); writes precisions.json
and precisions.png. On a GPU: no (float32), tf32, bf16, bf16-weights and fp16, as CUDA graphs where a run can be
recorded, and float32 without one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest, measure

from conftest import table, write
from measure import REHEARSAL

from meanflow.recipes.digits import digits
from meanflow.training import RunFolder, run_training
from meanflow.training.log import read_log

GPU = torch.cuda.is_available()
PRECISIONS = ("no", "tf32", "bf16", "bf16-weights", "fp16") if GPU else ("no", "bf16")


def curve_of(precision: str, graphs: bool, steps: int) -> tuple[list[float], float | None]:
    """The squared error of every step (the adaptive loss is always near one), and the class accuracy."""
    AcceleratorState._reset_state(True)  # one process has one precision by accelerate's rules
    name = precision if graphs else f"{precision}-eager"
    config = digits().replace(
        name=name,
        precision=precision,
        steps=steps,
        log_every=1,
        sample_every=0,
        device="cuda" if GPU else "cpu",
        cuda_graphs="auto" if graphs else False,
        evaluate=not REHEARSAL,
    )
    run_training(config)
    folder = RunFolder.named(name)
    accuracy = folder.read_report().get("class_accuracy")
    return [row["squared_error"] for row in read_log(folder.log)], accuracy


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, losses in curves.items():
        few = max(1, len(losses) // 50)
        means = [statistics.mean(losses[i : i + few]) for i in range(0, len(losses), few)]
        axes.plot([few * i for i in range(len(means))], means, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="squared error", title="digits, one seed")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=1000)
    chosen = parser.parse_args()
    out = chosen.out.absolute()
    curves: dict[str, list[float]] = {}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for precision, graphs in [(p, True) for p in PRECISIONS] + ([("no", False)] if GPU else []):
            name = precision if graphs else f"{precision}, no graph"
            row: dict = {"table": "Digits in each precision", "precision": name}
            try:
                curves[name], row["class accuracy"] = curve_of(precision, graphs, chosen.steps)
                late = slice(chosen.steps // 2, None)
                pairs = zip(curves[name][late], curves.get("no", [])[late], strict=False)
                row["error off float32's"] = statistics.median(abs(a / b - 1) for a, b in pairs)
            except Exception as error:  # a row of its own: the others go on
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
            write(out / "precisions.json", [*rows, {"table": "curves", **curves}])
        os.chdir(out)
    plot(curves, out / "precisions.png")
    print(table([{k: v for k, v in row.items() if k != "table"} for row in rows]))
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
