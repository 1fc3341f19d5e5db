"""The runs of a comparison: trained, or gone on with, or there already; and what each of them reaches."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from .. import __version__
from ..checks import check_backend
from ..config import Config, Trust, words_in
from ..config_file import read_config
from ..data import ImageData
from ..errors import UsageError
from ..training.folder import RunFolder
from ..training.network import LoadedNetwork, load_initial_weights, load_network, source_of
from ..training.pictures import POINTS, makes_picture, samples_picture
from ..training.report import evaluate_network
from ..training.run import run_training
from ..training.state import load_state
from .cost import Cost, Step, cost_of, threads
from .methods import YARDSTICK, Method, budgeted, methods_of, run_name

EVALUATIONS = (1, 2, 4)  # of the network, for an image
TILES = 10  # images in a strip
POINTS_DRAWN = 1000  # in its place, where images are points
NOTE = (
    "cost: FLOPs in the products of a step's forward, loss and backward, over those of a flow matching step; a mean "
    "over the run. seconds and time_ratio: the fastest of a few steps, taken in turns with flow matching's; other jobs "
    "on the machine disturb them. peak_bytes: allocated within a step."
)
Strip = Image.Image | None


class Stopped(Exception):
    """A signal has ended a run, which is saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Budget:
    """What a comparison is asked for.

    preset: the recipe that objectives take their values from.
    steps: steps of flow matching whose products each method may spend.
    seeds: each method is trained once with each.
    name: of the comparison; its run folders are named after it.
    teacher: a run or file in the place of the comparison's own flow matching; None: that.
    init: a run or file whose weights every method starts from; None: from fresh ones.
    samples: images of an evaluation.
    overwrite: replace run folders.
    trust_code: code that the teacher, and the run of init, may name.
    """

    preset: str
    steps: int
    seeds: tuple[int, ...]
    name: str
    teacher: str | None
    init: str | None
    samples: int
    overwrite: bool
    trust_code: Trust


@dataclass(frozen=True)
class Planned:
    """A method with its cost and the configurations of its runs, one for each seed."""

    method: Method
    cost: Cost
    configs: tuple[Config, ...]


