"""`meanflow recipes`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tyro.conf import Positional

from ..comparison.estimate import GPUS, PEAK, TFLOPS, Estimate, estimate_of
from ..config import FOLDERS, GROUPS, Config
from ..errors import UsageError
from ..options import options_of
from ..recipes import Published, published, recipe
from ..registry import available, find, is_code, names
from .common import check_at_least, command, parse, say

HEADS = ("recipe", "model", "parameters", "images a step", "steps (epochs)", "GFLOP an image", "hours", "FID", "from")


@dataclasses.dataclass(frozen=True)
class Recipes:
    """List every recipe with what it costs and what its paper reports; with a name, all about the one.

    Args:
        name: a recipe; None: all of them
        gpus: that the hours are for
        tflops: sustained by each, in the products of training steps: put in what you measured
    """

    name: Positional[str | None] = None
    gpus: int = GPUS
    tflops: float = TFLOPS


def recipes(args: Sequence[str]) -> int:
    """Every recipe: what it costs, and what its paper reports"""
    options = parse(command(Recipes), args, prog="recipes")
    check_at_least(1, options, "gpus")
    if not 0 < options.tflops < float("inf"):
        raise UsageError(f"expected a number > 0, got {options.tflops}", field="tflops")
    name = options.name
    if name is None:
        say(table(gpus=options.gpus, tflops=options.tflops))
    elif name in names("recipes") or is_code(name):
        say(details(name, gpus=options.gpus, tflops=options.tflops))
    else:
        raise UsageError(f"expected one of {', '.join(names('recipes'))}, got {name!r}", field="name")
    return 0


def table(*, gpus: int, tflops: float) -> str:
    """All recipes, in columns."""
    heads = [f"{head} on {_gpus(gpus)}" if head == "hours" else head for head in HEADS]
    known = sorted(available("recipes", recipe), key=lambda pair: by_paper(pair[0]))
    lines = [heads, *(row(name, config, gpus=gpus, tflops=tflops) for name, config in known)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", assumption(gpus, tflops), "", "All about one: meanflow recipes NAME"])


def by_paper(name: str) -> str:
    """What recipes are ordered by: those of no paper, then papers by their dates, each in its own order."""
    reported = published(name)
    return "" if reported is None else reported.paper


def row(name: str, config: Config, *, gpus: int = GPUS, tflops: float = TFLOPS) -> list[str]:
    """A recipe under the heads of the table; what nothing is known of is empty."""
    reported, estimate = published(name), estimate_of(name)
    steps = f"{config.optim.steps:,}"
    known = ["", "", measured(name), "", ""]
    if reported is not None and estimate is not None:
        steps += f" ({reported.epochs:,})" if reported.epochs else ""
        hours = _hours(estimate.hours(config, gpus=gpus, tflops=tflops))
        known = [
            _millions(estimate.parameters),
            f"{estimate.flops / 1e9:.0f}",
            hours,
            _fids(reported),
            source(reported),
        ]
    parameters, flops, hours, fid, origin = known
    return [name, config.model.name, parameters, f"{config.optim.batch_size}", steps, flops, hours, fid, origin]


def details(name: str, *, gpus: int, tflops: float) -> str:
    """A recipe: what it trains, what that costs, what is reported, its settings, and what to run."""
    config, reported, estimate = recipe(name), published(name), estimate_of(name)
    words = [("model", config.model.name)]
    if reported is not None and estimate is not None:
        words = list(_reported(config, reported, estimate, gpus, tflops).items())
    elif measured(name):
        words.append(("measured", measured(name)))
    width = max(len(key) for key, _ in words) + 2
    lines = [name, *(f"  {key:<{width}}{text}" for key, text in words)]
    lines += ["", "As a file for `meanflow train --config FILE`, in which what is at its default is left out:"]
    lines += [f"  {key}: {json.dumps(value)}" for key, value in written(config, _place(reported)).items()]
    lines += ["", "To run it:", *(f"  {line}" for line in to_run(name, reported, gpus))]
    return "\n".join([*lines, *([] if reported is None else ["", assumption(gpus, tflops)])])


def _reported(config: Config, reported: Published, estimate: Estimate, gpus: int, tflops: float) -> Mapping[str, str]:
    """What a recipe of a paper says, by key."""
    optim, parameters = config.optim, f"{_millions(estimate.parameters)} parameters in training"
    if reported.parameters is not None:
        parameters += f" (published: {reported.parameters:g} M)"
    total = estimate.flops * optim.batch_size * optim.steps
    found = {
        "paper": f"https://arxiv.org/abs/{reported.paper}",
        "data": reported.data,
        "model": f"{config.model.name}, {parameters}",
        "training": f"{optim.steps:,} steps of {optim.batch_size} images, {reported.epochs} epochs",
        "cost": f"{estimate.flops / 1e9:.1f} GFLOP an image of a training step, {total:.2g} FLOP in all",
        "hours": f"{_hours(estimate.hours(config, gpus=gpus, tflops=tflops))} on {_gpus(gpus)}, an estimate: see below",
        "protocol": reported.protocol,
        "FID": f"{_fids(reported)}: {reported.table}" if reported.fid else "none is published for this network",
        "differs": reported.differs,
    }
    return {key: text for key, text in found.items() if text}


def written(config: Config, place: str) -> dict[str, Any]:
    """The values of a file that is this configuration, its components first; `place` stands for data of the user's."""
    values, usual = config.values(), Config().values()
    parts = {part: values[part] for part in GROUPS if part in values}
    if parts["data"] in FOLDERS and not values["folder"]:
        parts["data"] = place
    if parts["codec"] == usual["codec"]:
        del parts["codec"]  # a folder of latents has its own
    return {**parts, **settings(config)}


