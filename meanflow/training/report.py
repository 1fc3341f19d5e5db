"""Images and figures of a trained network, as a run leaves them: samples.png and report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..codecs import identity_of
from ..data import ImageData
from ..errors import UsageError
from ..evaluation import Evaluator, evaluation_labels
from .network import LoadedNetwork
from .pictures import POINTS, samples_picture, save_picture

SAMPLES = 2000  # images of a standard evaluation
ROWS, COLUMNS = 10, 10  # of a grid


def save_samples(loaded: LoadedNetwork, path: Path, *, seed: int, device: torch.device | str) -> Image.Image:
    """A grid of generated images, one row per class (the first ten classes); of points a scatter plot of all classes.

    Where the sampling has a sweep: one row per value and one column per class, the noise of a column the same.

    Returns:
        What it wrote to `path`.
    """
    if loaded.image_shape == POINTS:
        labels = torch.arange(SAMPLES) % len(loaded.class_names)  # [n]
        images = loaded.generate(labels, seed=seed, device=device)  # [n, 2, 1, 1]
    elif loaded.objective.sampling.sweep is not None:
        name, values = loaded.objective.sampling.sweep
        labels = torch.arange(COLUMNS) % len(loaded.class_names)  # [columns]
        rows = [loaded.generate(labels, seed=seed, device=device, **{name: value}) for value in values]
        images = torch.cat(rows)  # [rows·columns, C, H, W]
    else:
        labels = torch.arange(min(ROWS, len(loaded.class_names))).repeat_interleave(COLUMNS)  # [rows·columns]
        images = loaded.generate(labels, seed=seed, device=device)  # [rows·columns, C, H, W]
    picture = samples_picture(images, COLUMNS, labels, loaded.class_names)
    save_picture(picture, path)
    return picture


def evaluate_network(
    loaded: LoadedNetwork,
    data: ImageData,
    evaluator: Evaluator,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Figures of `samples` images, their labels in the training set's proportions, as report.json has them.

    Args:
        options: of the objective's sampling, where they are others than its own.

    Raises:
        UsageError: the data are of another shape or of other classes than the network's.
    """
    if loaded.image_shape != data.image_shape:
        raise UsageError(
            f"{loaded.source} makes images of shape {loaded.image_shape}, {data.name} has {data.image_shape}",
            field="data",
        )
    data.check_classes(loaded.class_names, loaded.source)
    if data.codec is not None:
        same = identity_of(data.codec) == identity_of(loaded.codec)
        data = data.decoding_with(loaded.codec if same else data.codec, device)
    sampler = {"sampler": str(loaded.sampling(**options))}
    refusal = evaluator.refusal(loaded.image_shape)
    if refusal is not None:
        return {**refusal, **sampler}
    labels = evaluation_labels(data.train.labels, samples)
    images = loaded.generate(labels, seed=seed, device=device, **options)  # [n, C, H, W]
    figures = evaluator.evaluate(images, labels, data)
    if data.left_out is not None:
        data.left_out.name_new()
    return {**figures, **sampler}


def figures_by_sweep(
    loaded: LoadedNetwork, data: ImageData, evaluator: Evaluator, device: torch.device | str
) -> dict[str, Any]:
    """The figures at each value of the sampling's sweep, for a report; empty where it has none."""
    if loaded.objective.sampling.sweep is None:
        return {}
    name, values = loaded.objective.sampling.sweep
    rows = []
    for value in values:
        option: dict[str, Any] = {name: value}
        figures = evaluate_network(loaded, data, evaluator, device=device, **option)
        rows.append({name: value, **{key: figures[key] for key in evaluator.titles}})
    return {"guidance": rows}