def compare_methods(
    words: Sequence[str], budget: Budget, device: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, list[Strip]]]:
    """Train what is not trained yet, and evaluate all.

    Returns:
        the comparison, as compare.json has it; and strips of samples of each method, one for each of its results.

    Raises:
        UsageError: something does not fit, told before anything is trained where that can be known.
        Stopped: by a signal.
    """
    check_backend()
    methods, left_out = methods_of(words, budget.preset, taught=budget.teacher is not None)
    for name, reason in left_out.items():
        say(f"{name} is left out: it {reason}")
    data = methods[0].config.data.load()
    plans = plan(methods, budget, data, device)
    standing = [[standing_of(config, budget.overwrite) for config in planned.configs] for planned in plans]
    for planned in plans:
        steps = planned.configs[0].optim.steps
        say(f"{planned.method.name}: {steps} steps of {planned.cost.flops / plans[0].cost.flops:.2f}")
    for planned, states in zip(plans, standing, strict=True):
        for config, state in zip(planned.configs, states, strict=True):
            train(planned.method, config, state, budget.trust_code)
    rows, strips = [], {}
    for planned in plans:
        row, strips[planned.method.name] = results_of(planned, plans[0].cost, data, budget, device)
        rows.append(row)
    evaluator = methods[0].config.run.evaluator
    figures = rows[0].pop("held_out")
    for row in rows[1:]:
        row.pop("held_out")
    comparison = {
        "preset": budget.preset,
        "data": data.name,
        "budget_steps": budget.steps,
        "budget_flops": budget.steps * plans[0].cost.flops,
        "seeds": list(budget.seeds),
        "samples": budget.samples,
        "titles": dict(evaluator.titles),
        "held_out": figures,
        "note": NOTE,
        "methods": rows,
        "left_out": left_out,
        "device": device,
        "threads": methods[0].config.run.threads,
        "machine": platform.machine(),
        "versions": {"meanflow": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return comparison, strips


# ------------------------------------------------------------------------------------------------------------ the plan


def plan(methods: Sequence[Method], budget: Budget, data: ImageData, device: str) -> list[Planned]:
    """Each method's cost, and the configurations with which it spends the budget."""
    base = methods[0]
    with threads(base.config.run.threads):
        teacher = _teacher(budget, base, data, device)
        yardstick = Step(base.config, data, teacher, device)
        plans: list[Planned] = []
        for method in methods:
            step = Step(method.config, data, teacher, device)
            _check_init(step.net, method, budget)
            cost = cost_of(step, yardstick)
            if method is base:
                cost = cost._replace(ratio=1.0)  # not what two measurements of one thing differ by
            share = cost.flops / (plans[0].cost.flops if plans else cost.flops)
            steps = max(1, round(budget.steps / share))
            configs = []
            for seed in budget.seeds:
                taught_by = budget.teacher or f"runs/{run_name(budget.name, YARDSTICK, seed)}"
                name = run_name(budget.name, method.name, seed)
                config = budgeted(method, steps, name=name, seed=seed, teacher=taught_by)
                configs.append(config.replace(init=budget.init) if budget.init else config)
            for other in plans:
                if other.configs[0].run.name == configs[0].run.name:
                    raise UsageError(
                        f"expected names whose runs differ, got {other.method.name} and {method.name}, both of "
                        f"{configs[0].run.name}",
                        field="methods",
                    )
            plans.append(Planned(method, cost, tuple(configs)))
    return plans


def _check_init(net: nn.Module, method: Method, budget: Budget) -> None:
    """Raise where a method's network cannot start from the weights that were asked for."""
    if budget.init is None:
        return
    try:
        load_initial_weights(net, source_of(budget.init), trust_code=budget.trust_code)
    except UsageError as error:
        raise UsageError(f"{method.name} cannot start from {budget.init}: {error}", field="init") from error


def _teacher(budget: Budget, base: Method, data: ImageData, device: str) -> Any:
    """u(z, r, t, y) to measure with: the teacher that was given, or a fresh network such as the yardstick's."""
    if budget.teacher is None:
        return base.config.network(data).to(device).requires_grad_(False).eval()
    try:
        loaded = load_network(source_of(budget.teacher), device=device, trust_code=budget.trust_code)
        shape = tuple(base.config.codec.latent_shape(data.image_shape))
        if loaded.latent_shape != shape:
            raise UsageError(f"expected a network of images of shape {shape}, got {loaded.latent_shape}")
    except UsageError as error:
        raise UsageError(str(error), field="teacher") from error
    return loaded.objective.sampled(loaded.net.requires_grad_(False))


# ------------------------------------------------------------------------------------------------------------ training

Standing = Literal["new", "replaced", "resumed", "done"]


def standing_of(config: Config, overwrite: bool) -> Standing:
    """What is to be done for a run.

    Raises:
        UsageError: its folder holds another run, or something else.
    """
    folder = RunFolder.named(config.run.name)
    if overwrite or not folder.config.is_file():
        folder.prepare(resume=False, overwrite=overwrite)
        return "replaced" if overwrite else "new"
    saved, _ = read_config(folder.config, set(words_in(config.to_dict())))
    then, now = saved.values(), config.values()
    for name in now:
        settled = name == "precision" and now[name] == "auto"
        if not settled and then.get(name) != now[name]:
            raise UsageError(
                f"{folder.path} is of another comparison: it has {name} {then.get(name)}, and this one {now[name]}. "
                "Choose another name with --name NAME, or replace its runs with --overwrite"
            )
    newest = folder.newest()
    if newest is None:
        return "replaced"
    return "done" if load_state(newest, "step")["step"] >= config.optim.steps else "resumed"


def train(method: Method, config: Config, standing: Standing, trust_code: Trust) -> None:
    """Raises Stopped where a signal ends the run."""
    if standing == "done":
        return
    result = run_training(
        config,
        preset=method.preset,
        resume=standing == "resumed",
        overwrite=standing == "replaced",
        trust_code=trust_code,
    )
    if result.signal is not None:
        raise Stopped(result.signal)


# ------------------------------------------------------------------------------------------------------------- results


def results_of(
    planned: Planned, base: Cost, data: ImageData, budget: Budget, device: str
) -> tuple[dict[str, Any], list[Strip]]:
    """A method's row of compare.json, and a strip of samples of each of its results, of the first seed."""
    method, cost, config = planned.method, planned.cost, planned.configs[0]
    networks, seconds = [], []
    for each in planned.configs:
        folder = RunFolder.named(each.run.name)
        networks.append(load_network(folder.path, device=device, trust_code=set(words_in(each.to_dict()))))
        newest = folder.newest()
        assert newest is not None
        seconds.append(round(load_state(newest, "seconds")["seconds"], 1))
    results, strips, held_out = [], [], {}
    evaluator = config.run.evaluator
    with threads(config.run.threads):
        for evaluations, options in sampled_at(networks[0].objective.sampling):
            figures = [
                evaluate_network(net, data, evaluator, samples=budget.samples, device=device, **options)
                for net in networks
            ]
            held_out = {key: figures[0].get(f"held_out_{key}") for key in evaluator.titles}
            values = {key: [each.get(key) for each in figures] for key in evaluator.titles}
            results.append({"evaluations": evaluations, "sampler": figures[0]["sampler"], **values})
            strips.append(strip(networks[0], device, options))
    return {
        "name": method.name,
        "preset": method.preset,
        "objective": method.objective,
        "model": config.model.name,
        "parameters": sum(p.numel() for p in networks[0].net.parameters()),
        "teacher": config.run.teacher,
        "batch_size": config.optim.batch_size,
        "steps": config.optim.steps,
        "recipe_steps": method.config.optim.steps,
        "cost": round(cost.flops / base.flops, 4),
        "flops": cost.flops,
        "seconds": round(cost.seconds, 5),
        "time_ratio": round(cost.ratio, 3),
        "peak_bytes": cost.peak_bytes,
        "memory_ratio": round(cost.peak_bytes / base.peak_bytes, 3),
        "training_seconds": seconds,
        "runs": [each.run.name for each in planned.configs],
        "results": results,
        "held_out": held_out,
        "config": config.to_dict(),
    }, strips


def sampled_at(sampling: Any) -> list[tuple[int | None, dict[str, Any]]]:
    """Numbers of network evaluations with the options of the sampler for each; None and none where it has no steps."""
    fields = {field.name for field in dataclasses.fields(sampling)}
    if "steps" not in fields:
        return [(None, {})]
    options: dict[str, Any] = {"times": ()} if "times" in fields else {}
    if "method" in fields:
        options["method"] = "euler"  # of an ODE: one evaluation a step
    return [(n, {"steps": n, **options}) for n in EVALUATIONS]


def strip(loaded: LoadedNetwork, device: str, options: dict[str, Any]) -> Strip:
    """Samples side by side, one of each class in turn, or many points; None where images make no picture."""
    if not makes_picture(loaded.image_shape):
        return None
    n = POINTS_DRAWN if loaded.image_shape == POINTS else TILES
    labels = torch.arange(n) % len(loaded.class_names)  # [n]
    images = loaded.generate(labels, device=device, **options)  # [n, C, H, W]
    return samples_picture(images, TILES, labels, bare=True)
