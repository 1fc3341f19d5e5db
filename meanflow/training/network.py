"""A trained network from a run, a checkpoint or a weight file, and images from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data import generator_for
from ..errors import UsageError
from ..files import parse_json, reason, shown
from ..models import config_of, create_model, family_of, is_factory
from ..sampling import sample, sample_ode
from .checkpoint import (
    check_weights,
    cure_for_damage,
    list_checkpoints,
    load_metadata,
    load_shapes,
    load_tensors,
    load_weights,
)
from .state import check_files, check_model, load_state

CHUNK = 500  # images per network evaluation
UNGUIDED = {"omega": 1.0, "t_min": 0.0, "t_max": 1.0}


@dataclass(frozen=True)
class LoadedNetwork:
    """A network and what is needed to draw from it.

    net: in evaluation mode.
    objective: "meanflow", "imf" or "flow_matching": which sampler fits.
    class_names: one per label.
    step: optimiser steps it was trained for; None for a weight file.
    source: where it came from.
    guidance: omega, t_min and t_max that an iMF-DiT is asked for by default; empty for other networks.
    """

    net: nn.Module
    objective: str
    class_names: tuple[str, ...]
    step: int | None
    source: Path
    guidance: Mapping[str, float] = field(default_factory=dict)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        config = config_of(self.net)
        return config["in_channels"], config["input_size"], config["input_size"]


def load_network(
    source: Path, weights: Literal["ema", "raw"] = "ema", device: str = "cpu", *, trust_code: bool | str = False
) -> LoadedNetwork:
    """The network of a run folder (its newest checkpoint), of one checkpoint folder, or of a safetensors file.

    Args:
        source: the folder or file.
        weights: averaged ones, or those of the last step.
        device: where to put it.
        trust_code: whether a function "package.module:function" that the file names as its network's may be imported
            and called; or the name of the one that may. It runs as any code of yours.

    Raises:
        UsageError: there is none, it is damaged, or names a function that is not trusted; the message says which.
    """
    if not source.is_file():
        return _of_checkpoint(source, weights, device, trust_code)
    if weights == "raw":
        raise UsageError(f"weights: {source} holds one set of weights; a run or a checkpoint has ema and raw ones")
    metadata = load_metadata(source)
    if "model" not in metadata:
        raise UsageError(f"{source}: expected a weight file written by `meanflow convert`, which names its model")
    try:
        model = parse_json(metadata["model"])
        check_model("model", model)
    except ValueError as error:
        raise UsageError(
            f"{source}: its metadata names no model ({error}); convert it anew with `meanflow convert`"
        ) from error
    imf = model["name"].startswith("iMF-DiT")
    net = _network(model, load_tensors(source), source, trust_code)
    return LoadedNetwork(
        net.to(device).eval(),
        objective="imf" if imf else "meanflow",
        class_names=tuple(str(label) for label in range(model["config"]["num_classes"])),
        step=None,
        source=source,
        guidance=UNGUIDED if imf else {},
    )


def _of_checkpoint(folder: Path, weights: str, device: str, trust_code: bool | str) -> LoadedNetwork:
    path = find_checkpoint(folder)
    source = path / f"{'ema' if weights == 'ema' else 'model'}.safetensors"
    try:
        state = load_state(path, "model", "objective", "class_names")
        check_files(path, state, [source.name])
        tensors = load_tensors(source)
    except UsageError as error:
        cure = "" if path == folder else cure_for_damage(path.parent, path)
        raise UsageError(f"{error}{cure}") from error
    return LoadedNetwork(
        _network(state["model"], tensors, source, trust_code).to(device).eval(),
        state["objective"],
        tuple(state["class_names"]),
        state["step"],
        source,
        state.get("guidance") or (UNGUIDED if state["objective"] == "imf" else {}),
    )


def check_trusted(name: str, source: Path, trust_code: bool | str) -> None:
    """Raise where `source` names a function as its model that is not to be run."""
    if is_factory(name) and trust_code is not True and trust_code != name:
        raise UsageError(
            f"{source} names the function {shown(name)} as its model. It is not run because only a file names it: if "
            "you trust it, add --trust-code, or name it to `meanflow train` with --model (in Python: trust_code=True)"
        )


def _network(
    model: Mapping[str, Any], weights: Mapping[str, Tensor], source: Path, trust_code: bool | str
) -> nn.Module:
    """The network that a file names, with its weights."""
    name, config = model["name"], model["config"]
    check_trusted(name, source, trust_code)
    _check_sizes(model, weights, source)
    with _building(source):
        net = create_model(name if is_factory(name) else family_of(name), **config)
    load_weights(net, weights, source)
    return net


def _check_sizes(model: Mapping[str, Any], weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise where a model of ours has other sizes than its weights; takes no memory, however large they are."""
    name, config = model["name"], model["config"]
    if is_factory(name):
        return
    with _building(source):
        blocks = max(config.get("depth", 0), config.get("aux_head_depth", 0))
        if blocks > len(weights):
            raise ValueError(f"depth: expected no more than there are tensors, {len(weights)}, got {shown(blocks)}")
        with torch.device("meta"):
            draft = create_model(family_of(name), **config)
        check_weights(draft.state_dict(), weights, source)