def settings(config: Config) -> dict[str, Any]:
    """The values of a configuration that differ from the defaults of its data, model and objective."""
    values = config.values()
    parts = {option.name: option.default for option in options_of(Config, config) if option.choice}
    whole = {part: parts.pop(part) for part in GROUPS if part in parts}
    base = Config().replace(**{part: name for part, name in whole.items() if name != Config().values()[part]})
    usual = {**base.replace(**parts).values(), **{part: base.values().get(part) for part in parts}}
    return {key: value for key, value in values.items() if value != usual[key]}


def to_run(name: str, reported: Published | None, gpus: int) -> list[str]:
    """Commands that train a recipe and draw from it."""
    run = recipe(name).run.name
    train = f"train {name}"
    if reported is not None:
        train += f" --data {_place(reported)}"
    lines = [f"meanflow {train}"]
    if reported is not None and gpus > 1:
        lines.append(f"torchrun --nproc-per-node {gpus} -m meanflow {train}")
    return [*lines, f"meanflow sample runs/{run}"]


def _place(reported: Published | None) -> str:
    """The word for the user's data."""
    return "FOLDER" if reported is None or reported.shape[0] == 3 else "LATENTS"


def assumption(gpus: int, tflops: float) -> str:
    """What the hours rest on."""
    share = f"{tflops / PEAK:.0%}".replace("%", " %")
    return (
        "Hours are an estimate, nobody measured them: the products of the training steps at "
        f"{tflops:g} TFLOP/s sustained by each of {_gpus(gpus)},\nwhich is {share} of an H100's bf16 peak ({PEAK:g}). "
        "--tflops and --gpus put in others. A VAE and the reading of data are not counted.\n"
        "FIDs are the papers', by the number of network evaluations; none has been reproduced with this library."
    )


def measured(name: str) -> str:
    """The seconds that a recipe's docstring reports; "" where it has none."""
    words = " ".join((inspect.getdoc(find("recipes", name)) or "").split())
    found = re.search(r"\d+ s of one core", words)
    return found[0] if found else ""


def source(reported: Published) -> str:
    """The paper and its table."""
    return ", ".join(part for part in (f"arXiv {reported.paper}", reported.table) if part)


def _fids(reported: Published) -> str:
    return ", ".join(f"{fid:g} ({count})" for count, fid in reported.fid.items())


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' if number > 1 else ''}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.0f} M"


def _hours(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 9.5 else f"{hours:.1f}"
