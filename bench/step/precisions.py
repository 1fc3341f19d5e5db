"""Curves of one run of the digits in each precision: `python bench/step/precisions.py --out FOLDER`.

Every run has the same weights, images and draws, so the curves differ by rounding alone. Prints the accuracy of each,
and how far its squared error is from float32's (the median over the second half of the run); writes precisions.json
and precisions.png after every run, each of which is a process of its own. On a GPU: no (float32) without and with a
CUDA graph, then bf16, tf32, bf16-weights and fp16, with one where a run can be recorded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest, measure

from conftest import table, write
from measure import REHEARSAL

from meanflow.recipes.digits import digits
from meanflow.training import RunFolder, run_training
from meanflow.training.log import read_log

GPU = torch.cuda.is_available()
FLOAT32 = "no, no graph" if GPU else "no"  # what the others are compared with
RUNS = (FLOAT32, "no", "bf16", "tf32", "bf16-weights", "fp16") if GPU else (FLOAT32, "bf16")


def run(name: str, steps: int, out: Path) -> None:
    """Trains in this folder, and writes the squared error of every step (the adaptive loss is always near one)."""
    precision, _, eager = name.partition(", ")
    config = digits().replace(
        name="run",
        precision=precision,
        steps=steps,
        log_every=1,
        sample_every=0,
        device="cuda" if GPU else "cpu",
        cuda_graphs=False if eager else "auto",
        evaluate=not REHEARSAL,
    )
    if run_training(config).signal is not None:
        raise SystemExit("stopped by a signal")
    folder = RunFolder.named("run")
    accuracy = folder.read_report().get("class_accuracy")
    errors = [row["squared_error"] for row in read_log(folder.log)]
    out.write_text(json.dumps({"class accuracy": accuracy, "squared error": errors}))


def in_a_process(name: str, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).absolute()), "--run", name, "--steps", str(steps)]
        done = subprocess.run([*command, "--out", folder], cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            return {"failed": lines[-1][:300] if lines else f"exit code {done.returncode}"}
        return json.loads((Path(folder) / "curve.json").read_text())


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, errors in curves.items():
        few = max(1, len(errors) // 50)
        means = [statistics.mean(errors[i : i + few]) for i in range(0, len(errors), few)]
        axes.plot([few * i for i in range(len(means))], means, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="squared error", title="digits, one seed")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--run", choices=RUNS, help="this one alone, in this process and folder")
    chosen = parser.parse_args()
    out = chosen.out.absolute()
    if chosen.run is not None:
        run(chosen.run, chosen.steps, out / "curve.json")
        return 0
    curves: dict[str, list[float]] = {}
    rows: list[dict] = []
    for name in RUNS:
        told = in_a_process(name, chosen.steps)
        row = {"table": "Digits in each precision", "precision": name}
        if "failed" in told:
            row |= told
        else:
            row["class accuracy"], curves[name] = told["class accuracy"], told["squared error"]
            late = slice(chosen.steps // 2, None)
            pairs = list(zip(curves[name][late], curves.get(FLOAT32, [])[late], strict=False))
            row["error off float32's"] = statistics.median(abs(a / b - 1) for a, b in pairs) if pairs else None
        rows.append(row)
        print(table([{k: v for k, v in row.items() if k != "table"} for row in rows]), flush=True)
        write(out / "precisions.json", [*rows, {"table": "curves", **curves}])
        plot(curves, out / "precisions.png")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