@contextmanager
def _building(source: Path) -> Iterator[None]:
    """Errors of a network's own as a UsageError."""
    try:
        yield
    except UsageError:
        raise
    # RuntimeError, OverflowError: sizes that no tensor has
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{source}: cannot build its model: {reason(error)}") from error


def check_resumed(path: Path, sizes: Mapping[str, Any]) -> None:
    """Raise before a network of these sizes is built to go on from the checkpoint `path` where its own differ."""
    try:
        model = load_state(path, "model")["model"]
        _check_sizes(model, load_shapes(path / "model.safetensors"), path)
    except UsageError as error:
        raise UsageError(f"{error}{cure_for_damage(path.parent, path)}") from error
    for name, value in sizes.items():
        before = model["config"].get(name, value)
        if before != value:
            raise UsageError(f"{name}: {path} holds another model's weights: expected {before}, got {value}")


def find_checkpoint(source: Path) -> Path:
    """The checkpoint folder that `source` is, or the newest one of the run folder that it is.

    Raises:
        UsageError: there is none.
    """
    if (source / "state.json").is_file():
        return source
    found = list_checkpoints(source / "checkpoints")
    if not found:
        what = "has no checkpoint yet" if source.is_dir() else "does not exist"
        raise UsageError(f"{source} {what}; expected a run folder such as runs/digits, a checkpoint, or a weight file")
    return found[-1]


def generate(
    net: Callable[..., Any],
    labels: Tensor,
    image_shape: tuple[int, int, int],
    *,
    objective: str = "meanflow",
    guidance: Mapping[str, float] | None = None,
    steps: int | None = None,
    seed: int = 0,
    method: Literal["euler", "heun"] = "heun",
    guidance_scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Images of the given labels; the noise depends on `seed` alone, not on the device.

    Args:
        net: u = net(z, r, t, y).
        labels: (n,) integer labels.
        image_shape: C, H, W.
        objective: "meanflow" and "imf" take `steps` (default 1) MeanFlow steps, "flow_matching" `steps` (default 50)
            ODE steps.
        guidance: of "imf": omega, t_min and t_max.
        method, guidance_scale: of the ODE sampler.

    Returns:
        (n, C, H, W) float32 on the CPU, not cut to [-1, 1].

    Raises:
        UsageError: the backend that was asked for cannot serve the network.
    """
    noise = torch.randn(len(labels), *image_shape, generator=generator_for(seed, 5))  # [n, C, H, W]
    images = []
    for z, y in zip(noise.split(CHUNK), labels.split(CHUNK), strict=True):
        z, y = z.to(device), y.to(device)
        try:
            if objective == "imf":
                conditions: dict[str, Any] = {"heads": "u", **(guidance or {})}
                x = sample(net, z, y, steps=1 if steps is None else steps, **conditions)
            elif objective == "meanflow":
                x = sample(net, z, y, steps=1 if steps is None else steps)
            else:
                steps_ode = 50 if steps is None else steps
                x = sample_ode(net, z, y, steps=steps_ode, method=method, guidance_scale=guidance_scale)
        except NotImplementedError as error:
            raise UsageError(f"backend: this network cannot be served: {error}") from error
        images.append(x.float().cpu())
    return torch.cat(images)
