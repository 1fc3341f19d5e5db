"""What a recipe of a paper costs, before anybody runs it: parameters, products of a step, hours by assumption.

Counts of this package's recipes are in meanflow/recipes/estimates.json, which `python docs/generate.py` writes: to
count all of them anew takes about a minute.
"""

from __future__ import annotations

import json
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import Config
from ..data import ImageData, TensorImages
from ..models import DiT, IMFDiT
from ..recipes import Published, published, recipe
from ..registry import find
from .cost import Step

COUNTS = Path(__file__).parents[1] / "recipes" / "estimates.json"
GPUS = 8
TFLOPS = 300.0  # of each GPU, sustained over a whole run: an assumption
PEAK = 989.0  # of an H100 SXM: bfloat16 on tensor cores, without sparsity


class Estimate(NamedTuple):
    """What a training run costs.

    parameters: of the network in training.
    flops: multiplications and additions in the products of a training step by plain PyTorch, per image; without those
        that attention's backward does once more on a GPU, and without a VAE and the data.
    """

    parameters: int
    flops: float

    def hours(self, config: Config, *, gpus: int = GPUS, tflops: float = TFLOPS) -> float:
        """Hours on so many GPUs that sustain `tflops` · 10¹² FLOPs a second each: an estimate, not a measurement."""
        total = self.flops * config.optim.batch_size * config.optim.steps
        return total / (gpus * tflops * 1e12) / 3600


def estimate_of(name: str) -> Estimate | None:
    """Of a recipe by its name: as counted before, or counted now; None: nothing says what its data are like.

    Raises:
        UsageError: there is no such recipe.
    """
    reported = published(name)
    if reported is None:
        return None
    known = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    return Estimate(**known[name]) if name in known else counted(recipe(name), reported)


def counted(config: Config, reported: Published) -> Estimate:
    """Counted on PyTorch's meta device, where nothing is computed and nothing takes memory."""
    from ..training import parameter_count  # with accelerate, which takes two seconds and a list has no use for

    data = described(reported.shape, reported.num_classes)
    with torch.device("meta"):
        parameters = parameter_count(config.network(data))
    return Estimate(parameters, flops_per_image(config, data))


def described(shape: tuple[int, int, int], num_classes: int) -> ImageData:
    """Data of this shape, without a sample."""
    nothing = TensorImages(torch.zeros(0, *shape), torch.zeros(0, dtype=torch.long))
    return ImageData("described data", nothing, None, tuple(map(str, range(num_classes))), shape[0], shape[1])


def flops_per_image(config: Config, data: ImageData) -> float:
    """FLOPs of a training step over its batch.

    Counted for a few rows, of which as great a share has r ≠ t as of the batch: a product's FLOPs are proportional to
    its rows. A transformer is counted with a few blocks and continued to its depth: each block adds the same.
    """
    config = config.replace(batch_size=rows_of(config))
    blocks = {name: getattr(config.model, name) for name in _depths(config)}
    few = {name: 2 - i for i, name in enumerate(blocks)}  # a head's blocks are among the others
    if any(blocks[name] <= few[name] + 1 for name in blocks):
        return _flops(config, data)
    flops = least = _flops(config.replace(**few), data)
    for name, number in few.items():
        one_more = _flops(config.replace(**{**few, name: number + 1}), data) - least
        flops += (blocks[name] - number) * one_more
    return flops


def rows_of(config: Config) -> int:
    """The smallest batch in which the share of rows with r ≠ t is what it is asked to be."""
    objective = config.objective
    return Fraction(objective.ratio).limit_denominator(1000).denominator * objective.group_size


def _depths(config: Config) -> tuple[str, ...]:
    """The options of a model that say how many equal blocks it has; of other people's models that is not known."""
    make: Any = find("models", config.model.name) if ":" not in config.model.name else None
    depths: dict[Any, tuple[str, ...]] = {DiT: ("depth",), IMFDiT: ("depth", "aux_head_depth")}
    return depths.get(make.func if isinstance(make, partial) else make, ())


def _flops(config: Config, data: ImageData) -> float:
    with torch.device("meta"):
        teacher = config.network(data) if config.objective.teachers else None
    return Step(config, data, teacher, "meta").flops() / config.optim.batch_size
