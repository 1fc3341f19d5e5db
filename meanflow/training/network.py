"""A trained network from a run, a checkpoint or a weight file, and images from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data import generator_for
from ..errors import UsageError
from ..models import config_of, create_model, is_factory
from ..sampling import sample, sample_ode
from .checkpoint import list_checkpoints, load_metadata, load_state, load_tensors, load_weights

CHUNK = 500  # images per network evaluation


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


def load_network(source: Path, weights: Literal["ema", "raw"] = "ema", device: str = "cpu") -> LoadedNetwork:
    """The network of a run folder (its newest checkpoint), of one checkpoint folder, or of a safetensors file.

    Raises:
        UsageError: there is none, or it is damaged; the message names the path.
    """
    if source.is_file():
        if weights == "raw":
            raise UsageError(f"weights: {source} holds one set of weights; a run or a checkpoint has ema and raw ones")
        metadata = load_metadata(source)
        if "model" not in metadata:
            raise UsageError(f"{source}: expected a weight file written by `meanflow convert`, which names its model")
        try:
            model, state = json.loads(metadata["model"]), None
            objective = "imf" if model["name"] == "iMF-DiT" else "meanflow"
            names = tuple(str(label) for label in range(model["config"]["num_classes"]))
        except (ValueError, TypeError, LookupError) as error:
            raise UsageError(
                f"{source}: its metadata names no model ({type(error).__name__}: {error}); convert it anew with "
                "`meanflow convert`"
            ) from error
        guidance = {"omega": 1.0, "t_min": 0.0, "t_max": 1.0} if objective == "imf" else {}
        tensors = load_tensors(source)
    else:
        path = find_checkpoint(source)
        state = load_state(path, "model", "objective", "class_names")
        model, objective, names = state["model"], state["objective"], tuple(state["class_names"])
        guidance = state.get("guidance", {})
        source = path / f"{'ema' if weights == 'ema' else 'model'}.safetensors"
        tensors = load_tensors(source)
    try:
        family = next((name for name in ("Affine", "iMF-DiT") if model["name"].startswith(name)), "DiT")
        family = model["name"] if is_factory(model["name"]) else family
        net = create_model(family, **model["config"])
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UsageError(f"{source}: cannot build its model: {error}") from error
    load_weights(net, tensors, source)
    step = None if state is None else int(state["step"])
    return LoadedNetwork(net.to(device).eval(), objective, names, step, source, guidance)


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
