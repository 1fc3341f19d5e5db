"""Sample grids, scatter plots and loss curves as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import replaced

MIN_TILE = 40  # pixels; smaller images are enlarged to at least this
POINTS = (2, 1, 1)  # shape of "images" that are points of a plane


def makes_picture(image_shape: Sequence[int]) -> bool:
    """Whether `samples_picture` takes images of that shape (C, H, W)."""
    return image_shape[0] in (1, 3) or tuple(image_shape) == POINTS


def samples_picture(
    images: Tensor, columns: int, labels: Tensor | None = None, names: Sequence[str] = (), *, bare: bool = False
) -> Image.Image:
    """Images of one or three channels as a grid, points (n, 2, 1, 1) as a scatter plot with a colour for each label.

    Args:
        images: (n, C, H, W).
        columns: of a grid.
        labels: (n,) of a scatter plot; None: one colour.
        names: of the labels, for the legend of a scatter plot; none: no legend.
        bare: a scatter plot without axes and title, to be printed small.

    Raises:
        ValueError: `images` is neither.
    """
    if tuple(images.shape[1:]) != POINTS:
        return image_grid(images, columns)
    points = images.detach().float().cpu().flatten(1)  # [n, 2]
    labels = torch.zeros(len(points), dtype=torch.long) if labels is None else labels.cpu()  # [n]
    return _scatter(points, labels, names, bare)


def _scatter(points: Tensor, labels: Tensor, names: Sequence[str], bare: bool) -> Image.Image:
    """With 0 in the centre, and up to 1 % of the points outside of the axes, which the picture then says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # half a second

    limit = max(2.5, 1.1 * float(points.abs().amax(dim=1).quantile(0.99)) if len(points) else 0.0)
    outside = int((~(points.abs() <= limit).all(dim=1)).sum())
    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for label in labels.unique().tolist():
        of_label = points[labels == label]  # [m, 2]
        name = names[label] if label < len(names) else None
        axes.scatter(
            of_label[:, 0],
            of_label[:, 1],
            s=40 if bare else 6,
            color=f"C{label % 10}",
            alpha=0.7,
            linewidths=0,
            label=name,
        )
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    if bare:
        axes.set(xticks=(), yticks=())
    else:
        axes.set_title(f"{len(points)} points" + (f", {outside} of them outside" if outside else ""))
    if names and not bare:
        figure.legend(loc="outside lower center", ncols=4, markerscale=3, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images side by side, row after row; small ones enlarged without smoothing.

    Args:
        images: (n, C, H, W) in [-1, 1] (values outside are cut off), C = 1 or 3.
        columns: images per row.
        gap: white pixels between the enlarged images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected shape (n, 1 or 3, H, W), got {tuple(images.shape)}")
    n, _, H, W = images.shape
    scale = max(1, -(-MIN_TILE // H))
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()  # [n, C, H, W]
    pixels = np.repeat(np.repeat(pixels, scale, axis=2), scale, axis=3).transpose(0, 2, 3, 1)  # [n, sH, sW, C]
    rows, h, w = -(-n // columns), scale * H + gap, scale * W + gap
    sheet = np.full((rows * h + gap, columns * w + gap, pixels.shape[-1]), 255, dtype=np.uint8)
    for i, tile in enumerate(pixels):
        top, left = gap + (i // columns) * h, gap + (i % columns) * w
        sheet[top : top + scale * H, left : left + scale * W] = tile
    return Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture so that `path` never holds half of one; the format follows the suffix.

    Raises:
        ValueError: Pillow knows no format of that suffix.
    """
    with replaced(path) as partial:
        image.save(partial)


def save_loss_curve(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Plot the weighted loss and, if there is one, the squared error ‖u − u_tgt‖² per image over the steps of a log."""
    from matplotlib.figure import Figure  # half a second

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for position, key, title in ((1, "loss", "weighted loss"), (2, "squared_error", "‖u − u_tgt‖² per image")):
        told = [row for row in rows if key in row]
        if rows and not told:
            continue
        axes = figure.add_subplot(1, 2, position)
        axes.plot([row["step"] for row in told], [row[key] for row in told], linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_title(title)
        if key == "squared_error" and told and min(row[key] for row in told) > 0:
            axes.set_yscale("log")
    with replaced(path) as partial:
        figure.savefig(partial, dpi=110)
