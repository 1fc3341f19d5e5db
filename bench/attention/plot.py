"""Draws what `pytest bench/attention --json FILE` wrote: TFLOP/s of the forward over the number of tokens.

python bench/attention/plot.py FILE.json        # writes FILE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def lines(figures: list[dict], head_dim: int) -> dict[str, list[tuple[int, float]]]:
    """TFLOP/s by way: (N, the best over batch sizes and heads)."""
    best: dict[str, dict[int, float]] = {}
    for row in figures:
        _, N, _, d = map(int, row["B×N×H×d"].split("×"))
        if d == head_dim:
            ways = best.setdefault(row["way"], {})
            ways[N] = max(ways.get(N, 0.0), row["TFLOP/s"])
    return {way: sorted(points.items()) for way, points in best.items()}


def draw(report: dict, path: Path) -> None:
    figures = [row for row in report["figures"] if row["table"].startswith("Attention forward")]
    head_dims = sorted({int(row["B×N×H×d"].split("×")[3]) for row in figures})
    figure, axes = plt.subplots(1, len(head_dims), figsize=(5 * len(head_dims), 4.5), sharey=True, squeeze=False)
    for axis, head_dim in zip(axes[0], head_dims, strict=True):
        for way, points in lines(figures, head_dim).items():
            axis.plot(*zip(*points, strict=True), marker="o", label=way)
        axis.set(title=f"head dim {head_dim}", xlabel="tokens", xscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("useful TFLOP/s")
    axes[0][0].set_ylim(bottom=0)
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, frameon=False)
    environment = report["environment"]
    machine = environment["gpu"] or environment["processor"]
    figure.suptitle(f"{figures[0]['table']}, {machine}, torch {environment['torch']}, {environment['date']}")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
