"""compare.png: a row a method, with samples and figures at each number of network evaluations, for an A4 page.

Sizes are inches of the page: 24 rows of strips fill one, and print at the size that they have here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..files import replaced
from .table import heading, held_out, megabytes, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .runs import Strip

MARGIN = 0.1
NAME = 1.45  # width of the column of names and costs
COLUMN = 2.0  # width of a column of samples
STRIP = 1.92  # and of the strip in it
LEAST, MOST = 0.22, 1.0  # height of a strip
LINE = 0.118  # of text of the smallest size
SMALL, LARGE = 7.0, 8.5  # points
WRAP = 150  # characters of the smallest size that a page of three columns is wide
DPI = 200


def draw_figure(comparison: Mapping[str, Any], strips: Mapping[str, Sequence[Strip]]) -> Figure:
    """The figure of a comparison.

    Args:
        comparison: as compare.json has it.
        strips: pictures of samples, by method, one for each of its results.
    """
    from matplotlib.figure import Figure  # half a second

    rows = comparison["methods"]
    columns = max(len(row["results"]) for row in rows)
    width = 2 * MARGIN + NAME + max(columns, 3) * COLUMN
    lines = [line for text in _legend(comparison) for line in textwrap.wrap(text, WRAP, break_on_hyphens=False)]
    top = MARGIN + 0.2 + LINE * len(lines) + 0.28  # above the first row
    tall = _height(strips)
    pitch = tall + 0.2  # from row to row
    height = top + pitch * len(rows) + MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")
    page = _Page(figure, width, height)
    page.text(MARGIN, MARGIN, heading(comparison), width - 2 * MARGIN, size=LARGE, bold=True)
    for i, line in enumerate(lines):
        page.text(MARGIN, MARGIN + 0.2 + LINE * i, line, width - 2 * MARGIN)
    counts = max((row["results"] for row in rows), key=len)
    for i, result in enumerate(counts):
        n = result["evaluations"]
        text = "samples" if n is None else f"{n} network evaluation{'s' if n > 1 else ''}"
        page.text(MARGIN + NAME + i * COLUMN, top - 0.17, text, STRIP, bold=True)
    for i, row in enumerate(rows):
        _draw_row(page, top + pitch * i, tall, row, strips[row["name"]], list(comparison["titles"]))
    return figure


def _legend(comparison: Mapping[str, Any]) -> list[str]:
    titles = ", ".join(comparison["titles"].values())
    return [
        "Left: what a training step costs, counted in products and, in brackets, in measured time, both in multiples "
        "of flow matching's; then the steps that the budget paid for, and the peak memory of one.",
        f"Below each strip: {titles}. {held_out(comparison)}",
    ]


def _height(strips: Mapping[str, Sequence[Strip]]) -> float:
    """Of a strip, as the pictures' shapes ask for."""
    shapes = [picture.height / picture.width for several in strips.values() for picture in several if picture]
    return min(max(LEAST, STRIP * max(shapes, default=0.0)), MOST)


def _draw_row(
    page: _Page, y: float, tall: float, row: Mapping[str, Any], strips: Sequence[Strip], keys: Sequence[str]
) -> None:
    space = NAME - 0.06
    page.text(MARGIN, y, row["name"].rpartition(":")[2], space, bold=True)  # of code, without its module
    page.text(MARGIN, y + LINE, f"{row['cost']:.2f}× ({row['time_ratio']:.2f}×)", space)
    page.text(MARGIN, y + 2 * LINE, f"{row['steps']} steps, {megabytes(row['peak_bytes'])}", space)
    for i, (result, picture) in enumerate(zip(row["results"], strips, strict=True)):
        x = MARGIN + NAME + i * COLUMN
        if picture is not None:
            page.picture(x, y, picture, STRIP, tall)
        text = ", ".join(words(key, result[key]) for key in keys)
        if result["evaluations"] is None:
            text += f" ({result['sampler']})"
        page.text(x, y + tall + 0.017, text, STRIP if len(row["results"]) > 1 else 3 * COLUMN)


class _Page:
    """A figure in inches from its upper left corner."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def text(self, x: float, y: float, text: str, space: float, *, size: float = SMALL, bold: bool = False) -> None:
        """A line of text whose upper edge is at y, cut off where it is wider than `space`."""
        weight = "bold" if bold else "normal"
        artist = self.figure.text(
            x / self.width, 1 - y / self.height, text, fontsize=size, fontweight=weight, va="top", parse_math=False
        )
        kept = text
        while kept and artist.get_window_extent().width > space * self.figure.dpi:
            kept = kept[:-1]
            artist.set_text(kept.rstrip() + "…")

    def picture(self, x: float, y: float, picture: Image.Image, width: float, height: float) -> None:
        """A picture in a box, as large as fits."""
        scale = min(width / picture.width, height / picture.height)
        w, h = scale * picture.width, scale * picture.height
        place = (x / self.width, 1 - (y + h) / self.height, w / self.width, h / self.height)
        axes = self.figure.add_axes(place)
        axes.imshow(np.asarray(picture.convert("RGB")), aspect="auto", interpolation="antialiased")
        axes.set_axis_off()


def save_figure(comparison: Mapping[str, Any], strips: Mapping[str, Sequence[Strip]], path: Path) -> None:
    """Write compare.png: grey where all pictures are."""
    figure = draw_figure(comparison, strips)
    grey = all(picture is None or picture.mode == "L" for several in strips.values() for picture in several)
    with replaced(path) as partial:
        figure.savefig(partial, dpi=DPI)
        with Image.open(partial) as drawn:
            image = drawn.convert("L" if grey else "RGB")
        if grey:
            image = image.quantize(32)  # half the size
        image.save(partial, optimize=True, dpi=(DPI, DPI))
